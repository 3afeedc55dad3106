"""Rules for the whole package: imports point one way, functions and modules are short, imports of
heavy packages are late.
"""

from __future__ import annotations

import ast
import pydoc
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import featcache
from conftest import REPO
from featcache import cli

SRC = REPO / "src" / "featcache"
ARCHITECTURE = REPO / "docs" / "architecture.md"
MAX_FUNCTION_LINES = 40
MAX_MODULE_LINES = 400
MAX_ROOM_MODULES = 14

# The order of the rooms (the folders and top-level modules of src/featcache): a module may import
# from its own room and from rooms in earlier rows. Rooms in one row do not import each other, so
# each can be read and tested alone. docs/architecture.md shows this table and says what rooms own.
ROWS = [
    {"errors"},
    {"ranks"},
    {"config"},
    {"display", "streams"},
    {"runtime"},
    {"files"},
    {"file_hashes", "groups", "random_order", "tensor_files"},
    {"cache", "data", "backbone", "results"},
    {"engine"},
    {"heads", "extract", "html_report"},
    {"audit", "finetune"},
    {"predict"},
    {"export"},
    {"compare"},
    {"cli"},
    {"api"},
    {"__init__", "__main__"},
]
HEAVY = {
    *("torch", "torchvision", "timm", "sklearn", "scipy", "matplotlib", "h5py", "openvino", "tyro"),
    *("pandas", "pyarrow"),
}
# Modules that exist to be imported late: their callers import them inside functions.
LATE = {
    "fusion.py",
    "stages.py",
    "tail.py",
    "gpu.py",
    "torch_cpu.py",
    "winograd.py",
    "estimator.py",
    "graph.py",
    "convolutions.py",
    "small_maps.py",
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
def test_functions_and_modules_are_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_MODULE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= MAX_FUNCTION_LINES, f"{node.name} has {lines} lines"


def test_rooms_are_small_enough_to_know() -> None:
    for folder, num in Counter(path.parent for path in modules()).items():
        assert num <= MAX_ROOM_MODULES, f"{folder} has {num} modules: merge some"


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


def test_the_architecture_page_lists_the_rooms_in_order() -> None:
    table = re.findall(r"^\| (`.+?`) \|", ARCHITECTURE.read_text(), re.MULTILINE)
    listed = [name for cell in table for name in re.findall(r"`(\w+)`", cell)]
    assert [row_of(name) for name in listed] == sorted(row_of(name) for name in listed)
    assert sorted(listed) == sorted(room for row in ROWS for room in row)
    assert {room_of(path) for path in modules()} == set(listed)


def test_every_name_on_the_architecture_page_exists() -> None:
    rooms = {room_of(path) for path in modules()}
    names = re.findall(r"`(\w+(?:\.\w+)+)`", ARCHITECTURE.read_text())
    ours = [name for name in names if name.split(".")[0] in rooms]
    assert len(ours) > 20
    for name in ours:
        pydoc.resolve(f"featcache.{name}")  # raises ImportError


def test_public_names_exist_and_load_late() -> None:
    for name in featcache.__all__:
        assert callable(getattr(featcache, name))
        assert name not in {room_of(path) for path in modules()}
        public = getattr(featcache, name)
        assert getattr(cli, name, public) is public, f"cli has another {name}"


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, featcache, featcache.cli, featcache.config;"
        f"print({HEAVY!r} & set(sys.modules), 'numpy' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["set()", "False"]
