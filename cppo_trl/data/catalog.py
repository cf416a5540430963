"""The Hub datasets known by name, and which of their columns hold the problem and its gold answer."""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from cppo_trl.data.templates import TEMPLATES, strip_template
from cppo_trl.rewards.answers import extract_answer


@dataclass(frozen=True)
class Source:
    """A dataset on the Hub.

    Attributes:
        repo: Repository id.
        files: Glob of the files in the repository.
        license: As stated on the dataset card.
        columns: Where ``prompt``, ``solution`` and, if present, ``id``, ``subject`` and ``difficulty`` are found; a
            dot leads into a nested column.
        convert: For some of these keys, which of `CONVERSIONS` is applied to the value found there.
        evaluation: Whether the dataset must not be trained on.
        revision: Commit; None for the newest.
    """

    repo: str
    files: str
    license: str
    columns: Mapping[str, str]
    convert: Mapping[str, str] = field(default_factory=dict)
    evaluation: bool = False
    revision: str | None = None

    @property
    def download_command(self) -> str:
        """Shell command that downloads the files to the Hub cache."""
        revision = f" --revision {self.revision}" if self.revision else ""
        return f"hf download {self.repo} --repo-type dataset{revision} --include {shlex.quote(self.files)}"


def _behind_hashes(solution: str) -> str | None:
    _, mark, answer = solution.rpartition("####")
    return answer.strip().replace(",", "") if mark else None


def _level_number(level: str) -> float | None:
    number = level.removeprefix("Level ")  # two rows have "Level ?"
    return float(number) if number.isdigit() else None


CONVERSIONS: dict[str, Callable[[Any], Any]] = {
    "without_dapo_template": lambda messages: strip_template(TEMPLATES["dapo"], messages[-1]["content"]),
    "behind_hashes": _behind_hashes,
    "boxed": partial(extract_answer, sources=("boxed",)),
    "level_number": _level_number,
    "joined": lambda names: "; ".join(names or ()) or None,
    "failure_rate": lambda solve_rate: None if solve_rate is None else 1 - solve_rate,
    "without_leading_zeros": lambda answer: str(answer).lstrip("0") or "0",
}
"""Functions applied to a column's values, by the name that the catalog gives."""

SOURCES: dict[str, Source] = {
    name: Source(**entry) for name, entry in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text()).items()
}
