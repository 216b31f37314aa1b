"""Kernels are emulated here, unless there is an accelerator."""

import pytest


@pytest.fixture(autouse=True)
def _light(light_compilation: None) -> None:
    pass
