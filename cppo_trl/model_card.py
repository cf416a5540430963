"""The sections that CPPO adds to TRL's model card."""

import re
from pathlib import Path


def append_sections(
    card: Path, rule: dict[str, str], evaluation_table: str | None, plain_prompt: str | None = None
) -> None:
    """Append the rule's numbers and an evaluation table to a card written by TRL.

    Args:
        card: path of the card (``README.md``).
        rule: rows of the rule's table, name to text.
        evaluation_table: markdown, or None where nothing was evaluated.
        plain_prompt: an example where prompts are plain text, for the card's own example would chat.
    """
    text = card.read_text(encoding="utf-8")
    # TRL names a base model that is not on the Hub "None", with a link
    text = text.replace("a fine-tuned version of [None](https://huggingface.co/None)", "fine-tuned from a local model")
    text = text.replace('model="None"', f'model="{card.parent}"')
    if plain_prompt is not None:
        text = re.sub(r'^question = ".*"$', lambda _: f"question = {plain_prompt!r}", text, flags=re.MULTILINE)
        text = text.replace('generator([{"role": "user", "content": question}]', "generator(question")
    sections = [
        "",
        "### Trust region",
        "",
        "| | |",
        "|---|---|",
        *(f"| {k} | {v} |" for k, v in rule.items()),
        "",
    ]
    if evaluation_table:
        sections += ["### Evaluation", "", evaluation_table.strip(), ""]
    head, marker, tail = text.partition("### Framework versions")
    card.write_text(head.rstrip() + "\n" + "\n".join(sections) + "\n" + marker + tail, encoding="utf-8")
