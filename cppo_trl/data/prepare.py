"""From sources to a directory to train on: load, filter, count, write. What ``scripts/prepare_data.py`` calls."""

import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, concatenate_datasets
from transformers import AutoTokenizer

from cppo_trl.data import filters
from cppo_trl.data.sources import (
    SOURCES,
    LocalReader,
    SourceUnavailableError,
    load_raw,
    load_raw_local,
    local_columns,
    standardise,
)
from cppo_trl.data.templates import TEMPLATES, template_named

_EXAMPLES = 3  # of each reason


@dataclass
class PrepareArguments:
    """What to prepare, and how.

    A source is a name (``gsm8k``), a name with a local copy (``gsm8k=FOLDER`` or ``gsm8k=FILE``), or a local file of
    your own, whose columns ``columns`` names.
    """

    output_dir: str = field(metadata={"help": "Directory to write; must not exist."})
    sources: list[str] = field(
        default_factory=lambda: ["dapo-math-17k"], metadata={"help": f"To train on: {', '.join(SOURCES)}, or files."}
    )
    test_sources: list[str] = field(
        default_factory=list, metadata={"help": "For a test split, which the train split is kept clear of."}
    )
    decontaminate: list[str] = field(
        default_factory=lambda: ["aime24", "aime25", "aime26", "math-500"],
        metadata={"help": "Evaluation sources whose problems are dropped from the train split; none for no check."},
    )
    template: str = field(default="dapo", metadata={"help": f"Prompt template: {', '.join(TEMPLATES)}."})
    columns: list[str] = field(
        default_factory=list,
        metadata={"help": "Columns of local files, as prompt=question solution=answer.final id=uid."},
    )
    max_prompt_tokens: int | None = field(
        default=None, metadata={"help": "Longest prompt, in tokens of `tokenizer` with its chat template."}
    )
    tokenizer: str | None = field(default=None, metadata={"help": "Name or directory of the tokenizer that counts."})

    def __post_init__(self) -> None:
        """Check what can be checked before anything is loaded."""
        template_named(self.template)
        if not self.sources:
            raise ValueError("sources must name at least one source")
        names = Counter(source_name(spec) for spec in self.sources + self.test_sources)
        if twice := [name for name, count in names.items() if count > 1]:
            raise ValueError(f"sources and test_sources name {', '.join(twice)} twice")
        if wrong := [name for name in map(source_name, self.sources) if name in SOURCES and SOURCES[name].evaluation]:
            raise ValueError(f"sources names {', '.join(wrong)}, which is for evaluation only")
        if Path(self.output_dir).exists():
            raise ValueError(f"output_dir={self.output_dir!r} exists: name another, or remove it")
        if (self.max_prompt_tokens is None) != (self.tokenizer is None):
            raise ValueError("max_prompt_tokens and tokenizer go together: tokens are counted by a tokenizer")
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
            raise ValueError(f"max_prompt_tokens must be at least 1, got {self.max_prompt_tokens}")
        if not self.decontaminate or ("none" in self.decontaminate and len(self.decontaminate) > 1):
            raise ValueError("decontaminate must name evaluation sources, or be none alone")
        if self.decontaminate == ["none"]:
            self.decontaminate = []
        for spec in (*self.sources, *self.test_sources, *self.decontaminate):
            if source_name(spec) not in SOURCES and not Path(spec).is_file():
                raise ValueError(f"{spec!r} is neither a file nor one of {', '.join(SOURCES)}")
        if wrong := [pair for pair in self.columns if "=" not in pair]:
            raise ValueError(f"columns takes KEY=COLUMN, as prompt=question; got {', '.join(wrong)}")
        self.column_map = local_columns(dict(pair.split("=", 1) for pair in self.columns))


def source_name(spec: str) -> str:
    """Return the name in ``NAME`` or ``NAME=PATH``, and a local file as it is."""
    name = spec.partition("=")[0]
    return name if name in SOURCES else spec


@dataclass
class Tally:
    """A row of the summary: what became of one source.

    Attributes:
        split: ``train`` or ``test``.
        source: Its name.
        read: Rows read.
        dropped: Rows dropped, by reason.
        kept: Rows written.
    """

    split: str
    source: str
    read: int
    dropped: dict[str, int] = field(default_factory=dict)
    kept: int = 0

    def drop(self, reason: str, count: int) -> None:
        """Count rows as dropped."""
        self.dropped[reason] = self.dropped.get(reason, 0) + count


@dataclass
class Summary:
    """What was read, dropped and kept.

    Attributes:
        rows: One for each source.
        examples: For each reason, some dropped rows in words.
        compared: Number of problems of each set that the train split was compared with.
        first: The first row of the train split.
    """

    rows: list[Tally] = field(default_factory=list)
    examples: dict[str, list[str]] = field(default_factory=dict)
    compared: dict[str, int] = field(default_factory=dict)
    first: dict[str, Any] = field(default_factory=dict)

    def report(self) -> str:
        """Return a Markdown table, examples of what was dropped, and the first prompt."""
        reasons = list(dict.fromkeys(reason for row in self.rows for reason in row.dropped))
        head = ["split", "source", "rows read", *reasons, "kept"]
        lines = [head, ["---"] * len(head)]
        for row in self.rows:
            counts = [row.read, *(row.dropped.get(reason) for reason in reasons), row.kept]
            lines.append([row.split, row.source, *("–" if count is None else f"{count:,}" for count in counts)])
        against = ", ".join(f"{name} ({count:,} problems)" for name, count in self.compared.items())
        return "\n".join(
            [
                *(f"| {' | '.join(line)} |" for line in lines),
                "",
                f"Train split compared with: {against or 'nothing; it may hold evaluation problems'}",
                *(f"{reason}: {text}" for reason, texts in self.examples.items() for text in texts),
                f"First prompt: {json.dumps(self.first['prompt'], ensure_ascii=False)}",
                f"Its gold: {self.first['solution']}",
            ]
        )


