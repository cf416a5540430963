"""The sets on the Hub that are known by name, and how their rows become problems with a gold answer."""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

from cppo_trl.data.templates import TEMPLATES, Messages, strip_template
from cppo_trl.rewards.answers import extract_answer

Row = Mapping[str, Any]


class Problem(TypedDict):
    """A row in the common form, before a template.

    Attributes:
        problem: Its text, or a conversation that ends with it.
        solution: The gold answer as `cppo_trl.rewards.accuracy_reward` takes it; None if the row has none.
        id: Names the row within its source.
        subject: The source's own words.
        difficulty: The source's own scale, higher is harder.
    """

    problem: str | Messages
    solution: str | None
    id: str
    subject: str | None
    difficulty: float | None


@dataclass(frozen=True)
class Source:
    """A set on the Hub.

    Attributes:
        repo: Name on the Hub.
        revision: Commit; None is the newest.
        files: Glob of the files within the repository.
        split: What the set's card calls these rows.
        columns: Columns that are read.
        read: From a raw row and its number to the common form.
        licence: As the card states it.
        caution: What to know before using it.
        gated: Whether the Hub asks for the acceptance of conditions first.
        evaluation: Whether it is meant for evaluation only.
    """

    repo: str
    revision: str | None
    files: str
    split: str
    columns: tuple[str, ...]
    read: Callable[[Row, int], Problem]
    licence: str
    caution: str = ""
    gated: bool = False
    evaluation: bool = False

    def fetch_command(self, directory: str) -> str:
        """Return the shell command that fetches the files into a directory."""
        revision = ["--revision", self.revision] if self.revision else []
        words = ["hf", "download", self.repo, "--repo-type", "dataset", *revision, "--include", self.files]
        return shlex.join([*words, "--local-dir", directory])


def _dapo(row: Row, index: int) -> Problem:
    return {
        "problem": strip_template(TEMPLATES["dapo"], row["prompt"][-1]["content"]),
        "solution": row["reward_model"]["ground_truth"],
        "id": str(row["extra_info"]["index"]),
        "subject": None,
        "difficulty": None,
    }


def _gsm8k(row: Row, index: int) -> Problem:
    _, mark, gold = row["answer"].rpartition("####")
    return {
        "problem": row["question"],
        "solution": gold.strip().replace(",", "") if mark else None,
        "id": str(index),
        "subject": None,
        "difficulty": None,
    }


def _math(row: Row, index: int) -> Problem:
    level = row["level"].removeprefix("Level ")  # two rows say "Level ?"
    return {
        "problem": row["problem"],
        "solution": extract_answer(row["solution"], ("boxed",)),
        "id": str(index),
        "subject": row["type"],
        "difficulty": float(level) if level.isdigit() else None,
    }


def _math_500(row: Row, index: int) -> Problem:
    return {
        "problem": row["problem"],
        "solution": row["answer"],
        "id": row["unique_id"],
        "subject": row["subject"],
        "difficulty": float(row["level"]),
    }


def _deepmath(row: Row, index: int) -> Problem:
    return {
        "problem": row["question"],
        "solution": row["final_answer"],
        "id": str(index),
        "subject": row["topic"],
        "difficulty": row["difficulty"],
    }


def _big_math(row: Row, index: int) -> Problem:
    solved = row["llama8b_solve_rate"]
    return {
        "problem": row["problem"],
        "solution": row["answer"],
        "id": f"{row['source']}/{index}",
        "subject": "; ".join(row["domain"] or ()) or None,
        "difficulty": None if solved is None else 1 - solved,
    }


def _aime(row: Row, index: int) -> Problem:
    answer = str(row["answer"])
    return {
        "problem": row["problem"],
        "solution": str(int(answer)) if answer.isdigit() else answer,  # 073 is 73
        "id": str(row["id"] if "id" in row else row["problem_idx"]),
        "subject": None,
        "difficulty": None,
    }


