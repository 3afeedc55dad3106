"""The rules of the house: imports point one way, functions fit a screen, start-up is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import featcache
from conftest import REPO

SRC = REPO / "src" / "featcache"
MAX_FUNCTION_LINES = 40
MAX_MODULE_LINES = 400

# A module may import from rows above its own, and from its own package.
ROWS = [
    {"errors"},
    {"config"},
    {"runtime", "streams"},
    {"files"},
    {"file_hashes", "random_order", "tensor_files"},
    {"cache", "data", "backbone", "results"},
    {"engine"},
    {"heads", "extract", "html_report"},
    {"finetune"},
    {"predict"},
    {"export"},
    {"compare"},
    {"cli"},
    {"api"},
    {"__init__", "__main__"},
]
HEAVY = {"torch", "torchvision", "sklearn", "scipy", "matplotlib", "h5py", "openvino", "tyro"}
# Modules that exist to be imported late: their callers import them inside functions.
LATE = {
    "fusion.py",
    "gpu.py",
    "torch_cpu.py",
    "skeleton.py",
    "hdf5_view.py",
    "estimator.py",
    "graph.py",
}


def modules() -> list[Path]:
    return sorted(SRC.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def row_of(room: str) -> int:
    rows = [i for i, row in enumerate(ROWS) if room in row]
    assert rows, f"{room} has no row: add it to ROWS where it belongs"
    return rows[0]


def imported_rooms(tree: ast.AST) -> set[str]:
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return {n.split(".")[1] for n in names if n.startswith("featcache.")}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(SRC)))
def test_imports_point_one_way(path: Path) -> None:
    room = room_of(path)
    rooms = imported_rooms(ast.parse(path.read_text())) - {room}
    sideways = {other for other in rooms if row_of(other) >= row_of(room)}
    assert not sideways, f"{path.name} imports {sideways} from its own row or above"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(SRC)))
def test_functions_fit_a_screen_and_modules_a_few(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_MODULE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= MAX_FUNCTION_LINES, f"{node.name} has {lines} lines"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(SRC)))
def test_heavy_imports_are_late(path: Path) -> None:
    if path.name in LATE:
        return
    for node in ast.parse(path.read_text()).body:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        assert not {name.split(".")[0] for name in names} & HEAVY


def test_public_names_exist_and_load_late() -> None:
    for name in featcache.__all__:
        assert callable(getattr(featcache, name))
        assert name not in {room_of(path) for path in modules()}


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, featcache, featcache.cli, featcache.config;"
        f"print({HEAVY!r} & set(sys.modules), 'numpy' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["set()", "False"]
