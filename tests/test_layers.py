"""Imports go down only, siblings never import each other, nothing private of JAX is used."""

import ast
import pathlib

import jaxcompress

ROOT = pathlib.Path(jaxcompress.__file__).parent
# From the bottom up; a room may import its own and any lower level.
LEVELS = [
    {"_types", "_dtypes"},
    {"_check", "_keys", "_products"},
    {"_sharding", "_files"},
    {"tree"},
    {"arrays", "schedules"},
    {"projections", "tracing"},
    {"solvers"},
    {"pruning", "quantization", "factorization", "distillation"},
    {"report", "export", "search"},
]
LEVEL = {room: i for i, rooms in enumerate(LEVELS) for room in rooms}


def room_of(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: pathlib.Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_room_has_a_level():
    rooms = {room_of(p) for p in ROOT.rglob("*.py")} - {"__init__"}
    assert rooms == set(LEVEL)


def test_imports_go_down_only():
    wrong = []
    for path in ROOT.rglob("*.py"):
        room = room_of(path)
        if room == "__init__":
            continue
        for name in imports(path):
            if not name.startswith("jaxcompress."):
                continue
            other = name.split(".")[1]
            if other != room and LEVEL[other] >= LEVEL[room]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_nothing_private_and_no_flax_in_the_core():
    for path in ROOT.rglob("*.py"):
        names = list(imports(path))
        assert not [n for n in names if n.startswith("jax._src")], path
        bridge = path.relative_to(ROOT).as_posix() == "tracing/_nnx.py"
        if room_of(path) not in {"report", "export"} and not bridge:
            assert not [n for n in names if n.split(".")[0] == "flax"], path
