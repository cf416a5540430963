"""A whole evaluation from its arguments: what ``scripts/evaluate.py`` calls."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from cppo_trl import __version__
from cppo_trl.evaluation.generation import (
    Generator,
    Sampling,
    TransformersGenerator,
    VLLMGenerator,
    adapter_base,
)
from cppo_trl.evaluation.grading import Evaluator
from cppo_trl.evaluation.problems import AIME, BENCHMARKS, Problem, load_problems
from cppo_trl.evaluation.report import read_results, table, write_results
from cppo_trl.evaluation.runner import chunks, run

BACKENDS = ("auto", "vllm", "transformers")
DTYPES = ("auto", "float32", "bfloat16", "float16")
BATCH_SIZES = {"transformers": 16, "vllm": 512}


@dataclass
class EvaluationArguments:
    """Arguments of an evaluation; the defaults are the paper's protocol.

    Args:
        model: path or Hub name of a model, or of a PEFT adapter.
        benchmarks: named benchmarks, or local files with the columns prompt, solution and, if problems have one, id.
        output_dir: what is written goes here, and a rerun goes on from there.
        samples: answers to each problem.
        temperature: of the samples; 0 decodes greedily.
        top_p: of the samples.
        max_new_tokens: longest answer in tokens.
        seed: of the samples.
        template: key of cppo_trl.data.templates.TEMPLATES; null: boxed for named benchmarks, none for files.
        chat_template_kwargs: JSON, for the tokenizer's chat template.
        backend: what generates.
        dtype: of the weights.
        batch_size: answers generated at once.
        vllm_kwargs: JSON, further arguments of vllm.LLM.
        compare: instead of an evaluation, print one table of these output directories.

    Raises:
        ValueError: If a value is out of range.
    """

    model: str = field(default="", metadata={"help": "Path or Hub name of a model, or of a PEFT adapter."})
    benchmarks: list[str] = field(
        default_factory=lambda: list(AIME),
        metadata={"help": f"Some of {', '.join(BENCHMARKS)}, NAME=DIRECTORY, or .jsonl, .json, .csv, .parquet files."},
    )
    output_dir: str = field(default="", metadata={"help": "Default: outputs/evaluation/<model>."})
    samples: int = field(default=16, metadata={"help": "Answers to each problem."})
    temperature: float = field(default=0.7, metadata={"help": "Of the samples; 0: greedy (with --samples 1)."})
    top_p: float = field(default=0.95, metadata={"help": "Of the samples."})
    max_new_tokens: int = field(default=8192, metadata={"help": "Longest answer in tokens."})
    seed: int = field(default=0, metadata={"help": "Of the samples."})
    template: str | None = field(
        default=None,
        metadata={"help": "How problems are put; default: boxed for named benchmarks, nothing for files."},
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "JSON, for the chat template: '{\"enable_thinking\": false}'."}
    )
    backend: str = field(
        default="auto", metadata={"help": "auto: vllm where it is installed.", "choices": list(BACKENDS)}
    )
    dtype: str = field(
        default="auto", metadata={"help": "Of the weights; auto: as they are stored.", "choices": list(DTYPES)}
    )
    batch_size: int | None = field(
        default=None, metadata={"help": "Answers generated at once; default: 16 (transformers) or 512 (vllm)."}
    )
    vllm_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "JSON, further arguments of vllm.LLM: '{\"tensor_parallel_size\": 2}'."}
    )
    compare: list[str] = field(
        default_factory=list, metadata={"help": "Print one table of these output directories, and nothing else."}
    )

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
            raise ValueError("vllm_kwargs is set, but the backend is transformers: leave it out, or install vllm.")
        if self.batch_size is None:
            self.batch_size = BATCH_SIZES[self.backend]
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be >= 1; got {self.batch_size}.")
        self.output_dir = self.output_dir or f"outputs/evaluation/{self.model.strip('/').replace('/', '--')}"
        self.sampling  # noqa: B018  (checks its values)

    @property
    def sampling(self) -> Sampling:
        """How answers are sampled."""
        return Sampling(self.samples, self.temperature, self.top_p, self.max_new_tokens, self.seed)


def evaluate_command(args: EvaluationArguments) -> str:
    """Evaluate, or compare finished evaluations; return the table.

    Raises:
        ValueError: For anything that does not fit, before a model is loaded: benchmarks, an output directory of
            other settings, a model that is not there.
    """
    if args.compare:
        return table([read_results(Path(directory)) for directory in args.compare])
    directory = Path(args.output_dir)
    problems = load_problems(args.benchmarks, args.template)
    settings = {name: value for name, value in asdict(args).items() if name not in ("output_dir", "compare")}
    settings |= {"problems": _digest(problems), "weights": _weights(args.model)}
    assert args.batch_size is not None  # set by __post_init__
    parts = chunks(problems, args.batch_size, args.samples)
    records = run(directory, settings, parts, lambda: _evaluator(args))
    versions = {name: version(name) for name in ("torch", "transformers", "math-verify")}
    if args.backend == "vllm":
        import vllm  # noqa: PLC0415  (optional; its distribution has several names)

        versions["vllm"] = vllm.__version__
    versions["cppo-trl"] = __version__
    return write_results(directory, settings, records, versions)


def _evaluator(args: EvaluationArguments) -> Evaluator:
    try:
        tokenizer = _tokenizer(args.model)
        generate = _generator(args, tokenizer)
    except OSError as error:
        raise ValueError(
            f"model {args.model!r} cannot be loaded: {error}\nWithout a network, fetch it elsewhere with "
            f"`hf download {args.model} --local-dir DIRECTORY`, and give the directory as the model."
        ) from error
    return Evaluator(generate, tokenizer, args.sampling, template_kwargs=args.chat_template_kwargs or {})  # type: ignore[arg-type]


def _generator(args: EvaluationArguments, tokenizer: PreTrainedTokenizerBase) -> Generator:
    if args.backend == "vllm":
        return VLLMGenerator(args.model, args.dtype, progress=True, **args.vllm_kwargs)  # type: ignore[arg-type]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype, device_map="auto")
    return TransformersGenerator(model, tokenizer, args.batch_size, progress=True)  # type: ignore[arg-type]


def _tokenizer(model: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError):
        base = adapter_base(model)
        if base is None:
            raise
        return AutoTokenizer.from_pretrained(base)  # an adapter that was saved alone


def _json_object(name: str, value: dict[str, Any] | str | None) -> dict[str, Any]:
    try:
        value = json.loads(value) if isinstance(value, str) else value or {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} must be a JSON object; got {value!r} ({error}).") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a JSON object; got {value!r}.")
    return value


def _digest(problems: Sequence[Problem]) -> str:
    return hashlib.sha256(json.dumps([asdict(problem) for problem in problems], default=str).encode()).hexdigest()[:16]


def _weights(model: str) -> str | None:
    """What changes when a local model is written again: its files' sizes and times."""
    files = [file for file in sorted(Path(model).glob("*")) if file.suffix in (".safetensors", ".bin")]
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:16] if stats else None
