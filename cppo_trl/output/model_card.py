"""What CPPO adds to TRL's model card: the rule, the run that made the model, its curves and its evaluation."""

import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import cppo_trl

CURVES = "curves.png"
_PACKAGES = {"Accelerate": "accelerate", "PEFT": "peft", "Math-Verify": "math-verify", "vLLM": "vllm"}


def command_line(argv: Sequence[str]) -> str:
    """The command of this process, without the value of any token."""
    return re.sub(r"(--\w*token[= ])\S+", r"\1***", shlex.join([Path(sys.executable).name, *argv]))


def complete_card(
    card: Path,
    *,
    rule: Mapping[str, str],
    base_model: str,
    datasets: Sequence[str],
    processes: int,
    command: str | None,
    evaluation_table: str | None,
    plain_prompt: str | None,
) -> None:
    """Add sections to a card written by TRL, and mend what it says of local models.

    Args:
        card: path of the card (``README.md``); curves beside it are shown.
        rule: rows of the rule's table, name to text.
        base_model: name on the Hub or a local path; empty for a model made in memory.
        datasets: names on the Hub or local paths.
        processes: processes that trained.
        command: what was run, or None where that is not known.
        evaluation_table: markdown, or None where nothing was evaluated.
        plain_prompt: an example where prompts are plain text, for the card's own example would chat.
    """
    text = card.read_text(encoding="utf-8")
    # TRL names a base model that is not on the Hub "None", with a link
    local = f"the local model `{base_model}`" if base_model else "a model made in memory"
    text = text.replace("a fine-tuned version of [None](https://huggingface.co/None)", f"fine-tuned from {local}")
    text = text.replace('model="None"', f'model="{card.parent}"')
    if plain_prompt is not None:
        text = re.sub(r'^question = ".*"$', lambda _: f"question = {plain_prompt!r}", text, flags=re.MULTILINE)
        text = text.replace('generator([{"role": "user", "content": question}]', "generator(question")
    run = {"base model": _link(base_model, "")} if base_model else {}
    if datasets:
        run["dataset"] = ", ".join(_link(name, "datasets/") for name in datasets)
    run["processes"] = str(processes)
    sections = [_section("Trust region", _table(rule)), _section("Run", _table(run))]
    if command:
        sections.append(f"```bash\n{command}\n```\n")
    if (card.parent / CURVES).exists():
        sections.append(_section("Training curves", f"![Training curves]({CURVES})"))
    if evaluation_table:
        sections.append(_section("Evaluation", evaluation_table.strip()))
    head, marker, tail = text.partition("### Framework versions\n\n")
    card.write_text("\n".join([head.rstrip() + "\n", *sections, marker + _versions() + tail]), encoding="utf-8")


def _section(title: str, body: str) -> str:
    return f"### {title}\n\n{body}\n"


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows.items())])


def _link(name: str, kind: str) -> str:
    return f"`{name}` (local)" if Path(name).exists() else f"[{name}](https://huggingface.co/{kind}{name})"


def _versions() -> str:
    rows = {"CPPO-TRL": cppo_trl.__version__, "Python": platform.python_version()}
    for name, package in _PACKAGES.items():
        try:
            rows[name] = version(package)
        except PackageNotFoundError:
            continue
    return "".join(f"- {name}: {text}\n" for name, text in rows.items())
