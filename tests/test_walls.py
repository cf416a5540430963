"""Data flow one way: what each room may import, read off the source."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "cppo_trl"
FLOORS = [  # from the ground up; a module imports from its own room and from lower floors only
    {"trust_region", "divergence", "rewards", "fields"},
    {"rules", "data"},
    {"config", "metrics"},
    {"seam", "output"},
    {"evaluation", "report"},
    {"trainer"},
    {"asynchronous"},
    {"launch"},
    {"__main__"},
]


def imports():
    """Every module with the modules of the package that it imports, inside functions as well."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = ("cppo_trl", *path.relative_to(PACKAGE).with_suffix("").parts)
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        imported = found.setdefault(name, set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cppo_trl"):
                candidates = [f"{node.module}.{alias.name}" for alias in node.names]
                imported |= {c if is_module(c) else node.module for c in candidates}
            elif isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names if alias.name.startswith("cppo_trl")}
    return found


def is_module(name):
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


def room(module):
    return module.split(".")[1] if "." in module else "cppo_trl"


def test_no_import_runs_upward_or_in_a_circle():
    floor = {name: number for number, rooms in enumerate(FLOORS) for name in rooms}
    graph = imports()
    rooms = {room(module) for module in graph} - {"cppo_trl"}
    assert rooms == set(floor)
    upward = [
        (module, imported)
        for module, all_imported in graph.items()
        for imported in all_imported
        if "cppo_trl" not in (room(module), room(imported)) and room(module) != room(imported)
        if floor[room(imported)] >= floor[room(module)]
    ]
    assert upward == []
    graph.pop("cppo_trl")  # its exports are imported on first use
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_the_rules_and_estimators_import_torch_and_nothing_of_ours():
    graph = imports()
    assert graph["cppo_trl.trust_region"] == graph["cppo_trl.divergence"] == set()
    for name in ("trust_region", "divergence"):
        tree = ast.parse((PACKAGE / f"{name}.py").read_text())
        modules = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        modules |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        assert {m.split(".")[0] for m in modules} - set(sys.stdlib_module_names) == {"torch"}


@pytest.mark.parametrize("entry", ["cppo_trl.report.command", "cppo_trl.evaluation", "cppo_trl.rewards"])
def test_report_evaluation_and_rewards_never_import_the_trainer(entry):
    check = f"import sys, {entry}; assert 'cppo_trl.trainer' not in sys.modules"
    if entry == "cppo_trl.rewards":
        check += "; assert 'torch' not in sys.modules"  # the workers import it
    subprocess.run([sys.executable, "-c", check], check=True, cwd=PACKAGE.parent, timeout=120)


def test_the_root_holds_at_most_twelve_files():
    assert len([path for path in PACKAGE.iterdir() if path.is_file()]) <= 12


def test_no_function_is_longer_than_sixty_lines():
    long = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > 60:
                long.append((path.name, node.name))
    assert long == []
    assert len((PACKAGE / "trainer.py").read_text().splitlines()) <= 200
