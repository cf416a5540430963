"""Sets of mathematical problems with checkable answers, loaded in one form.

Files come from the Hub's cache, which ``hf download`` fills too, from the Hub, or from a local copy.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset, Features, List, Value, load_dataset
from datasets.fingerprint import Hasher
from huggingface_hub import snapshot_download

from cppo_trl.data.catalogue import SOURCES, Problem, Row, Source
from cppo_trl.data.templates import Messages, template_named
from cppo_trl.rewards.audit import FORMATS
from cppo_trl.rewards.math import completion_text

FEATURES = Features(
    {
        "prompt": List({"role": Value("string"), "content": Value("string")}),
        "solution": Value("string"),
        "source": Value("string"),
        "id": Value("string"),
        "subject": Value("string"),
        "difficulty": Value("float64"),
        "problem": Value("string"),
    }
)
LOCAL_COLUMNS = ("prompt", "solution", "id", "subject", "difficulty")
_PACKAGE = Path(__file__).parent.parent
_MODULES = [file for folder in ("data", "rewards") for file in sorted((_PACKAGE / folder).glob("*.py"))]
# an argument of every map: `datasets` caches results by its functions' names, which do not change with their code
CODE = Hasher.hash([file.read_text() for file in _MODULES])


class SourceUnavailableError(RuntimeError):
    """A source is neither cached here nor can it be fetched; the message says how to fetch it elsewhere."""


def load_source(name: str, *, template: str, path: str | Path | None = None) -> Dataset:
    """Load a source in the common form, each problem once.

    Args:
        name: Key of `SOURCES`.
        template: Key of `cppo_trl.data.templates.TEMPLATES`.
        path: One file of the source, or a folder with its files laid out as on the Hub. Default: the Hub's cache, or
            the Hub.

    Returns:
        A dataset with the columns of `FEATURES`: ``prompt`` (messages), ``solution`` (the gold answer), ``source``,
        ``id`` (stable within the source), ``subject``, ``difficulty`` and ``problem`` (the text without template).

    Raises:
        ValueError: If a name is unknown, or files lack a column.
        SourceUnavailableError: If the files are not here and cannot be fetched.
    """
    return standardise(load_raw(name, path), name, known_source(name).read, template)


def load_local(
    path: str | Path, *, columns: Mapping[str, str] | None = None, template: str = "plain", name: str | None = None
) -> Dataset:
    """Load a local ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file in the common form, each problem once.

    Args:
        path: The file.
        columns: From ``prompt`` and ``solution`` (needed), ``id``, ``subject`` and ``difficulty`` to the file's names
            for them; a name may lead into a nested column (``reward_model.ground_truth``). Default: the same names.
            A prompt may be a conversation, if the template is ``plain``.
        template: Key of `cppo_trl.data.templates.TEMPLATES`.
        name: Put into the column ``source``. Default: the file's name.

    Returns:
        As :func:`load_source`; without a column ``id``, rows are numbered.

    Raises:
        ValueError: If the file is missing or of another kind, or has no such column.
    """
    wanted = local_columns(columns)
    return standardise(load_raw_local(path, wanted), name or Path(path).name, LocalReader(wanted), template)


def known_source(name: str) -> Source:
    """Return the source of that name.

    Raises:
        ValueError: If there is none.
    """
    if name not in SOURCES:
        raise ValueError(f"source must be one of {', '.join(SOURCES)}, or a local file; got {name!r}")
    return SOURCES[name]


def load_raw(name: str, path: str | Path | None = None) -> Dataset:
    """Load a source's own rows and columns; arguments and errors as of :func:`load_source`."""
    source = known_source(name)
    return _read_files(_files(name, source, path), source.columns)


def load_raw_local(path: str | Path, columns: Mapping[str, str]) -> Dataset:
    """Load a file's own rows, nested columns flattened; arguments and errors as of :func:`load_local`."""
    if not Path(path).is_file():
        raise ValueError(f"there is no file {str(path)!r}")
    data = _read_files([Path(path)], dict.fromkeys(column.split(".")[0] for column in columns.values())).flatten()
    _check_columns(data.column_names, columns.values(), path)
    return data


def local_columns(columns: Mapping[str, str] | None) -> dict[str, str]:
    """Return the column map with its defaults.

    Raises:
        ValueError: If it maps anything but `LOCAL_COLUMNS`.
    """
    unknown = set(columns or ()) - set(LOCAL_COLUMNS)
    if unknown:
        raise ValueError(f"columns maps {', '.join(LOCAL_COLUMNS)} to a file's columns; got {', '.join(unknown)}")
    return {"prompt": "prompt", "solution": "solution", **(columns or {})}


