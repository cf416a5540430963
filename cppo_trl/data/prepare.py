"""Build a training dataset: load, filter, count, write. Called by ``cppo-trl prepare-data``."""

import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer

from cppo_trl.data import filters
from cppo_trl.data.sources import SOURCES, SourceUnavailableError, local_columns, read_problems, source_files
from cppo_trl.data.templates import template_named
from cppo_trl.fields import documented


@documented
@dataclass
class PrepareArguments:
    """What to prepare; a source is the name of a Hub dataset in `SOURCES` or the path of a local file.

    Args:
        output_dir: directory to write; it must not exist.
        sources: to train on: local files, or some of dapo-math-17k, gsm8k, math, deepmath-103k and big-math.
        test_sources: for a test split, not trained on; also gsm8k-test, math-500, aime24, aime25 and aime26.
        decontaminate: sources whose problems are removed from the train split, or none.
        template: prompt template: dapo, boxed, thinking or plain.
        columns: columns of local files: prompt=question id=uid ...
        max_prompt_tokens: longest prompt in tokens of ``tokenizer``.
        tokenizer: path or Hub name, for ``max_prompt_tokens``.

    Raises:
        ValueError: If a value is invalid; nothing has been loaded then.
    """

    output_dir: str
    sources: list[str] = field(default_factory=lambda: ["dapo-math-17k"])
    test_sources: list[str] = field(default_factory=list)
    decontaminate: list[str] = field(default_factory=lambda: ["aime24", "aime25", "aime26", "math-500"])
    template: str = "dapo"
    columns: list[str] = field(default_factory=list)
    max_prompt_tokens: int | None = None
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        template_named(self.template)
        if self.decontaminate == ["none"]:
            self.decontaminate = []
        if not self.sources:
            raise ValueError("sources must name at least one source")
        if wrong := [name for name in self.sources if name in SOURCES and SOURCES[name].evaluation]:
            raise ValueError(f"sources names {', '.join(wrong)}, which is for evaluation only")
        for source in (*self.sources, *self.test_sources, *self.decontaminate):
            if source not in SOURCES and not Path(source).is_file():
                raise ValueError(f"{source!r} is neither a file nor one of {', '.join(SOURCES)}")
        if Path(self.output_dir).exists():
            raise ValueError(f"output_dir={self.output_dir!r} exists: name another, or remove it")
        if (self.max_prompt_tokens is None) != (self.tokenizer is None):
            raise ValueError("max_prompt_tokens and tokenizer must be set together")
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
            raise ValueError(f"max_prompt_tokens must be >= 1; got {self.max_prompt_tokens}")
        if wrong := [pair for pair in self.columns if "=" not in pair]:
            raise ValueError(f"columns takes KEY=COLUMN, such as prompt=question; got {', '.join(wrong)}")
        self.column_map = local_columns(dict(pair.split("=", 1) for pair in self.columns))


@dataclass
class SplitSummary:
    """What became of the rows of one split.

    Attributes:
        read: Rows read, by source.
        dropped: Rows dropped, by reason.
        examples: Up to three dropped rows for each reason.
        compared: Problems of each evaluation source that the split was compared with.
        kept: Rows written.
    """

    read: dict[str, int]
    dropped: dict[str, int]
    examples: dict[str, list[str]] = field(default_factory=dict)
    compared: dict[str, int] = field(default_factory=dict)
    kept: int = 0

    def drop(self, data: Dataset, reason: str, found: filters.Reasons) -> Dataset:
        """Return the rows without an entry in ``found``, and count the others under ``reason``."""
        dropped = [row for row, why in enumerate(found) if why]
        self.dropped[reason] = len(dropped)
        self.examples[reason] = [f"{data[row]['source']}/{data[row]['id']} {found[row]}" for row in dropped[:3]]
        return data.select([row for row, why in enumerate(found) if not why])

    def report(self) -> str:
        """Return the counts and examples as text, one line for each reason."""
        lines = [f"{sum(self.read.values()):,} rows read, {self.kept:,} kept"]
        for reason, count in self.dropped.items():
            examples = "; ".join(self.examples.get(reason, []))
            lines.append(f"  {reason}: {count:,}" + (f" ({examples})" if examples else ""))
        against = ", ".join(f"{name} ({count:,})" for name, count in self.compared.items())
        return "\n".join([*lines, f"  compared with: {against or 'no evaluation problems'}"])


def prepare(args: PrepareArguments) -> dict[str, SplitSummary]:
    """Write a `datasets.DatasetDict` to ``args.output_dir``.

    The directory appears once it is complete. ``summary.json`` in it records arguments, counts and provenance.

    Returns:
        A summary of ``train`` and, with test sources, of ``test``.

    Raises:
        ValueError: If a file or the tokenizer does not fit, or no training row is left.
        SourceUnavailableError: If sources are not in the Hub cache and cannot be downloaded; names all of them.
    """
    tokenizer = None
    if args.tokenizer is not None:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
        if tokenizer.chat_template is None:
            raise ValueError(f"tokenizer {args.tokenizer!r} has no chat template, which prompts of messages require")
    on_hub = [name for name in (*args.decontaminate, *args.test_sources, *args.sources) if name in SOURCES]
    _require_sources(on_hub)
    splits, summaries = {}, {}
    for split, names in (("train", args.sources), ("test", args.test_sources)):
        if names:
            splits[split], read = read_problems(names, args.template, args.column_map)
            repeated = sum(read.values()) - len(splits[split])
            summaries[split] = SplitSummary(read, {"repeated": repeated})
    evaluation = {name: read_problems([name], args.template, args.column_map)[0] for name in args.decontaminate}
    if "test" in splits:
        evaluation["test split"] = splits["test"]
    summaries["train"].compared = {name: len(rows) for name, rows in evaluation.items()}
    for split, summary in summaries.items():
        data = summary.drop(splits[split], "unusable gold answer", filters.unusable_golds(splits[split]))
        if tokenizer is not None and args.max_prompt_tokens is not None:
            found = filters.overlong(data, tokenizer, args.max_prompt_tokens)
            data = summary.drop(data, f"over {args.max_prompt_tokens} tokens", found)
        if summary.compared:
            data = summary.drop(data, "evaluation problem", filters.overlap(data, evaluation.values()))
        splits[split], summary.kept = data, len(data)
    if not len(splits["train"]):
        raise ValueError(f"no row is left to train on; rows dropped: {summaries['train'].dropped}")
    sources = {name: {key: getattr(SOURCES[name], key) for key in ("repo", "revision", "license")} for name in on_hub}
    counts = {name: asdict(summary) for name, summary in summaries.items()}
    versions = {name: version(name) for name in ("cppo-trl", "datasets", "math-verify")}
    record = {"arguments": asdict(args), "splits": counts, "sources": sources, "versions": versions}
    _write(Path(args.output_dir), splits, record)
    return summaries


def _require_sources(names: Iterable[str]) -> None:
    """Download what is not in the Hub cache before any work is done."""
    missing = []
    for name in dict.fromkeys(names):
        try:
            source_files(name)
        except SourceUnavailableError as error:
            missing.append(str(error))
    if missing:
        raise SourceUnavailableError("\n".join(missing))


def _write(output: Path, splits: dict[str, Dataset], record: Mapping[str, object]) -> None:
    """Write the whole directory or nothing."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as directory:
        unfinished = Path(directory) / "data"
        DatasetDict(splits).save_to_disk(unfinished)
        (unfinished / "summary.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        unfinished.rename(output)
