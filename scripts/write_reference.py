"""Write docs/configuration.md from the dataclasses, the table of rules and the parsers: `make reference`."""

import argparse
import inspect
import re
import runpy
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, get_type_hints

from trl import DatasetMixtureConfig, GRPOConfig, ModelConfig, ScriptArguments

from cppo_trl.config import RANGES, CPPOConfig
from cppo_trl.data.prepare import PrepareArguments
from cppo_trl.evaluation.command import EvaluationArguments
from cppo_trl.launch.plan import dry_run_parser
from cppo_trl.launch.training import CPPOScriptArguments
from cppo_trl.rules import ESTIMATORS, RULES

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/configuration.md"

HEAD = """\
# Configuration

Written by `make reference` from the code. Fields are keys of a recipe's YAML and flags of the command line, which
wins (`--cppo_delta 0.1`); in YAML, `null` is None and `.inf` infinity. A field that nobody knows is refused.
"""
OWN = """
## CPPOConfig

`CPPOConfig` is `trl.GRPOConfig` with the fields and defaults below. All other fields are inherited unchanged: see
[TRL's documentation](https://huggingface.co/docs/trl/grpo_trainer#trl.GRPOConfig). A field `cppo_*` that the chosen
rule does not read must stay at its default; [troubleshooting.md](troubleshooting.md#refused-settings) has what else is
refused.
"""
CHANGED = """
### Defaults that differ from TRL's
"""
OF_RULES = """
### Defaults of each rule

`null` in `cppo_delta`, `cppo_delta_b`, `cppo_ratio_min` and `cppo_ratio_max` takes the rule's own value, from its
paper where that gives one ([algorithm.md](algorithm.md#every-rule-is-a-weight)). Where a rule reads `cppo_delta` and
no value stands for the kind of divergence, it must be set.
"""
TRAIN = """
## scripts/train.py

A recipe, or the command line, holds the fields of `CPPOConfig` above and those that follow.
`scripts/quickstart.py` takes the same and those of its task.
"""
THEIRS = """
TRL's own, by class:
"""
DRY_RUN = """
### The dry run

`python scripts/train.py --dry_run --config FILE.yaml` says what a recipe comes to ([recipes.md](recipes.md)).
"""
TASK = """
### The quickstart's task
"""
EVALUATE = """
## scripts/evaluate.py

The defaults are the paper's protocol ([evaluation.md](evaluation.md)).
"""
PREPARE = """
## scripts/prepare_data.py

See [data.md](data.md).
"""
COMPARE = """
## scripts/compare.py

The study behind [results.md](results.md); its YAML files are in `configs/compare/`.
"""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *([re.sub(r"([|<])", r"\\\1", cell) for cell in row] for row in rows)]
    return "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def code(value: str) -> str:
    """As code; nothing for nothing."""
    return f"`{value}`" if value else ""


def yaml_value(value: Any) -> str:
    """A default as a recipe writes it."""
    if isinstance(value, list):
        return f"[{', '.join(map(yaml_value, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) or '""'


def default_of(field: Field) -> str:
    """The default of a dataclass's field."""
    if field.default_factory is not MISSING:
        return code(yaml_value(field.default_factory()))
    return "required" if field.default is MISSING else code(yaml_value(field.default))


def type_of(kind: type, field: Field) -> str:
    """The type of a dataclass's field, as written: a parser overwrites the field's own."""
    hint = get_type_hints(kind)[field.name]
    return code(hint.__name__ if type(hint) is type else str(hint).replace("typing.", ""))


def values_of(field: Field) -> str:
    """What a field may hold, where it is bounded."""
    parameter = field.name.removeprefix("cppo_")
    if parameter in RANGES:
        return RANGES[parameter][1]
    return ", ".join(map(code, field.metadata.get("choices", ())))