@dataclass(frozen=True)
class LocalReader:
    """From a row of a local file to the common form, by a column map."""

    columns: Mapping[str, str]

    def __call__(self, row: Row, index: int) -> Problem:
        """Read a row."""
        value = {key: row[column] for key, column in self.columns.items()}
        text = {key: None if value.get(key) is None else str(value[key]) for key in ("solution", "id", "subject")}
        difficulty = value.get("difficulty")
        return {
            "problem": value["prompt"],
            "solution": text["solution"],
            "id": text["id"] or str(index),
            "subject": text["subject"],
            "difficulty": None if difficulty is None else float(difficulty),
        }


def standardise(raw: Dataset, name: str, read: Callable[[Row, int], Problem], template: str) -> Dataset:
    """Bring raw rows to the common form; of rows with the same problem and gold, white space aside, keep the first."""
    template_named(template)
    return raw.map(
        _standardise_batch,
        batched=True,
        with_indices=True,
        remove_columns=raw.column_names,
        features=FEATURES,
        fn_kwargs={"name": name, "read": read, "template": template, "seen": set(), "code": CODE},
        desc=f"Reading {name}",
    )


def _standardise_batch(
    batch: dict[str, list[Any]],
    indices: list[int],
    name: str,
    read: Callable[[Row, int], Problem],
    template: str,
    seen: set[tuple[str, str | None]],
    code: str,
) -> dict[str, list[Any]]:
    rows: dict[str, list[Any]] = {column: [] for column in FEATURES}
    for place, index in enumerate(indices):
        row = read({column: values[place] for column, values in batch.items()}, index)
        text = completion_text(row["problem"])
        key = (squeeze(text), row["solution"])
        if key in seen:
            continue
        seen.add(key)
        common = {**row, "problem": text, "prompt": _prompt(row["problem"], template, name), "source": name}
        for column, values in rows.items():
            values.append(common[column])
    return rows


def squeeze(text: str) -> str:
    """Return the text with every run of white space as one space."""
    return " ".join(text.split())


def _prompt(problem: str | Messages, template: str, name: str) -> Messages:
    if isinstance(problem, str):
        return template_named(template).render(problem)
    if template != "plain":
        raise ValueError(f"the prompts of {name} are conversations already: use template plain, not {template!r}")
    return problem


def _files(name: str, source: Source, path: str | Path | None) -> list[Path]:
    """Return the source's files, fetched if needed and possible."""
    if path is not None and Path(path).is_file():
        return [Path(path)]
    if path is None:
        try:
            folder = Path(
                snapshot_download(
                    source.repo, repo_type="dataset", revision=source.revision, allow_patterns=source.files
                )
            )
        except OSError as error:  # not cached and no network, no such revision, not allowed
            why = f"not in the cache, and could not be fetched ({type(error.__cause__ or error).__name__})"
            raise SourceUnavailableError(_how_to_fetch(name, source, why)) from error
    else:
        folder = Path(path)
    files = sorted(folder.glob(source.files))
    shards = re.search(r"-of-(\d+)\.", files[0].name) if files else None
    if not files or (shards and len(files) % int(shards[1])):
        why = f"{folder} has {len(files)} of {shards[1] if shards else 'the'} files {source.files}"
        raise SourceUnavailableError(_how_to_fetch(name, source, why))
    return files


def _how_to_fetch(name: str, source: Source, why: str) -> str:
    gated = (
        f", once https://huggingface.co/datasets/{source.repo} has your consent to its terms" if source.gated else ""
    )
    return (
        f"{name}: {source.repo}: {why}.\n"
        f"  On a machine with a network{gated}:\n    {source.fetch_command(name)}\n"
        f"  Copy the folder here, and give {name}=PATH/TO/{name} in place of {name}."
    )


def _read_files(files: list[Path], columns: Iterable[str]) -> Dataset:
    kind = FORMATS.get(files[0].suffix)
    if kind is None:
        raise ValueError(f"{files[0]} is none of {', '.join(FORMATS)}")
    options = {}
    if kind == "parquet":  # the only kind of which columns can be left out
        _check_columns(pq.read_schema(files[0]).names, columns, files[0])
        options["columns"] = list(columns)
    data = load_dataset(kind, data_files=[str(file) for file in files], split="train", **options)
    _check_columns(data.column_names, columns, files[0])
    return data


def _check_columns(present: Sequence[str], columns: Iterable[str], path: str | Path) -> None:
    missing = [column for column in columns if column not in present]
    if missing:
        raise ValueError(f"{path} has no column {', '.join(missing)}; it has {', '.join(present)}")
