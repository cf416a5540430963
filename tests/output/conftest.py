"""The sections of a model card."""


def section(card, title):
    return card.text.split(f"### {title}\n")[1].split("\n### ")[0]
