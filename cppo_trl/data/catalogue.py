"""The Hub datasets known by name, and which of their columns hold the problem and its gold answer."""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from cppo_trl.data.templates import TEMPLATES, Messages, strip_template
from cppo_trl.rewards.answers import extract_answer


@dataclass(frozen=True)
class Source:
    """A dataset on the Hub.

    Attributes:
        repo: Repository id.
        revision: Commit; None for the newest.
        files: Glob of the files in the repository.
        license: As stated on the dataset card.
        columns: Where ``prompt``, ``solution`` and, if present, ``id``, ``subject`` and ``difficulty`` are found; a
            dot leads into a nested column.
        convert: For some of these keys, a function applied to the value found there.
        evaluation: Whether the dataset must not be trained on.
    """

    repo: str
    revision: str | None
    files: str
    license: str
    columns: Mapping[str, str]
    convert: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    evaluation: bool = False

    @property
    def download_command(self) -> str:
        """Shell command that downloads the files to the Hub cache."""
        revision = f" --revision {self.revision}" if self.revision else ""
        return f"hf download {self.repo} --repo-type dataset{revision} --include {shlex.quote(self.files)}"


def _dapo_problem(messages: Messages) -> str:
    return strip_template(TEMPLATES["dapo"], messages[-1]["content"])


def _gsm8k_answer(solution: str) -> str | None:
    _, mark, answer = solution.rpartition("####")
    return answer.strip().replace(",", "") if mark else None


def _math_level(level: str) -> float | None:
    number = level.removeprefix("Level ")  # two rows have "Level ?"
    return float(number) if number.isdigit() else None


def _joined(names: list[str] | None) -> str | None:
    return "; ".join(names or ()) or None


def _failure_rate(solve_rate: float | None) -> float | None:
    return None if solve_rate is None else 1 - solve_rate


def _aime_answer(answer: str | int) -> str:
    text = str(answer)
    return str(int(text)) if text.isdigit() else text  # 073 -> 73


def _aime(repo: str, revision: str, files: str, license_name: str, identifier: str = "id") -> Source:
    columns = {"prompt": "problem", "solution": "answer", "id": identifier}
    return Source(repo, revision, files, license_name, columns, {"solution": _aime_answer}, evaluation=True)


_GSM8K = Source(
    "openai/gsm8k",
    "740312add88f781978c0658806c59bc2815b9866",
    "main/train-*.parquet",
    "MIT",
    {"prompt": "question", "solution": "answer"},
    {"solution": _gsm8k_answer},
)
SOURCES = {
    "dapo-math-17k": Source(
        "BytedTsinghua-SIA/DAPO-Math-17k",
        "65877096c24ffa7abc4e4fa5edb95cf3413a5674",
        "data/dapo-math-17k.parquet",
        "Apache-2.0",
        {"prompt": "prompt", "solution": "reward_model.ground_truth", "id": "extra_info.index"},
        {"prompt": _dapo_problem},
    ),
    "gsm8k": _GSM8K,
    "math": Source(
        "EleutherAI/hendrycks_math",
        "21a5633873b6a120296cce3e2df9d5550074f4a3",
        "*/train-*.parquet",
        "MIT",
        {"prompt": "problem", "solution": "solution", "subject": "type", "difficulty": "level"},
        {"solution": partial(extract_answer, sources=("boxed",)), "difficulty": _math_level},
    ),
    "deepmath-103k": Source(
        "zwhe99/DeepMath-103K",
        "5cf055d1fe3d7a2eb19719ac020211469736ae44",
        "data/train-*.parquet",
        "MIT",
        {"prompt": "question", "solution": "final_answer", "subject": "topic", "difficulty": "difficulty"},
    ),
    "big-math": Source(
        "SynthLabsAI/Big-Math-RL-Verified",
        None,
        "data/train-*.parquet",
        "Apache-2.0",
        {"prompt": "problem", "solution": "answer", "subject": "domain", "difficulty": "llama8b_solve_rate"},
        {"subject": _joined, "difficulty": _failure_rate},
    ),
    "gsm8k-test": replace(_GSM8K, files="main/test-*.parquet", evaluation=True),
    "math-500": Source(
        "HuggingFaceH4/MATH-500",
        "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
        "test.jsonl",
        "none stated",
        {"prompt": "problem", "solution": "answer", "id": "unique_id", "subject": "subject", "difficulty": "level"},
        evaluation=True,
    ),
    "aime24": _aime(
        "HuggingFaceH4/aime_2024", "2fe88a2f1091d5048c0f36abc874fb997b3dd99a", "data/train-*.parquet", "none stated"
    ),
    "aime25": _aime("math-ai/aime25", "563bb8404243c5f09de6ec262f2db674fe5bce9b", "test.jsonl", "Apache-2.0"),
    "aime26": _aime(
        "MathArena/aime_2026",
        "10b4e45b7a503075d4da8a0d57916a4f06ce6bd2",
        "data/train-*.parquet",
        "CC-BY-NC-SA-4.0",
        "problem_idx",
    ),
}