def listed(kind: type, pattern: str, indent: str) -> dict[str, str]:
    """Entries of a docstring, ``name: text`` with the lines that go on below it."""
    found = re.findall(rf"^{pattern}: (.*(?:\n{indent}.*)*)", inspect.getdoc(kind) or "", re.MULTILINE)
    return {name: " ".join(text.replace("``", "`").split()) for name, text in found}


def helped(kind: type, skip: Iterable[str] = ()) -> str:
    """A table of a dataclass's fields with the help of their flags."""
    rows = []
    for f in (f for f in fields(kind) if f.name not in skip):
        choices = values_of(f)
        meaning = f.metadata["help"] + (f" One of {choices}." if choices else "")
        rows.append((code(f.name), type_of(kind, f), default_of(f), meaning))
    return table(("field", "type", "default", "meaning"), rows)


def parsed(parser: argparse.ArgumentParser) -> str:
    """A table of a parser's flags."""
    rows = [
        (code(action.option_strings[0]), code(str(action.default or "")), action.help or "")
        for action in parser._actions
        if action.dest != "help"
    ]
    return table(("flag", "default", "meaning"), rows)


def config_tables() -> tuple[str, str]:
    """The fields that `CPPOConfig` adds, and those whose default it changes."""
    inherited = {f.name: f for f in fields(GRPOConfig)}
    meaning = listed(CPPOConfig, r"    (\w+)", " {5,}")
    reason = listed(CPPOConfig, r"\* ``(\w+)[^`]*``", "  ")
    added, changed = [], []
    for f in (f for f in fields(CPPOConfig) if f.name in CPPOConfig.__annotations__):
        start = (code(f.name), type_of(CPPOConfig, f), default_of(f))
        if f.name in inherited:
            changed.append((*start, default_of(inherited[f.name]), reason[f.name]))
        else:
            added.append((*start, values_of(f), meaning[f.name]))
    return (
        table(("field", "type", "default", "values", "meaning"), added),
        table(("field", "type", "default", "TRL's", "why"), changed),
    )


def rules_table() -> str:
    """What each rule reads, and its own defaults."""

    def own(values: Any) -> str:
        return ", ".join(code(f"cppo_{name}: {value:g}") for name, value in values.items())

    rows = []
    for name, rule in RULES.items():
        reads = ", ".join(code(f"cppo_{parameter}") for parameter in rule.parameters)
        kinds = "any: " if set(rule.estimators) == set(ESTIMATORS) else ""
        estimators = kinds + ", ".join(map(code, rule.estimators))
        rows.append((code(name), rule.source, reads, estimators, own(rule.tv_defaults), own(rule.kl_defaults)))
    head = (
        "`trust_region`",
        "source",
        "reads",
        "D_t, the default first",
        "own defaults (TV, or D_t unread)",
        "own defaults (KL)",
    )
    return table(head, rows)


def reference() -> str:
    """The page."""
    added, changed = config_tables()
    theirs = [f.name for f in fields(ScriptArguments)]
    names = {kind.__name__: [f.name for f in fields(kind)] for kind in (ModelConfig, DatasetMixtureConfig)}
    by_class = "\n" + "".join(
        f"- `trl.{kind}`: {', '.join(map(code, fields_of))}\n"
        for kind, fields_of in {"ScriptArguments": theirs, **names}.items()
    )
    task = runpy.run_path(str(ROOT / "scripts/quickstart.py"))["TaskArguments"]
    compare = runpy.run_path(str(ROOT / "scripts/compare.py"))["command_line"]()
    return "".join(
        [
            *(HEAD, OWN, added, CHANGED, changed, OF_RULES, rules_table()),
            *(TRAIN, helped(CPPOScriptArguments, theirs), THEIRS, by_class),
            *(DRY_RUN, parsed(dry_run_parser()), TASK, helped(task)),
            *(EVALUATE, helped(EvaluationArguments), PREPARE, helped(PrepareArguments), COMPARE, parsed(compare)),
        ]
    )


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
