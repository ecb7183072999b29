"""Imports point down, and siblings on a floor do not import each other."""

import ast
from pathlib import Path

import pytest

import kavatar_jax

FLOORS = [
    ["config", "types"],
    ["media", "parallel", "checkpoint", "diffusion"],
    ["nn"],
    ["models"],
    ["director", "puppets", "evaluation"],
    ["cascade", "training"],
    ["demo", "__main__"],
]
FLOOR = {name: i for i, floor in enumerate(FLOORS) for name in floor}
PACKAGE = Path(kavatar_jax.__file__).parent
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in imported(path):
        top, _, rest = name.partition(".")
        assert top not in ("launch", "tools", "configs", "tests"), f"the package imports {name}"
        there = rest.split(".")[0]
        if top == "kavatar_jax" and there in FLOOR:
            assert there == here or FLOOR[there] < FLOOR[here], f"{here} imports {there}"


def test_media_knows_no_jax():
    for path in (PACKAGE / "media").glob("*.py"):
        assert not any(name.split(".")[0] in ("jax", "flax") for name in imported(path)), path


def test_every_file_opens_with_a_docstring():
    for path in FILES:
        assert ast.get_docstring(ast.parse(path.read_text())), path
