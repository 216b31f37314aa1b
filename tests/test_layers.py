"""Imports go down only. Walks every import of the packages and the scripts."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LEAVES = {"config", "types", "tokenizers", "engine.events"}
# Each layer may import itself, the layers below it and the leaves.
LAYERS = [
    {"scripts"},
    {"train", "evaluation"},
    {"reasoning", "tasks", "tracing"},
    {"aot"},  # compiles what the engine runs
    {"testing"},  # stands on the engine, for tests of all above
    {"engine"},
    {"models", "cache"},
    {"apr_kernels"},
]
# What lies on one level does not know its neighbours, with these exceptions.
SIDEWAYS = {("reasoning", "tracing")}


def room(module: str) -> str:
    """apr_jax.engine.loop -> engine; apr_jax.engine.events -> engine.events; apr_kernels.plan -> apr_kernels."""
    parts = module.split(".")
    if parts[0] != "apr_jax":
        return parts[0]
    if ".".join(parts[1:3]) in LEAVES:
        return ".".join(parts[1:3])
    known = len(parts) > 1 and any((ROOT / "apr_jax" / parts[1]).with_suffix(end).exists() for end in ("", ".py"))
    return parts[1] if known else "apr_jax"  # a name that the public face re-exports


def level(name: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if name in layer)


def imports(path: pathlib.Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.append(node.module or "")
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return [name for name in found if name.split(".")[0] in ("apr_jax", "apr_kernels", "scripts")]


def sources() -> list[tuple[str, pathlib.Path]]:
    found = []
    for folder in ("apr_jax", "kernels/apr_kernels", "scripts"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            module = ".".join(
                path.relative_to(ROOT / ("kernels" if "kernels" in folder else ".")).with_suffix("").parts
            )
            found.append((module.removesuffix(".__init__"), path))
    return found


@pytest.mark.parametrize("module, path", sources(), ids=[m for m, _ in sources()])
def test_imports_go_down(module: str, path: pathlib.Path):
    own = room(module)
    if own == "apr_jax":  # the public face re-exports
        return
    for name in imports(path):
        other = room(name)
        if other in (own, "apr_jax") or other in LEAVES:
            continue
        assert own not in LEAVES, f"{module} is a leaf and imports {name}"
        assert level(other) > level(own) or (own, other) in SIDEWAYS, f"{module} imports {name}, which is not below it"


def test_jit_lives_in_the_runner_and_the_trainer():
    """And in the kernel benchmark, which times compiled calls."""
    benchmark = ("scripts.kernel_runs", "scripts.kernel_timing", "scripts.decode_step")
    for module, path in sources():
        allowed = module.startswith(("apr_jax.engine.runner", "apr_jax.train", *benchmark))
        uses = [
            node
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute)
            and node.attr == "jit"
            and getattr(node.value, "id", "") in ("jax", "nnx")
        ]
        assert allowed or not uses, f"{module}:{uses[0].lineno} compiles"


def test_the_library_reads_no_flags():
    for module, path in sources():
        if not module.startswith("scripts"):
            assert "absl.flags" not in path.read_text() and "import flags" not in path.read_text(), module
