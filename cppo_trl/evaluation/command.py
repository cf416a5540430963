"""A whole evaluation from its arguments, for ``cppo-trl evaluate``."""

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from cppo_trl.data.sources import require_on_hub
from cppo_trl.evaluation.generation import Generator, Sampling, TransformersGenerator, VLLMGenerator, adapter_base
from cppo_trl.evaluation.grading import Evaluator
from cppo_trl.evaluation.metrics import table
from cppo_trl.evaluation.problems import AIME, load_problems
from cppo_trl.evaluation.runner import answer_all, chunks, read_results, write_results
from cppo_trl.fields import documented
from cppo_trl.output.run_files import versions

BACKENDS = ("auto", "vllm", "transformers")
DTYPES = ("auto", "float32", "bfloat16", "float16")
BATCH_SIZES = {"transformers": 16, "vllm": 512}


@documented
@dataclass(kw_only=True)
class EvaluationArguments(Sampling):
    """Arguments of an evaluation, with those of `Sampling`; the defaults are the paper's protocol.

    Args:
        model: path or Hub name of a model, or of a PEFT adapter.
        benchmarks: some of aime24, aime25, aime26, math-500 and gsm8k-test, or .jsonl, .json, .csv, .parquet files.
        output_dir: "" for outputs/evaluation/<model>.
        template: prompt template; null: boxed, but none for files.
        chat_template_kwargs: JSON, for the chat template.
        backend: ``vllm``, ``transformers``, or ``auto``: vllm if installed.
        dtype: type of the weights: ``float32``, ``bfloat16``, ``float16``, or ``auto``: as stored.
        batch_size: completions at a time; null: 16, or 512 with vllm.
        vllm_kwargs: JSON, arguments of vllm.LLM.
        compare: only print a table of these directories.

    Raises:
        ValueError: If a value is invalid.
    """

    model: str = ""
    benchmarks: list[str] = field(default_factory=lambda: list(AIME))
    output_dir: str = ""
    template: str | None = None
    chat_template_kwargs: dict | str | None = None
    backend: str = "auto"
    dtype: str = "auto"
    batch_size: int | None = None
    vllm_kwargs: dict | str | None = None
    compare: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not (self.model or self.compare):
            raise ValueError("model must name a model on the Hub or a local directory.")
        for name, allowed in (("backend", BACKENDS), ("dtype", DTYPES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}; got {getattr(self, name)!r}.")
        for name in ("chat_template_kwargs", "vllm_kwargs"):
            setattr(self, name, _json_object(name, getattr(self, name)))
        if self.backend == "auto":
            self.backend = "vllm" if find_spec("vllm") else "transformers"
        if self.vllm_kwargs and self.backend != "vllm":
            raise ValueError("vllm_kwargs is set, but the backend is transformers: remove it, or install vllm.")
        self.batch_size = BATCH_SIZES[self.backend] if self.batch_size is None else self.batch_size
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be >= 1; got {self.batch_size}.")
        self.output_dir = self.output_dir or f"outputs/evaluation/{self.model.strip('/').replace('/', '--')}"
        super().__post_init__()


def evaluate_command(args: EvaluationArguments) -> str:
    """Evaluate, or compare finished evaluations; return the table.

    Raises:
        ValueError: If benchmarks, output directory or model do not fit; no model has been loaded then.
    """
    if args.compare:
        return table([read_results(Path(directory)) for directory in args.compare])
    directory = Path(args.output_dir)
    problems = load_problems(args.benchmarks, args.template)
    settings = {name: value for name, value in asdict(args).items() if name not in ("output_dir", "compare")}
    settings |= {"problems": _digest([asdict(problem) for problem in problems]), "weights": _weights(args.model)}
    parts = chunks(problems, args.batch_size or 1, args.samples)
    records = answer_all(directory, settings, parts, lambda: _evaluator(args))
    return write_results(directory, settings, records, versions())


def _evaluator(args: EvaluationArguments) -> Evaluator:
    require_model(args.model)
    generate: Generator
    try:
        tokenizer = _tokenizer(args.model)
        if args.backend == "vllm":
            generate = VLLMGenerator(args.model, args.dtype, **args.vllm_kwargs)  # type: ignore[arg-type]
        else:
            model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype, device_map="auto")
            generate = TransformersGenerator(model, tokenizer, args.batch_size or 1)
    except (OSError, ValueError) as error:
        raise ValueError(f"model {args.model!r} cannot be loaded: {' '.join(str(error).split())}") from error
    return Evaluator(generate, tokenizer, args, template_kwargs=args.chat_template_kwargs)  # type: ignore[arg-type]


def _tokenizer(model: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError):
        if (base := adapter_base(model)) is None:
            raise
        return AutoTokenizer.from_pretrained(base)  # an adapter saved without a tokenizer


def require_model(model: str) -> None:
    """Fail at once where loading would retry for half a minute.

    Raises:
        SourceUnavailableError: if the model is no directory, not in the Hub cache, and cannot be downloaded.
    """
    names = ("config.json", "adapter_config.json")
    if not Path(model).is_dir() and not any(isinstance(try_to_load_from_cache(model, name), str) for name in names):
        require_on_hub(
            model, "model", f"Run `hf download {model} --local-dir DIRECTORY` elsewhere, and copy that here"
        )


def _json_object(name: str, value: dict[str, Any] | str | None) -> dict[str, Any]:
    with suppress(json.JSONDecodeError):
        value = json.loads(value) if isinstance(value, str) else value or {}
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a JSON object; got {value!r}.")
    return value


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:16]


def _weights(model: str) -> str | None:
    """Digest of what changes when a local model is overwritten: sizes and times of its files."""
    files = [file for file in sorted(Path(model).glob("*")) if file.suffix in (".safetensors", ".bin")]
    return _digest([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]) if files else None
