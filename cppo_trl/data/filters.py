"""Reasons to drop a problem: each filter gives one entry per row, a reason or None.

Datasets have the columns of `cppo_trl.data.sources.FEATURES`.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm

from cppo_trl.rewards.audit import audit_golds

Reasons = list[str | None]
_FIGURE = re.compile(r"\[asy\].*?\[/asy\]", re.DOTALL)
_LAYOUT = re.compile(
    r"\\(?:(?:left|right|displaystyle|textstyle|limits|quad|qquad|text|textbf|textit|mathrm|mathbf|mbox|rm|bf)(?![a-zA-Z])"
    r"|(?=[dtc]frac)\w)"
)
_SHORTEST_QUOTE = 40  # letters and digits an evaluation problem needs to be looked for inside longer texts


def unusable_golds(data: Dataset) -> Reasons:
    """Find gold answers that the reward cannot read, or that do not earn their own reward."""
    findings = audit_golds(list(data["solution"])).findings
    found = dict(findings["unusable"] + findings["unequal"])
    return [found.get(row) for row in range(len(data))]


def overlong(data: Dataset, tokenizer: Any, max_tokens: int) -> Reasons:
    """Find prompts longer than ``max_tokens`` tokens, including chat template and generation prompt."""
    reasons: Reasons = []
    for batch in data.iter(1000):
        encoded = tokenizer.apply_chat_template(batch["prompt"], add_generation_prompt=True, return_dict=True)
        lengths = map(len, encoded["input_ids"])
        reasons += [f"{length} tokens" if length > max_tokens else None for length in lengths]
    return reasons


def overlap(data: Dataset, evaluation: Iterable[Dataset]) -> Reasons:
    """Find problems that equal or contain an evaluation problem, compared by `letters_and_digits`."""
    by_start: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for rows in evaluation:
        for problem, source, identifier in zip(rows["problem"], rows["source"], rows["id"], strict=True):
            text = letters_and_digits(problem)
            by_start[text[:_SHORTEST_QUOTE]].append((text, f"{source}/{identifier}"))
    problems = tqdm(data["problem"], desc="Looking for evaluation problems", unit="row")
    return [_first_match(letters_and_digits(problem), by_start) for problem in problems]


def letters_and_digits(text: str) -> str:
    r"""Return the letters and digits of a problem in lower case, without figures and LaTeX layout commands.

    ``$\dfrac{1}{2}$ of the Sum.`` and ``\(\frac12\) of the sum`` give the same string.
    """
    text = _LAYOUT.sub("", _FIGURE.sub("", unicodedata.normalize("NFKC", text)))
    return "".join(character for character in text.casefold() if character.isalnum())


def _first_match(text: str, by_start: dict[str, list[tuple[str, str]]]) -> str | None:
    for start in range(max(1, len(text) - _SHORTEST_QUOTE + 1)):
        for problem, name in by_start.get(text[start : start + _SHORTEST_QUOTE], ()):
            if text.startswith(problem, start):
                return f"{'is' if text == problem else 'contains'} {name}"
    return None
