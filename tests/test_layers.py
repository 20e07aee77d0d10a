"""Who may import whom: every room stands on a floor and uses strictly lower floors only."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import noiseproof
from tiny import last_json, python

PACKAGE = Path(noiseproof.__file__).parent

FLOORS: dict[int, tuple[str, ...]] = {
    0: ("errors",),
    1: (
        "losses",
        "regularizers",
        "selection",
        "mixture",
        "textnoise",
        "metrics",
        "spectrum",
        "arrays",
        "statistics",
        "charts",
        "tokens",
    ),
    2: ("method", "noise", "tables", "models", "encoding", "evidence"),
    3: ("frozen", "saving"),
    4: ("heads", "adapters", "experts", "data", "modules", "precision", "features"),
    5: ("tuning", "tasks", "engine", "checkpoint", "record", "gradients"),
    6: ("methods", "loop", "distortion"),
    7: ("job", "prediction", "cards"),
    8: ("preparation", "estimators"),
    9: ("results", "corruption", "relabelling"),
    10: ("finetune", "auditing", "report"),
    11: ("demo", "peers"),
    12: ("grid",),
    13: ("benchmark",),
    14: ("study",),
    15: ("cli",),
    16: ("__main__",),
}
FLOOR = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
PURE = {"torch", "numpy", "scipy", "sklearn"}  # what floor 1 may import on loading
READS_TABLES = {"pandas", "pyarrow", "datasets"}  # what `tables` may import inside a function
HEAVY = ("torch", "transformers", "peft", "accelerate", "datasets", "pandas", "sklearn")

FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    """``methods/clear.py`` -> ``methods.clear``; the package itself is the empty name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    return module.split(".")[0]


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(path: Path, *, on_loading: bool = False) -> Iterator[tuple[str, int]]:
    """Absolute names of imported modules, with their lines; those for type checkers left out.

    Args:
        path: A source file.
        on_loading: Leave out imports inside functions.
    """
    package = ["noiseproof", *path.relative_to(PACKAGE).parent.parts]
    waiting: list[ast.AST] = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while waiting:
        node = waiting.pop()
        if is_type_checking(node):
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            yield name, node.lineno
            yield from ((f"{name}.{alias.name}", node.lineno) for alias in node.names)
        elif not (on_loading and isinstance(node, ast.FunctionDef)):
            waiting += ast.iter_child_nodes(node)


def own_modules(path: Path) -> set[tuple[str, int]]:
    """Modules of this package that a file imports, as ``methods.clear``."""
    modules = {module_of(file) for file in FILES}
    found = set()
    for name, line in imports(path):
        if name == "noiseproof" or name.startswith("noiseproof."):
            inner = name.removeprefix("noiseproof").removeprefix(".")
            while inner not in modules:  # a name inside a module
                inner = inner.rpartition(".")[0]
            found.add((inner, line))
    return {(inner, line) for inner, line in found if inner}


def test_every_source_file_stands_on_a_floor() -> None:
    """A file that is not on the list is a file that no rule holds for."""
    rooms = {room_of(module_of(path)) for path in FILES} - {""}
    assert rooms <= set(FLOOR), "put the new file on its floor in FLOORS (docs: DESIGN.md, rooms)"
    assert len(FLOOR) == sum(len(rooms) for rooms in FLOORS.values())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_from_lower_floors_only(path: Path) -> None:
    """One upward import, and the loop knows a method or a pure function needs a trainer."""
    module = module_of(path)
    if not module:  # the public names: nothing is imported before it is asked for
        assert not {name for name, _ in imports(path, on_loading=True) if "noiseproof" in name}
        return
    room = room_of(module)
    for other, line in own_modules(path):
        if room_of(other) != room:
            where = f"{path.relative_to(PACKAGE)}:{line} imports {other}"
            assert FLOOR[room_of(other)] < FLOOR[room], (
                f"{where}, floor {FLOOR[room_of(other)]}, from floor {FLOOR[room]}"
            )


