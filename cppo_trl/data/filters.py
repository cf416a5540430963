"""Why a problem should not be trained on: each filter gives every row of a dataset a reason, or None to keep it.

Datasets are in the form of `cppo_trl.data.sources.FEATURES`.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from datasets import Dataset, Features, Value, concatenate_datasets

from cppo_trl.data.sources import CODE, squeeze
from cppo_trl.rewards.audit import audit_golds

Reasons = list[str | None]
_ROWS_PER_PART = 10_000  # of which an interrupted run repeats at most one
_FIGURE = re.compile(r"\[asy\].*?\[/asy\]", re.DOTALL)
_LAYOUT = re.compile(
    r"\\(?:(?:left|right|displaystyle|textstyle|limits|quad|qquad|text|textbf|textit|mathrm|mathbf|mbox|rm|bf)(?![a-zA-Z])"
    r"|(?=[dtc]frac)\w)"
)
_SHORTEST_QUOTE = 40  # letters and digits of an evaluation problem that is looked for inside a longer text


def unusable_golds(data: Dataset) -> Reasons:
    """Find golds that the reward cannot read, or that do not earn their own reward; by `cppo_trl.rewards.audit`."""

    def check(batch: dict[str, list[Any]]) -> Reasons:
        findings = audit_golds(batch["solution"]).findings
        found = dict(findings["unusable"] + findings["unequal"])
        return [found.get(row) for row in range(len(batch["solution"]))]

    return _by_batch(data, check, "Checking golds")


def conflicts(data: Dataset) -> Reasons:
    """Find problems that stand in the data with golds that are not equal: all their rows, as none is known right."""
    groups = [group for group in _same_problem(data) if len(group) > 1]
    group_of = {row: group for group in groups for row in group}
    rows = list(group_of)
    pairs = data.select(rows)
    reasons: Reasons = [None] * len(data)
    for place, text in audit_golds(pairs["solution"], pairs["problem"]).findings["conflicts"]:
        for row in group_of[rows[place]]:
            reasons[row] = text.partition(" in row ")[0]
    return reasons


def repeats(data: Dataset) -> Reasons:
    """Find problems that stand in the data before."""
    reasons: Reasons = [None] * len(data)
    for first, *others in _same_problem(data):
        for row in others:
            reasons[row] = f"as {data[first]['source']}/{data[first]['id']}"
    return reasons


def _same_problem(data: Dataset) -> list[list[int]]:
    """Return the rows of each problem, white space aside."""
    groups: dict[str, list[int]] = defaultdict(list)
    for row, problem in enumerate(data["problem"]):
        groups[squeeze(problem)].append(row)
    return list(groups.values())


def overlong(data: Dataset, tokenizer: Any, max_tokens: int) -> Reasons:
    """Find prompts of more than ``max_tokens`` tokens, chat template and generation prompt included."""

    def check(batch: dict[str, list[Any]]) -> Reasons:
        encoded = tokenizer.apply_chat_template(batch["prompt"], add_generation_prompt=True, return_dict=True)
        lengths = map(len, encoded["input_ids"])
        return [f"{length} tokens" if length > max_tokens else None for length in lengths]

    return _by_batch(data, check, "Counting tokens")


def overlap(data: Dataset, evaluation: Iterable[Dataset]) -> Reasons:
    """Find problems that are, or contain, one of the evaluation problems, by their normalised texts."""
    sought: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for rows in evaluation:
        for problem, source, name in zip(rows["problem"], rows["source"], rows["id"], strict=True):
            text = normalise(problem)
            sought[text[:_SHORTEST_QUOTE]].append((text, f"{source}/{name}"))

    def check(batch: dict[str, list[Any]]) -> Reasons:
        return [_first_match(normalise(problem), sought) for problem in batch["problem"]]

    return _by_batch(data, check, "Looking for evaluation problems")


def normalise(text: str) -> str:
    r"""Return the letters and digits of a problem in lower case, without figures and LaTeX's layout commands.

    So that ``$\dfrac{1}{2}$ of the Sum.`` and ``\(\frac12\) of the sum`` are the same.
    """
    text = _LAYOUT.sub("", _FIGURE.sub("", unicodedata.normalize("NFKC", text)))
    return "".join(character for character in text.casefold() if character.isalnum())


def _first_match(text: str, sought: dict[str, list[tuple[str, str]]]) -> str | None:
    for whole, name in sought.get(text[:_SHORTEST_QUOTE], ()):
        if text == whole:
            return f"is {name}"
    for start in range(len(text) - _SHORTEST_QUOTE + 1):
        for whole, name in sought.get(text[start : start + _SHORTEST_QUOTE], ()):
            if text.startswith(whole, start):
                return f"contains {name}"
    return None


def _by_batch(data: Dataset, check: Callable[[dict[str, list[Any]]], Reasons], doing: str) -> Reasons:
    """Return ``check`` of all batches. Finished parts stay in the cache of `datasets`."""
    if not len(data):
        return []
    parts = [
        data.select(range(start, min(start + _ROWS_PER_PART, len(data)))).map(
            _check_batch,
            batched=True,
            remove_columns=data.column_names,
            features=Features({"reason": Value("string")}),
            fn_kwargs={"check": check, "code": CODE},
            desc=doing,
        )
        for start in range(0, len(data), _ROWS_PER_PART)
    ]
    return list(concatenate_datasets(parts)["reason"])


def _check_batch(
    batch: dict[str, list[Any]], check: Callable[[dict[str, list[Any]]], Reasons], code: str
) -> dict[str, Reasons]:
    return {"reason": check(batch)}