_NOT_TO_TRAIN_ON = "for evaluation only"
SOURCES = {
    "dapo-math-17k": Source(
        repo="BytedTsinghua-SIA/DAPO-Math-17k",
        revision="65877096c24ffa7abc4e4fa5edb95cf3413a5674",
        files="data/dapo-math-17k.parquet",
        split="train",
        columns=("prompt", "reward_model", "extra_info"),
        read=_dapo,
        licence="Apache-2.0",
        caution="every row stands a hundred times in the file; a fifth of the problems are Chinese",
    ),
    "gsm8k": Source(
        repo="openai/gsm8k",
        revision="740312add88f781978c0658806c59bc2815b9866",
        files="main/train-*.parquet",
        split="train",
        columns=("question", "answer"),
        read=_gsm8k,
        licence="MIT",
    ),
    "math": Source(
        repo="EleutherAI/hendrycks_math",
        revision="21a5633873b6a120296cce3e2df9d5550074f4a3",
        files="*/train-*.parquet",
        split="train",
        columns=("problem", "level", "type", "solution"),
        read=_math,
        licence="MIT",
        caution="seven subjects in as many folders; the test rows, of which MATH-500 is a part, are not read",
    ),
    "deepmath-103k": Source(
        repo="zwhe99/DeepMath-103K",
        revision="5cf055d1fe3d7a2eb19719ac020211469736ae44",
        files="data/train-*.parquet",
        split="train",
        columns=("question", "final_answer", "difficulty", "topic"),
        read=_deepmath,
        licence="MIT",
        caution="2.1 GB to download, for it holds three worked answers a row, which are not read",
    ),
    "big-math": Source(
        repo="SynthLabsAI/Big-Math-RL-Verified",
        revision=None,
        files="data/train-*.parquet",
        split="train",
        columns=("problem", "answer", "source", "domain", "llama8b_solve_rate"),
        read=_big_math,
        licence="Apache-2.0",
        caution="repeats and wrong answers are reported; holds rows of GSM8K and MATH",
        gated=True,
    ),
    "gsm8k-test": Source(
        repo="openai/gsm8k",
        revision="740312add88f781978c0658806c59bc2815b9866",
        files="main/test-*.parquet",
        split="test",
        columns=("question", "answer"),
        read=_gsm8k,
        licence="MIT",
        caution=_NOT_TO_TRAIN_ON,
        evaluation=True,
    ),
    "math-500": Source(
        repo="HuggingFaceH4/MATH-500",
        revision="6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
        files="test.jsonl",
        split="test",
        columns=("problem", "answer", "subject", "level", "unique_id"),
        read=_math_500,
        licence="none stated",
        caution=_NOT_TO_TRAIN_ON,
        evaluation=True,
    ),
    "aime24": Source(
        repo="HuggingFaceH4/aime_2024",
        revision="2fe88a2f1091d5048c0f36abc874fb997b3dd99a",
        files="data/train-*.parquet",
        split="train",
        columns=("id", "problem", "answer"),
        read=_aime,
        licence="none stated",
        caution=_NOT_TO_TRAIN_ON,
        evaluation=True,
    ),
    "aime25": Source(
        repo="math-ai/aime25",
        revision="563bb8404243c5f09de6ec262f2db674fe5bce9b",
        files="test.jsonl",
        split="test",
        columns=("id", "problem", "answer"),
        read=_aime,
        licence="Apache-2.0",
        caution=_NOT_TO_TRAIN_ON,
        evaluation=True,
    ),
    "aime26": Source(
        repo="MathArena/aime_2026",
        revision="10b4e45b7a503075d4da8a0d57916a4f06ce6bd2",
        files="data/train-*.parquet",
        split="train",
        columns=("problem_idx", "problem", "answer"),
        read=_aime,
        licence="CC-BY-NC-SA-4.0",
        caution=f"not for commercial use; {_NOT_TO_TRAIN_ON}",
        evaluation=True,
    ),
}
