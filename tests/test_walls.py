"""What may import what in the package, as docs/contributing.md says."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "cppo_trl"
PUBLIC = {"cppo_trl.CPPOConfig": "cppo_trl.config", "cppo_trl.CPPOTrainer": "cppo_trl.trainer"}


def imported_names(path):
    """Dotted names that a module imports anywhere, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def read_imports():
    """The modules of the package, each with those that it imports; the package itself stands for its public names."""
    modules = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        modules[name] = path
    del modules["cppo_trl"]
    return {
        name: {PUBLIC.get(found, found) for found in imported_names(path)} & modules.keys() - {name}
        for name, path in modules.items()
    }


IMPORTS = read_imports()


def room(module):
    return module.split(".")[1]


def reached(module):
    """All modules of the package that a module imports, directly or not."""
    found, todo = set(), [module]
    while todo:
        new = IMPORTS[todo.pop()] - found
        found |= new
        todo += new
    return found


def test_no_import_runs_in_a_circle_between_modules_or_rooms():
    rooms = {}
    for module, imports in IMPORTS.items():
        rooms.setdefault(room(module), set()).update({room(other) for other in imports} - {room(module)})
    for graph in (IMPORTS, rooms):
        assert len(list(TopologicalSorter(graph).static_order())) == len(graph)  # raises CycleError


@pytest.mark.parametrize("module", ["divergence", "trust_region"])
def test_rules_and_estimators_import_torch_and_nothing_of_ours(module):
    names = {name.partition(".")[0] for name in imported_names(PACKAGE / f"{module}.py")}
    assert names <= {"collections", "math", "typing", "torch"}


@pytest.mark.parametrize("folder", ["rewards", "data", "evaluation", "report"])
def test_what_works_without_the_trainer_never_imports_it(folder):
    modules = [module for module in IMPORTS if room(module) == folder]
    assert len(modules) > 3
    for module in modules:
        assert not {"trainer", "seam", "launch"} & {room(other) for other in reached(module)}, module
