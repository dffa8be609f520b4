"""Imports go one way: from the command line down to the equations, never up, and never in a circle."""

import ast
import re
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "peft_bts"
FLOORS = [  # from low to high; what stands on one floor may import from it and from those below
    {"_compat", "config", "reference", "places", "stitch", "mixture", "keys", "formatting", "modules"}
    | {"install", "toy"},
    {"forward"},
    {"distributed"},
    {"experts"},
    {"inference", "export", "planning"},
    {"tuner"},
    {"model"},
    {"gates", "sharing", "serving"},
    {"demo"},
    {"recipes"},
    {"__init__"},
    {"peft_bts_cli"},  # a package of its own
    {"__main__"},
]


def files_of(package):
    """The files of a package by the names of their modules."""
    return {
        ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in package.rglob("*.py")
    }


FILES = files_of(PACKAGE) | files_of(ROOT / "peft_bts_cli")


def imports(module, files=FILES):
    """Modules of a package that a module imports anywhere, also inside of functions and for type checkers only."""
    package = module if files[module].name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(files[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = resolve_name("." * node.level + (node.module or ""), package)
            names = {f"{source}.{alias.name}" for alias in node.names}
            found |= {name if name in files else source for name in names}
    return found & files.keys()


def floor(module):
    package, *rooms = module.split(".")
    room = package if package != PACKAGE.name else (rooms or ["__init__"])[0]
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


@pytest.mark.parametrize("module", sorted(FILES))
def test_no_import_from_a_higher_floor(module):
    assert {above for above in imports(module) if floor(above) > floor(module)} == set()


def test_no_circle():
    graph = {module: imports(module) for module in FILES}
    assert {"peft_bts.stitch", "peft_bts.forward.layer", "peft_bts._compat.bitsandbytes"} <= graph["peft_bts.tuner"]
    TopologicalSorter(graph).prepare()  # raises CycleError, with the modules of the circle


def test_no_circle_among_benchmarks():
    files = files_of(PACKAGE.parent / "benchmarks")
    graph = {module: imports(module, files) for module in files}
    assert "benchmarks.replication.text.building" in graph["benchmarks.replication.text.loading"]
    TopologicalSorter(graph).prepare()


REPLICATION = ["text", "tokens", "measures", "branching", "methods", "work", "reporting"]  # from low to high


def test_the_replications_packages_import_from_lower_ones():
    prefix, files = "benchmarks.replication.", files_of(ROOT / "benchmarks")
    for module in files:
        if module.startswith(prefix) and not module.endswith("__main__"):
            own = REPLICATION.index(module.removeprefix(prefix).partition(".")[0])
            inner = [name.removeprefix(prefix) for name in imports(module, files) if name.startswith(prefix)]
            assert not [name for name in inner if REPLICATION.index(name.partition(".")[0]) > own], module


def test_every_module_has_its_tests():
    """The table in CONTRIBUTING.md names every module of the package, and test files that exist."""
    page = (ROOT / "CONTRIBUTING.md").read_text().partition("## Which tests guard what")[2]
    table = re.findall(r"^\| (`.*) \| (`.*) \|$", page.partition("\n## ")[0], re.MULTILINE)[1:]
    modules, tests = (re.findall(r"`([^`]+)`", " ".join(cells)) for cells in zip(*table))
    there = [path.relative_to(ROOT) for path in FILES.values() if not path.name.startswith("__")]
    there = [str(path).removeprefix("peft_bts/") for path in there]
    assert sorted(modules) == sorted(there)
    assert not [name for name in tests if not (ROOT / "tests" / name).exists()]
