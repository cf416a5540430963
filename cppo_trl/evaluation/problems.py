"""Problems to evaluate on: named benchmarks, local files, datasets."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from cppo_trl.data.sources import SourceUnavailableError, load_local, load_source
from cppo_trl.rewards.audit import FORMATS

Prompt = str | list[dict[str, Any]]
AIME = ("aime24", "aime25", "aime26")
BENCHMARKS = (*AIME, "math-500", "gsm8k-test")


@dataclass(frozen=True)
class Problem:
    """A prompt, plain text or a conversation, with its gold answer; ``id`` is unique within the benchmark."""

    benchmark: str
    id: str
    prompt: Prompt
    solution: Any


def problems_of(name: str, dataset: Dataset) -> list[Problem]:
    """The rows of a dataset as problems of the benchmark ``name``.

    Args:
        name: Of the benchmark.
        dataset: With the columns ``prompt`` and ``solution`` and, where problems have names, ``id``.

    Raises:
        ValueError: If a column is missing, the dataset is empty, or two rows have the same id.
    """
    missing = {"prompt", "solution"} - set(dataset.column_names)
    if missing:
        raise ValueError(
            f"{name}: no column {' or '.join(sorted(missing))}; it has {', '.join(dataset.column_names)}."
        )
    problems = [
        Problem(name, str(row.get("id", number)), row["prompt"], row["solution"]) for number, row in enumerate(dataset)
    ]
    if not problems:
        raise ValueError(f"{name}: there are no problems in it.")
    if len({problem.id for problem in problems}) < len(problems):
        raise ValueError(f"{name}: several rows have the same id; give each its own, or leave the column out.")
    return problems


def load_problems(benchmarks: Sequence[str], template: str | None = None) -> list[Problem]:
    """The problems of named benchmarks and of local files.

    Args:
        benchmarks: Each a name out of `BENCHMARKS`; a name and where its files are, ``aime24=DIRECTORY``; or a
            ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file with the columns that `problems_of` takes, whose
            name without the ending is the benchmark's.
        template: How problems are put to the model, a key of `cppo_trl.data.templates.TEMPLATES`. None: ``boxed`` for
            named benchmarks, and a file's prompts as they are.

    Raises:
        ValueError: For an unknown name, two benchmarks of one name, files that are not here and cannot be fetched,
            or unfit rows.
    """
    names = [Path(path).stem if _is_file(path) else path.partition("=")[0] for path in benchmarks]
    if not names or len({*names, "mean"}) <= len(names):
        raise ValueError(f"benchmarks must name at least one, each once and none 'mean'; got {list(benchmarks)}.")
    loaded = [_load(benchmark, template) for benchmark in benchmarks]
    return [problem for name, data in zip(names, loaded, strict=True) for problem in problems_of(name, data)]


def _is_file(benchmark: str) -> bool:
    return "=" not in benchmark and Path(benchmark).suffix in FORMATS


def _load(benchmark: str, template: str | None) -> Dataset:
    if _is_file(benchmark):
        if not Path(benchmark).is_file():
            raise ValueError(f"benchmarks: there is no file {benchmark!r}.")
        if template is None:
            return load_dataset(FORMATS[Path(benchmark).suffix], data_files=benchmark, split="train")
        return load_local(benchmark, template=template)
    name, _, path = benchmark.partition("=")
    if name not in BENCHMARKS:
        kinds = ", ".join(FORMATS)
        raise ValueError(f"benchmarks: {name!r} is none of {', '.join(BENCHMARKS)}, nor a file ({kinds}).")
    try:
        return load_source(name, template=template or "boxed", path=path or None)
    except SourceUnavailableError as error:  # it says how to fetch the files elsewhere
        raise ValueError(str(error)) from error
