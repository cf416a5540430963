"""Look at a dataset's golds before a training run depends on them."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cppo_trl.rewards.answers import extract_gold
from cppo_trl.rewards.math import AccuracyReward, completion_text

GOLD_COLUMNS = ("solution", "answer", "final_answer", "ground_truth", "reward_model.ground_truth")
PROMPT_COLUMNS = ("prompt", "question", "problem")
FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_BOX = re.compile(r"\\boxed\s*\{([^{}]*)\}")
_AMBIGUOUS = {
    "a point or an open interval": r"\(-?[\d.]+,\s*-?[\d.]+\)",
    "a number or a list": r"[1-9]\d\d,\d{3}",
    "a ratio or a time": r"\d{1,2}:\d{2}",
}


@dataclass
class Audit:
    """What was found: for each kind of finding, a list of (row number, explanation).

    Attributes:
        rows: Number of rows looked at.
        findings: Keys ``unusable`` (the reward would be None), ``unequal`` (boxed, the gold does not earn its own
            reward), ``ambiguous``, ``duplicates`` (prompts seen before), ``conflicts`` (golds of one prompt differ).
    """

    rows: int = 0
    findings: dict[str, list[tuple[int, str]]] = field(
        default_factory=lambda: {name: [] for name in ("unusable", "unequal", "ambiguous", "duplicates", "conflicts")}
    )

    def report(self, examples: int = 3) -> str:
        """Return a table of the counts with a few examples each."""
        lines = [f"{self.rows} rows"]
        for name, found in self.findings.items():
            lines.append(f"{name:<12}{len(found):>8}{len(found) / max(self.rows, 1):>9.2%}")
            lines += [f"    row {row}: {text[:160]}" for row, text in found[:examples]]
        return "\n".join(lines)


def audit_golds(
    golds: Sequence[Any], prompts: Sequence[Any] | None = None, progress: Callable[[int], object] | None = None
) -> Audit:
    """Check golds and, where given, prompts.

    Args:
        golds: As a dataset holds them.
        prompts: Strings or lists of messages, one for each gold.
        progress: Called with the number of golds checked since the last call.
    """
    audit = Audit(rows=len(golds))
    found = audit.findings
    reward = AccuracyReward()
    texts = [extract_gold(gold) or "" for gold in golds]
    boxed = [rf"\boxed{{{text}}}" for text in texts]
    outcomes = reward.grade(boxed, golds, progress)
    for row, (text, outcome) in enumerate(zip(texts, outcomes, strict=True)):
        if reward.reward(outcome) is None:
            found["unusable"].append((row, f"{outcome.why}: {golds[row]!r}"))
            continue
        if outcome.why != "equal":
            found["unequal"].append((row, f"{outcome.why}: {text}"))
        reasons = [reason for reason, pattern in _AMBIGUOUS.items() if re.fullmatch(pattern, text)]
        if len(set(_BOX.findall(str(golds[row])))) > 1:
            reasons.append("several boxes, of which the last counts")
        found["ambiguous"] += [(row, f"{reason}: {text}") for reason in reasons]
    first: dict[str, int] = {}
    again: list[tuple[int, int]] = []
    for row, prompt in enumerate(prompts or ()):
        key = " ".join(completion_text(prompt).split())
        if key in first:
            again.append((row, first[key]))
            found["duplicates"].append((row, f"as row {first[key]}: {key!r}"))
        first.setdefault(key, row)
    outcomes = reward.grade([boxed[row] for row, _ in again], [golds[before] for _, before in again])
    for (row, before), outcome in zip(again, outcomes, strict=True):
        if reward.reward(outcome) is not None and outcome.why != "equal":
            found["conflicts"].append((row, f"{texts[row]}, but {texts[before]} in row {before}"))
    return audit


def load_columns(
    dataset: str, config: str | None, split: str, gold_column: str | None, prompt_column: str | None
) -> tuple[list[Any], list[Any] | None]:
    """Return the golds and the prompts (None without such a column) of a local file or of a dataset on the Hub.

    Raises:
        ValueError: If the file's kind is not known, or there is no such column.
    """
    from datasets import load_dataset  # noqa: PLC0415  (slow to import)

    if os.path.exists(dataset):
        kind = FORMATS.get(os.path.splitext(dataset)[1])
        if kind is None:
            raise ValueError(f"dataset {dataset!r} is none of {', '.join(FORMATS)}")
        rows = load_dataset(kind, data_files=dataset, split="train")
    else:
        rows = load_dataset(dataset, config, split=split)
    return (
        _column(rows, gold_column, GOLD_COLUMNS, "gold") or [],
        _column(rows, prompt_column, PROMPT_COLUMNS, "prompt", needed=prompt_column is not None),
    )


def _column(rows: Any, name: str | None, guesses: Sequence[str], what: str, needed: bool = True) -> list[Any] | None:
    for path in (name,) if name else guesses:
        head, *keys = path.split(".")
        if head in rows.column_names:
            values = list(rows[head])
            for key in keys:
                values = [value.get(key) if isinstance(value, Mapping) else None for value in values]
            return values
    if needed:
        wanted = name or " or ".join(guesses)
        raise ValueError(f"no column {wanted} among {', '.join(rows.column_names)}; set --{what}-column")
    return None