def test_methods_know_no_loop_and_the_loop_knows_no_method() -> None:
    """This is what makes a benchmark fair: provably one loop for all of them."""
    for path in FILES:
        room, used = room_of(module_of(path)), {room_of(other) for other, _ in own_modules(path)}
        if room == "methods":
            assert not used & {"loop", "engine", "checkpoint", "job", "tasks", "data", "tables"}, (
                path
            )
        if room in ("loop", "engine", "checkpoint"):
            assert not used & {"methods", "job", "tasks", "data", "tables", "metrics"}, path


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if room_of(module_of(path)) in ("tables", "noise", *FLOORS[1])],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_the_ground_floor_is_pure(path: Path) -> None:
    """Formulas and readers must be testable without a model library."""
    room = room_of(module_of(path))
    ours = {"noiseproof"} | set(sys.stdlib_module_names)
    loaded = {name.split(".")[0] for name, _ in imports(path, on_loading=True)} - ours
    later = {name.split(".")[0] for name, _ in imports(path)} - ours - loaded
    assert loaded <= PURE
    assert later <= (PURE | READS_TABLES if room == "tables" else PURE)


def test_importing_the_package_imports_no_heavy_library() -> None:
    """`noiseproof --help` would take seconds, and a broken optional library would break it all."""
    code = "import noiseproof, sys, json; print(json.dumps(sorted(sys.modules)))"
    done = python("-W", "error", "-c", code)
    assert done.returncode == 0, done.stderr
    loaded = set(last_json(done.stdout))
    assert "noiseproof" in loaded
    assert not loaded & set(HEAVY)


def test_the_training_loop_needs_no_model_library_until_it_runs() -> None:
    """transformers, peft and accelerate are imported by the functions that need them."""
    code = (
        "import noiseproof.loop, noiseproof.methods, sys, json\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert not set(last_json(done.stdout)) & {"transformers", "peft", "accelerate", "datasets"}


def test_every_public_name_resolves() -> None:
    """A name that moved would raise only in the hands of the user who asks for it."""
    assert len(set(noiseproof.__all__)) == len(noiseproof.__all__)
    for name in noiseproof.__all__:
        assert getattr(noiseproof, name) is not None, name
    with pytest.raises(AttributeError, match="no_such_name"):
        noiseproof.no_such_name  # noqa: B018


def test_type_checkers_see_the_same_public_names_from_the_same_places() -> None:
    """The lazy table and the imports for type checkers are two lists: they must not drift apart."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if is_type_checking(node)]
    seen = {
        alias.asname or alias.name: str(node.module)
        for node in ast.walk(block)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    places = {name: f"noiseproof.{place}" for name, place in noiseproof._PLACES.items()}
    assert json.dumps(seen, sort_keys=True) == json.dumps(places, sort_keys=True)
    assert set(noiseproof.__all__) == {"__version__", *places}


def public_definitions(path: Path) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Public functions and classes of a file, and the public methods of those classes."""
    waiting: list[ast.AST] = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            waiting += node.body if isinstance(node, ast.ClassDef) else []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_public_functions_and_classes_have_docstrings(path: Path) -> None:
    """The docs and `noiseproof methods` are made of them; a missing one is an empty page."""
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path}: no docstring"
    overrides = {"forward"}  # documented by torch
    missing = [
        f"{node.name} (line {node.lineno})"
        for node in public_definitions(path)
        if not ast.get_docstring(node) and node.name not in overrides
    ]
    assert not missing, f"{path.relative_to(PACKAGE)}: no docstring: {', '.join(missing)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_is_unpickled_and_no_foreign_code_is_run(path: Path) -> None:
    """A run folder from a stranger must not be able to run code on loading."""
    source = path.read_text(encoding="utf-8")
    names = {name for name, _ in imports(path)}
    assert not {name.split(".")[0] for name in names} & {"pickle", "cPickle", "dill", "joblib"}
    for call in [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]:
        called = ast.unparse(call.func)
        assert called not in ("torch.load", "torch.save", "eval", "exec", "pd.read_pickle")
        for keyword in call.keywords:
            risky = keyword.arg in ("trust_remote_code", "allow_pickle")
            assert not (risky and ast.unparse(keyword.value) != "False"), f"{path}:{call.lineno}"
