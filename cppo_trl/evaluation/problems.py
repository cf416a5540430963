"""Problems to evaluate on: named benchmarks, local files, datasets."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from cppo_trl.data.sources import FORMATS, load_local, load_source, read_rows

Prompt = str | list[dict[str, Any]]
AIME = ("aime24", "aime25", "aime26")
BENCHMARKS = (*AIME, "math-500", "gsm8k-test")


@dataclass(frozen=True)
class Problem:
    """A prompt, plain text or a conversation, and its gold answer; ``id`` is unique within the benchmark."""

    benchmark: str
    id: str
    prompt: Prompt
    solution: Any


def problems_of(name: str, dataset: Dataset) -> list[Problem]:
    """Turn the rows of a dataset into problems of the benchmark ``name``.

    Args:
        name: Name of the benchmark.
        dataset: Columns ``prompt``, ``solution`` and, optionally, ``id``.

    Raises:
        ValueError: If a column is missing, the dataset is empty, or two rows have the same id.
    """
    columns = dataset.column_names
    if missing := [column for column in ("prompt", "solution") if column not in columns]:
        raise ValueError(f"{name}: no column {' or '.join(missing)}; it has {', '.join(columns)}.")
    problems = [
        Problem(name, str(row.get("id", number)), row["prompt"], row["solution"]) for number, row in enumerate(dataset)
    ]
    if not problems:
        raise ValueError(f"{name}: it has no rows.")
    if len({problem.id for problem in problems}) < len(problems):
        raise ValueError(f"{name}: several rows have the same id; make ids unique, or drop the column.")
    return problems


def check_benchmarks(benchmarks: Sequence[str]) -> list[str]:
    """Check names and files without reading any; return the name of each benchmark.

    Raises:
        ValueError: If none is given, a name is unknown, a file is missing, or two benchmarks have the same name.
    """
    names = [Path(benchmark).stem if _is_file_name(benchmark) else benchmark for benchmark in benchmarks]
    if not names or len({*names, "mean"}) <= len(names):
        raise ValueError(f"benchmarks must name at least one, each once and none 'mean'; got {list(benchmarks)}.")
    for benchmark in benchmarks:
        if _is_file_name(benchmark) and not Path(benchmark).is_file():
            raise ValueError(f"benchmarks: there is no file {benchmark!r}.")
        if not _is_file_name(benchmark) and benchmark not in BENCHMARKS:
            kinds = ", ".join(FORMATS)
            raise ValueError(f"benchmarks: {benchmark!r} is none of {', '.join(BENCHMARKS)} and no {kinds} file.")
    return names


def load_problems(benchmarks: Sequence[str], template: str | None = None) -> list[Problem]:
    """Load the problems of named benchmarks and local files.

    Args:
        benchmarks: Names out of `BENCHMARKS`, or ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` files with the
            columns that `problems_of` takes; a file's stem is the name of its benchmark.
        template: Key of `cppo_trl.data.templates.TEMPLATES`. Defaults to ``boxed`` for named benchmarks; the prompts
            of files are then used as they are.

    Raises:
        ValueError: As `check_benchmarks` and `problems_of`, or if files cannot be read or downloaded.
    """
    problems = []
    for name, benchmark in zip(check_benchmarks(benchmarks), benchmarks, strict=True):
        if benchmark in BENCHMARKS:
            data = load_source(benchmark, template=template or "boxed")
        elif template is None:
            data = read_rows([Path(benchmark)])
        else:
            data = load_local(benchmark, template=template)
        problems += problems_of(name, data)
    return problems


def _is_file_name(benchmark: str) -> bool:
    return Path(benchmark).suffix in FORMATS
