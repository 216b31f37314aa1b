"""Tests that take minutes on a CPU run only where asked for, or with less work for its compiler."""

from collections.abc import Iterator

import jax
import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--exhaustive", action="store_true", help="Every case of the Pallas kernels: minutes each if interpreted."
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--exhaustive"):
        return
    left_out = [item for item in items if item.get_closest_marker("exhaustive")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture
def light_compilation() -> Iterator[None]:
    """Compiles with few optimisations on a CPU, for tests whose time is compiling and whose claim is not about it:
    emulated kernels, the trainer's bookkeeping.
    """
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", jax.default_backend() == "cpu")
    yield
    jax.config.update("jax_disable_most_optimizations", before)
