"""Write docs/configuration.md and docs/cli.md from dataclasses, the table of rules and parsers: `make reference`."""

import argparse
import re
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from trl import GRPOConfig, ScriptArguments

from cppo_trl.config import CPPOConfig, TrustRegionConfig
from cppo_trl.data.prepare import PrepareArguments
from cppo_trl.evaluation.command import EvaluationArguments
from cppo_trl.fields import meanings
from cppo_trl.launch.plan import dry_run_parser
from cppo_trl.launch.training import CPPOScriptArguments
from cppo_trl.rules import RULES

DOCS = Path(__file__).parent.parent / "docs"
TEXT = """\
# Configuration

Fields are keys of a recipe's YAML and flags of the command line, which wins (`--cppo_delta 0.1`). In YAML, `null` is
None and `.inf` infinity.

## CPPOConfig

`CPPOConfig` is [`trl.GRPOConfig`](https://huggingface.co/docs/trl/grpo_trainer#trl.GRPOConfig) with the fields and
defaults below. A field `cppo_*` that the chosen rule does not read must keep its default; some of TRL's fields are
[refused](troubleshooting.md#refused-settings).
{added}
### Defaults that differ from TRL's
{changed}
### Defaults of each rule

`null` in `cppo_delta`, `cppo_delta_b`, `cppo_ratio_min` and `cppo_ratio_max` takes the rule's own value. A rule that
reads D_t takes every `cppo_divergence`, `drpo` only `binary_tv`; where the table has no `cppo_delta`, set one.
All rules except `minpro` and `cispo` also read `cppo_ratio_cap`.
{rules}"""
CLI = """\
# Command line

`cppo-trl`, or `python -m cppo_trl`, has six commands, each with `--help`. `--config` takes a file or the name of a
[recipe](recipes.md), and flags win over it. An unknown field or a setting that cannot work ends the command in one
line before a model is loaded.

```bash
cppo-trl recipes qwen3-1.7b/one-gpu > mine.yaml # a copy to change; without a name, the list
cppo-trl train --config mine.yaml
cppo-trl train --config qwen3-8b-base/paper-8k --accelerate_config fsdp2 --num_processes 8
```

## cppo-trl train

takes the fields of a recipe: those of [`CPPOConfig`](configuration.md), of TRL's `ScriptArguments`, `ModelConfig` and
`DatasetMixtureConfig` (`--help_all` lists them), and these.
{train}
It also takes the flags of `accelerate launch`, as `trl grpo` does: `--num_processes 2`, or `--accelerate_config` with
a file, a name of ours (`cppo-trl recipes`) or of TRL's. Without any, it trains in one process for each GPU.

Ctrl-C in a run of one process finishes the update and saves a checkpoint to
[resume](troubleshooting.md#a-run-was-interrupted) from; a second one stops at once, as the first does with several
processes.

## cppo-trl plan

takes what `train` takes, and prints what that [resolves to](recipes.md#the-dry-run), as `train --dry_run` does.
{dry_run}
## cppo-trl evaluate

See [evaluation.md](evaluation.md).
{evaluate}
## cppo-trl prepare-data

See [data.md](data.md).
{prepare}
## cppo-trl report

draws finished or running trainings as one page: `cppo-trl report RUN_DIR ... --output FILE.html`
([reports.md](reports.md)).
"""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [[re.sub(r"([|<])", r"\\\1", cell) for cell in row] for row in (head, *rows)]
    written = [f"| {' | '.join(line)} |\n" for line in lines]
    return "".join(["\n", written[0], f"|{'---|' * len(head)}\n", *written[1:]])


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


def helped(kind: type, skip: Iterable[str] = ()) -> str:
    """A table of a dataclass's fields with their meanings."""
    rows = [
        (code(f.name), default_of(f), f.metadata["help"].replace("%%", "%"))
        for f in fields(kind)
        if f.name not in skip
    ]
    return table(("field", "default", "meaning"), rows)


def parsed(parser: argparse.ArgumentParser) -> str:
    """A table of a parser's flags."""
    rows = [(code(a.option_strings[0]), a.help or "") for a in parser._actions if a.dest != "help"]
    return table(("flag", "meaning"), rows)


def config_tables() -> dict[str, str]:
    """The fields that `CPPOConfig` adds, and those whose default it changes."""
    inherited = {f.name: f for f in fields(GRPOConfig)}
    meaning = meanings(TrustRegionConfig) | meanings(CPPOConfig)
    added, changed = [], []
    for f in (f for f in fields(CPPOConfig) if f.name in meaning):
        if f.name in inherited:
            changed.append((code(f.name), default_of(f), default_of(inherited[f.name]), meaning[f.name]))
        else:
            added.append((code(f.name), default_of(f), meaning[f.name]))
    return {
        "added": table(("field", "default", "meaning"), added),
        "changed": table(("field", "default", "TRL's", "why"), changed),
    }


def rules_table() -> str:
    """What each rule reads, and its own defaults."""

    def own(values: Any) -> str:
        return ", ".join(code(f"cppo_{name}: {value:g}") for name, value in values.items())

    def others(rule: Any) -> str:
        stated = {*rule.tv_defaults, *rule.kl_defaults, "ratio_cap"}
        names = (name for name in rule.parameters if name not in stated)
        return ", ".join(code(f"cppo_{name}") for name in names)

    head = ("`trust_region`", "D_t by default", "own defaults", "own defaults with a KL", "also reads")
    names: dict[tuple[str, ...], list[str]] = {}
    for name, rule in RULES.items():
        cells = (code("".join(rule.estimators[:1])), own(rule.tv_defaults), own(rule.kl_defaults), others(rule))
        names.setdefault(cells, []).append(code(name))
    return table(head, [(", ".join(of), *cells) for cells, of in names.items()])


def reference() -> dict[str, str]:
    """The pages by name."""
    return {
        "configuration.md": TEXT.format(**config_tables(), rules=rules_table()),
        "cli.md": CLI.format(
            train=helped(CPPOScriptArguments, [f.name for f in fields(ScriptArguments)]),
            dry_run=parsed(dry_run_parser()),
            evaluate=helped(EvaluationArguments),
            prepare=helped(PrepareArguments),
        ),
    }


if __name__ == "__main__":
    for name, text in reference().items():
        (DOCS / name).write_text(text, encoding="utf-8")