def prepare(args: PrepareArguments) -> Summary:
    """Write ``args.output_dir``, which `datasets.load_from_disk` reads, and return what is in it.

    The directory appears when it is complete; ``summary.json`` in it says where everything came from. A run that was
    interrupted finds its finished steps in the cache of `datasets`.

    Raises:
        SourceUnavailableError: If files of sources are missing; names all of them.
        ValueError: If an argument or a file does not fit, or nothing is left to train on.
    """
    tokenizer = None
    if args.tokenizer is not None:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
        if tokenizer.chat_template is None:
            raise ValueError(f"tokenizer {args.tokenizer!r} has no chat template, which prompts of messages need")
    raw = _load_all(args)
    data = {}
    for spec, rows in raw.items():
        name = source_name(spec)
        read = SOURCES[name].read if name in SOURCES else LocalReader(args.column_map)
        data[spec] = standardise(rows, name, read, args.template)
    evaluation = {spec: data[spec] for spec in (*args.decontaminate, *args.test_sources)}
    summary = Summary(compared={spec: len(rows) for spec, rows in evaluation.items()})
    splits = {}
    for split, specs in (("train", args.sources), ("test", args.test_sources)):
        tallies = [Tally(split, source_name(spec), len(raw[spec])) for spec in specs]
        for tally, spec in zip(tallies, specs, strict=True):
            tally.drop("repeated", tally.read - len(data[spec]))
        summary.rows += tallies
        if specs:
            others = list(evaluation.values()) if split == "train" else []
            whole = concatenate_datasets([data[spec] for spec in specs])
            splits[split] = _clean(whole, tallies, summary.examples, tokenizer, args.max_prompt_tokens, others)
    if not len(splits["train"]):
        raise ValueError(f"no row is left to train on:\n{summary.rows}")
    summary.first = splits["train"][0]
    _write(splits, summary, args, list(map(source_name, raw)))
    return summary


def _load_all(args: PrepareArguments) -> dict[str, Dataset]:
    """Return the raw rows of each source as it is given."""
    raw = {}
    missing = []
    for spec in dict.fromkeys([*args.decontaminate, *args.test_sources, *args.sources]):
        name = source_name(spec)
        try:
            if name in SOURCES:
                raw[spec] = load_raw(name, spec.partition("=")[2] or None)
            else:
                raw[spec] = load_raw_local(spec, args.column_map)
        except SourceUnavailableError as error:
            missing.append(str(error))
    if missing:
        if set(args.decontaminate) - set(raw):
            missing.append("To train without a comparison with evaluation sets: --decontaminate none.")
        raise SourceUnavailableError("\n".join(missing))
    return raw


def _clean(
    data: Dataset,
    tallies: Sequence[Tally],
    examples: dict[str, list[str]],
    tokenizer: Any,
    max_tokens: int | None,
    evaluation: Sequence[Dataset],
) -> Dataset:
    """Apply the filters, and note in ``tallies`` and ``examples`` what they drop."""

    def drop(reason: str, found: filters.Reasons) -> Dataset:
        counts = Counter(source for source, why in zip(data["source"], found, strict=True) if why)
        for tally in tallies:
            tally.drop(reason, counts[tally.source])
        where = [place for place, why in enumerate(found) if why]
        noted = examples.setdefault(reason, [])
        for place in where[: _EXAMPLES - len(noted)]:
            noted.append(f"{data[place]['source']}/{data[place]['id']} {found[place]}")
        return data.select([place for place, why in enumerate(found) if not why]) if where else data

    data = drop("unusable gold", filters.unusable_golds(data))
    data = drop("conflicting golds", filters.conflicts(data))
    data = drop("repeated", filters.repeats(data))
    if tokenizer is not None and max_tokens is not None:
        data = drop(f"over {max_tokens} tokens", filters.overlong(data, tokenizer, max_tokens))
    if evaluation:
        data = drop("evaluation problem", filters.overlap(data, evaluation))
    kept = Counter(data["source"])
    for tally in tallies:
        tally.kept = kept[tally.source]
    return data


def _write(splits: dict[str, Dataset], summary: Summary, args: PrepareArguments, names: Sequence[str]) -> None:
    """Write a complete directory, or none."""
    known = {
        name: {key: getattr(SOURCES[name], key) for key in ("repo", "revision", "files", "licence", "caution")}
        for name in names
        if name in SOURCES
    }
    versions = {name: version(name) for name in ("cppo-trl", "datasets", "math-verify")}
    record = {"arguments": asdict(args), **asdict(summary), "sources": known, "versions": versions}
    output = Path(args.output_dir)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as directory:
        unfinished = Path(directory) / "data"
        DatasetDict(splits).save_to_disk(unfinished)
        (unfinished / "summary.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        unfinished.rename(output)
