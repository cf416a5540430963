"""Problems with verifiable answers, from the Hub, its cache, or local files, in one set of columns."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
from datasets import Dataset, Features, List, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import HfApi, snapshot_download
from tqdm.auto import tqdm

from cppo_trl.data.catalog import CONVERSIONS, SOURCES
from cppo_trl.data.templates import Messages, template_named
from cppo_trl.rewards.audit import FORMATS
from cppo_trl.rewards.math import completion_text

FEATURES = Features(
    {
        "prompt": List({"role": Value("string"), "content": Value("string")}),
        **{name: Value("string") for name in ("solution", "source", "id", "subject", "problem")},
        "difficulty": Value("float64"),
    }
)
LOCAL_COLUMNS = ("prompt", "solution", "id", "subject", "difficulty")


class SourceUnavailableError(ValueError):
    """A repository is neither in the Hub cache nor reachable; the message says how to get it."""


def load_source(name: str, *, template: str) -> Dataset:
    """Load the distinct problems of a Hub dataset.

    Args:
        name: Key of `SOURCES`.
        template: Key of `cppo_trl.data.templates.TEMPLATES`.

    Returns:
        A dataset with the columns ``prompt`` (messages), ``solution`` (gold answer), ``source``, ``id`` (stable within
        the source), ``subject``, ``difficulty``, and ``problem`` (the text without template); see `FEATURES`.

    Raises:
        ValueError: If a name is unknown or a column is missing.
        SourceUnavailableError: If the files are not in the Hub cache and cannot be downloaded.
    """
    if name not in SOURCES:
        raise ValueError(f"source must be one of {', '.join(SOURCES)}; got {name!r}")
    return read_problems([name], template)[0]


def load_local(path: str | Path, *, columns: Mapping[str, str] | None = None, template: str = "plain") -> Dataset:
    """Load the distinct problems of a local ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file.

    Args:
        path: The file.
        columns: Maps ``prompt`` and ``solution`` (required), ``id``, ``subject`` and ``difficulty`` to the file's
            columns; a dot leads into a nested column (``reward_model.ground_truth``). Defaults to columns named
            ``prompt`` and ``solution``. Prompts may be conversations if the template is ``plain``.
        template: Key of `cppo_trl.data.templates.TEMPLATES`.

    Returns:
        A dataset with the columns of `load_source`; rows are numbered unless ``id`` is mapped.

    Raises:
        ValueError: If the file is missing, empty, malformed or of another format, or lacks a mapped column.
    """
    return read_problems([str(path)], template, columns)[0]


def local_columns(columns: Mapping[str, str] | None) -> Mapping[str, str]:
    """Return a column map for local files with the required columns filled in.

    Raises:
        ValueError: If a key is not in `LOCAL_COLUMNS`.
    """
    if unknown := set(columns or ()) - set(LOCAL_COLUMNS):
        raise ValueError(f"columns maps {', '.join(LOCAL_COLUMNS)} to a file's columns; got {', '.join(unknown)}")
    return {"prompt": "prompt", "solution": "solution", **(columns or {})}


def read_problems(
    sources: Iterable[str], template: str, columns: Mapping[str, str] | None = None
) -> tuple[Dataset, dict[str, int]]:
    """Load Hub datasets and local files into one dataset, keeping the first row of each problem.

    Args:
        sources: Keys of `SOURCES`, and paths of local files.
        template: Key of `cppo_trl.data.templates.TEMPLATES`.
        columns: Column map of the local files, as in `load_local`.

    Returns:
        The dataset, and the number of rows read from each source.

    Raises:
        ValueError: As `load_source` and `load_local`.
    """
    template_named(template)
    seen: set[str] = set()  # problems with white space collapsed
    read: dict[str, int] = {}
    rows: dict[str, list[Any]] = {name: [] for name in FEATURES}
    for source in sources:
        known = SOURCES.get(source)
        where, convert = (known.columns, known.convert) if known else (local_columns(columns), {})
        raw = read_rows(source_files(source) if known else [Path(source)], where.values())
        read[source] = len(raw)
        for index, raw_row in enumerate(tqdm(_rows(raw), total=len(raw), desc=f"Reading {source}", unit="row")):
            row = {key: raw_row[column] for key, column in where.items()}
            row |= {key: CONVERSIONS[name](row[key]) for key, name in convert.items()}
            text = completion_text(row["prompt"])
            if (collapsed := " ".join(text.split())) in seen:
                continue
            seen.add(collapsed)
            row["id"] = index if row.get("id") is None else row["id"]
            row |= {"prompt": _messages(row["prompt"], template, source), "source": source, "problem": text}
            for name, value in FEATURES.encode_example({name: row.get(name) for name in FEATURES}).items():
                rows[name].append(value)
    return Dataset.from_dict(rows, features=FEATURES), read


def _rows(data: Dataset) -> Iterator[dict[str, Any]]:
    for batch in data.iter(1000):  # several times as fast as row by row
        yield from (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))


def _messages(prompt: str | Messages, template: str, source: str) -> Messages:
    if isinstance(prompt, str):
        return template_named(template).render(prompt)
    if template != "plain":
        raise ValueError(f"the prompts of {source} are conversations: use template plain, not {template!r}")
    return prompt


def read_rows(files: Sequence[Path], columns: Iterable[str] = ()) -> Dataset:
    """Read files of one format and flatten nested columns.

    Args:
        files: ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` files.
        columns: Columns that must exist; of parquet files, no others are read. Defaults to all.

    Raises:
        ValueError: If the first file is missing, empty, malformed or of another format, or lacks a column.
    """
    first, columns = files[0], list(columns)
    if first.suffix not in FORMATS:
        raise ValueError(f"{first} is not a {', '.join(FORMATS)} file")
    if not first.is_file():
        raise ValueError(f"there is no file {str(first)!r}")
    kind, options = FORMATS[first.suffix], {}
    try:
        if kind == "parquet" and columns:  # the only format that can be read by column
            roots = dict.fromkeys(column.partition(".")[0] for column in columns)
            options["columns"] = [name for name in pq.read_schema(first).names if name in roots] or None
        data = load_dataset(kind, data_files=list(map(str, files)), split="train", **options).flatten()
    except (ValueError, DatasetGenerationError, StopIteration) as error:  # the last for an empty .jsonl file
        reason = str(error.__cause__ or error) or "no rows"
        raise ValueError(f"{first} is empty or not valid {kind}: {reason.splitlines()[0]}") from error
    if missing := [column for column in columns if column not in data.column_names]:
        raise ValueError(f"{first} has no column {', '.join(missing)}; it has {', '.join(data.column_names)}")
    return data


def source_files(name: str) -> list[Path]:
    """Return the files of a Hub dataset, downloaded to the Hub cache if they are not there.

    Raises:
        SourceUnavailableError: If they are not in the cache and cannot be downloaded.
    """
    source = SOURCES[name]
    options: dict[str, Any] = {"repo_type": "dataset", "revision": source.revision, "allow_patterns": source.files}
    files = []
    with suppress(OSError):
        files = sorted(Path(snapshot_download(source.repo, local_files_only=True, **options)).glob(source.files))
    shards = re.search(r"-of-(\d+)\.", files[0].name) if files else None
    if not files or (shards and len(files) % int(shards[1])):
        advice = f"On a machine with network access run `{source.download_command}` and copy its cache here"
        require_on_hub(source.repo, "dataset", advice, source.revision)
        files = sorted(Path(snapshot_download(source.repo, **options)).glob(source.files))
    return files


def require_on_hub(repo: str, kind: Literal["dataset", "model"], advice: str, revision: str | None = None) -> None:
    """Check in a single request that the Hub has a repository: without a network, downloads retry for 23 s and more.

    Args:
        repo: Repository id.
        kind: ``"dataset"`` or ``"model"``.
        advice: Last sentence of the message, without a period.
        revision: Commit, branch or tag; None for the default branch.

    Raises:
        SourceUnavailableError: If the Hub is not reachable, or refuses.
    """
    try:
        HfApi().repo_info(repo, repo_type=kind, revision=revision, timeout=10)
    except Exception as error:  # of the Hub client, of its HTTP library, or of the network
        raise SourceUnavailableError(
            f"{repo}: this {kind} is not in the Hub cache and cannot be downloaded ({type(error).__name__}). {advice}."
        ) from error
