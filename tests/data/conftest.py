"""Small files of every source with the columns of the real ones, in a Hub cache of their own."""

import json
from functools import partial

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cppo_trl.data.sources import SOURCES

DAPO_PROMPT = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)


def dapo_row(problem, gold, index):
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": DAPO_PROMPT.format(problem), "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": gold, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": index},
    }


def math_row(problem, level, subject, solution):
    return {"problem": problem, "level": level, "type": subject, "solution": solution}


def aime_row(number, problem, answer):
    return {
        "id": number,
        "problem": problem,
        "solution": "By inspection.",
        "answer": answer,
        "url": "",
        "year": "2024",
    }


# file in the repository -> its rows; AIME's problems are made up, for their licenses do not let them be copied
FILES = {
    "dapo-math-17k": {"data/dapo-math-17k.parquet": [dapo_row("What is $1+1$?", "2", "9a9b-1")] * 100
                      + [dapo_row("Find $x$ if $x^2=9$ and $x<0$.", "-3", "9a9b-2")] * 100},
    "gsm8k": {"main/train-00000-of-00001.parquet": [
        {"question": "How many seeds in 2 bags of 600?", "answer": "2*600=<<2*600=1200>>1200 seeds.\n#### 1,200"}]},
    "gsm8k-test": {"main/test-00000-of-00001.parquet": [
        {"question": "Tom owes $5. What has he?", "answer": "He has -5.\n#### -5"}]},
    "math": {
        "algebra/train-00000-of-00001.parquet": [
            math_row("Let $f$ be even.", "Level 5", "Algebra", r"First $\boxed{1}$, so $\boxed{\frac{1}{2}}$."),
            math_row("Sum?", "Level ?", "Algebra", "No box here.")],
        "geometry/train-00000-of-00001.parquet": [math_row("Area?", "Level 1", "Geometry", r"$\boxed{9\pi}$")],
        "geometry/test-00000-of-00001.parquet": [math_row("Not to be read", "Level 1", "Geometry", r"$\boxed{0}$")],
    },
    "deepmath-103k": {"data/train-00000-of-00002.parquet": [
        {"question": r"Evaluate \(\int_0^1 x\,dx\).", "final_answer": r"\dfrac{1}{2}", "difficulty": 5.5,
         "topic": "Mathematics -> Calculus", "r1_solution_1": "...", "r1_solution_2": "...", "r1_solution_3": "..."}],
                      "data/train-00001-of-00002.parquet": [
        {"question": "Is 7 prime?", "final_answer": "Yes", "difficulty": -1.0, "topic": "Mathematics",
         "r1_solution_1": "...", "r1_solution_2": "...", "r1_solution_3": "..."}]},
    "big-math": {"data/train-00000-of-00001.parquet": [
        {"problem": "Compute 3-4.", "answer": "-1", "source": "orca_math",
         "domain": ["Mathematics -> Algebra -> Prealgebra", "Mathematics -> Number Theory"],
         "llama8b_solve_rate": 0.75},
        {"problem": "Compute 3-5.", "answer": "-2", "source": "HARP", "domain": [], "llama8b_solve_rate": None}]},
    "math-500": {"test.jsonl": [
        {"problem": "Convert $(0,3)$.", "solution": r"$\boxed{(3,\frac{\pi}{2})}$", "answer": r"(3,\frac{\pi}{2})",
         "subject": "Precalculus", "level": 2, "unique_id": "test/precalculus/807.json"}]},
    "aime24": {"data/train-00000-of-00001.parquet": [aime_row(60, "Made up for 2024.", "073")]},
    "aime25": {"test.jsonl": [{"problem": "Made up for 2025.", "answer": "70", "id": "0"},
                              {"problem": "An angle.", "answer": r"336^\circ", "id": "1"}]},
    "aime26": {"data/train-00000-of-00001.parquet": [{"problem_idx": 1, "answer": 277, "problem": "Made up."}]},
}  # fmt: skip


def write_rows(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    """Empty caches of `datasets` and of the Hub; the directory of the latter."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put_in_cache(caches, name, files=None):
    """Put files of a source into a Hub cache as `hf download` does; by default those of `FILES`."""
    source = SOURCES[name]
    repository = caches / f"datasets--{source.repo.replace('/', '--')}"
    commit = source.revision or "c" * 40
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs/main").write_text(commit)
    for file, rows in (files or FILES[name]).items():
        write_rows(repository / "snapshots" / commit / file, rows)


@pytest.fixture
def cached(caches):
    """`put_in_cache` for the Hub cache of the test."""
    return partial(put_in_cache, caches)


@pytest.fixture
def hub(caches):
    """The Hub cache with all sources; its directory."""
    for name in SOURCES:
        put_in_cache(caches, name)
    return caches
