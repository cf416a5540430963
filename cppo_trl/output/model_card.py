"""What CPPO adds to TRL's model card: the rule, the run that made the model, its curves, and callbacks' sections."""

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import ModelCard
from transformers import Trainer

from cppo_trl.output.run_files import command_line, loaded_from, versions

CURVES = "curves.png"


def complete_card(trainer: Trainer) -> None:
    """Complete the ``README.md`` that TRL has written to ``output_dir``; for the main process.

    Sections are added for the rule (``trainer.args.schedule()``), the run, the training data, the curves where
    ``curves.png`` is there, and those that callbacks return: a callback may have a method
    ``card_sections() -> dict[str, str]``, title to markdown. The license is that of the base model where its card is
    at hand.
    """
    path = Path(trainer.args.output_dir, "README.md")
    card = ModelCard.load(path)
    base_model = trainer.model.config._name_or_path
    card.data.license = _license(base_model)
    run = {"base model": link(base_model)} if base_model else {}
    run |= {"processes": str(trainer.accelerator.num_processes), "command": f"`{command_line(sys.argv)}`"}
    run["versions"] = ", ".join(f"{name} {text}" for name, text in versions().items())
    sections = {"Trust region": _table(trainer.args.schedule()), "Run": _table(run)}
    if names := loaded_from(trainer.train_dataset):
        sections["Training data"] = ", ".join(
            link(name, "datasets/") if "/" in name else f"`{name}`" for name in names
        )
    if (path.parent / CURVES).exists():
        sections["Training curves"] = f"![Training curves]({CURVES})"
    for callback in trainer.callback_handler.callbacks:
        if hasattr(callback, "card_sections"):
            sections |= callback.card_sections()
    added = "".join(f"### {title}\n\n{body.strip()}\n\n" for title, body in sections.items())
    text = _without_missing_names(card.text, base_model, path.parent, trainer.hub_model_id)
    prompt = next(iter(trainer.train_dataset)).get("prompt")
    if isinstance(prompt, str):  # the example would chat
        text = re.sub(r'^question = ".*"$', lambda _: f"question = {prompt!r}", text, flags=re.MULTILINE)
        text = text.replace('generator([{"role": "user", "content": question}]', "generator(question")
    card.text = text.replace("### Framework versions", f"{added}### Framework versions")
    card.save(path)


def link(name: str, kind: str = "") -> str:
    """A model's name, or with ``kind="datasets/"`` a dataset's, as markdown: a link to the Hub unless it is local."""
    return f"`{name}` (local)" if Path(name).exists() else f"[{name}](https://huggingface.co/{kind}{name})"


def _without_missing_names(text: str, base_model: str, output_dir: Path, hub_model_id: str | None) -> str:
    """TRL's text says None for a base model or a repository that is not on the Hub."""
    if not base_model or os.path.isdir(base_model):
        name = f"the local model `{base_model}`" if base_model else "a model made in memory"
        none = "a fine-tuned version of [None](https://huggingface.co/None)"
        text = text.replace(none, f"fine-tuned from {name}")
    return text if hub_model_id else text.replace('model="None"', f'model="{output_dir}"')


def _license(base_model: str) -> str | None:
    readme = Path(base_model, "README.md")
    if os.path.isdir(base_model) and not readme.is_file():  # else the Hub would be asked for a model of this name
        return None
    try:
        return ModelCard.load(readme if readme.is_file() else base_model).data.license
    except (OSError, ValueError):  # no card, no network, no such repository
        return None


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows.items())])
