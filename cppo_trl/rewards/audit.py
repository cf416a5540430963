"""Look at a dataset's golds before a training run depends on them."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm.auto import trange

from cppo_trl.rewards.answers import extract_gold
from cppo_trl.rewards.checker import Outcome
from cppo_trl.rewards.math import AccuracyReward, compare_answers, completion_text
from cppo_trl.rewards.reading import read

GOLD_COLUMNS = ("solution", "answer", "final_answer", "ground_truth", "reward_model.ground_truth")
PROMPT_COLUMNS = ("prompt", "question", "problem")
FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
MEANINGS = {
    "unusable": "no answer earns anything: the gold cannot be read, or has no value",
    "unequal": "the gold, boxed, does not earn its own reward",
    "indiscriminate": "a changed gold earns the reward",
    "verbatim": "only the same text earns the reward",
    "ambiguous": "may be read in another way",
    "duplicates": "the prompt stands in an earlier row",
    "conflicts": "the prompt stands in an earlier row, with another gold",
}
_PART = 1000  # golds between two steps of the progress bar
_AMBIGUOUS = {
    "a point or an open interval": r"\(-?[\d.]+,\s*-?[\d.]+\)",
    "a number or a list": r"[1-9]\d\d,\d{3}",
    "a decimal comma or a list": r"-?(?:0|\d{4,}),\d+|-?\d+,(?!\d{3}\b)\d+",
    "a ratio or a time": r"\d{1,2}:\d{2}",
    "a number in another base": r"\d+_\{?\d+\}?",
}


@dataclass
class Audit:
    """What was found: for each kind of finding in `MEANINGS`, a list of (row number, explanation).

    Attributes:
        rows: Number of rows looked at.
        findings: The lists, by kind.
    """

    rows: int = 0
    findings: dict[str, list[tuple[int, str]]] = field(default_factory=lambda: {name: [] for name in MEANINGS})

    def report(self, examples: int = 3) -> str:
        """Return a table of the counts with a few examples each."""
        lines = [f"{self.rows} rows"]
        for name, found in self.findings.items():
            lines.append(f"{name:<14}{len(found):>8}{len(found) / max(self.rows, 1):>9.2%}  {MEANINGS[name]}")
            lines += [f"    row {row}: {text[:160]}" for row, text in found[:examples]]
        return "\n".join(lines)


def audit_golds(golds: Sequence[Any], prompts: Sequence[Any] | None = None) -> Audit:
    """Check golds and, where given, prompts.

    Args:
        golds: As a dataset holds them.
        prompts: Strings or lists of messages, one for each gold.
    """
    audit = Audit(rows=len(golds))
    found = audit.findings
    texts = [extract_gold(gold) for gold in golds]
    boxed, own = [rf"\boxed{{{text}}}" for text in texts], list[Outcome]()
    for start in trange(0, len(golds), _PART, desc="Checking gold answers"):
        own += AccuracyReward().grade(boxed[start : start + _PART], golds[start : start + _PART])
    changed = compare_answers(texts, [_changed(text or "") for text in texts])
    for row, (text, itself, other) in enumerate(zip(texts, own, changed, strict=True)):
        if text is None or "unparseable_gold" in (itself.why, other.why):
            found["unusable"].append((row, f"unparseable_gold: {golds[row]!r}"))
            continue
        if itself.why != "equal":
            found["unequal"].append((row, f"{itself.why}: {text}"))
        if other.why == "equal":
            found["indiscriminate"].append((row, f"{text}, by {_changed(text)}"))
        if isinstance(read(text)[0], str) and re.search(r"\d|\\|(?:\S+\s+){3}", text):
            found["verbatim"].append((row, text))
        reasons = [reason for reason, pattern in _AMBIGUOUS.items() if re.fullmatch(pattern, text.strip("$"))]
        if "; " in text and text not in str(golds[row]):
            reasons.append("several boxes, all of which count")
        found["ambiguous"] += [(row, f"{reason}: {text}") for reason in reasons]
    first: dict[str, int] = {}
    again = []
    for row, prompt in enumerate(prompts or ()):
        key = " ".join(completion_text(prompt).split())
        if (before := first.setdefault(key, row)) != row:
            again.append((row, before))
            found["duplicates"].append((row, f"as row {before}: {key!r}"))
    outcomes = compare_answers([texts[before] for _, before in again], [texts[row] for row, _ in again])
    for (row, before), outcome in zip(again, outcomes, strict=True):
        if outcome.why not in ("equal", "unparseable_gold"):
            found["conflicts"].append((row, f"{texts[row]}, but {texts[before]} in row {before}"))
    return audit


def _changed(text: str) -> str:
    """Return a gold with another last digit; words that are nobody's gold if it has no digit."""
    head, digit, tail = re.fullmatch(r"(?s)(.*?)([0-9]?)([^0-9]*)", text).groups()  # type: ignore[union-attr]
    return f"{head}{(int(digit) + 5) % 10}{tail}" if digit else "none of these words"


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
    rows = rows.flatten()  # a nested column is then named with dots
    columns = []
    for name, guesses, what in ((gold_column, GOLD_COLUMNS, "gold"), (prompt_column, PROMPT_COLUMNS, "prompt")):
        found = [column for column in ([name] if name else guesses) if column in rows.column_names]
        if not found and (name or what == "gold"):
            wanted = name or " or ".join(guesses)
            raise ValueError(f"no column {wanted} among {', '.join(rows.column_names)}; set --{what}-column")
        columns.append(list(rows[found[0]]) if found else None)
    return columns[0] or [], columns[1]
