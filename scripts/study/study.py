"""A study: methods x seeds x settings on the built-in task. All runs share a warm start and a set of prompts.

A YAML file holds the task, the fields common to all runs, the settings and the methods. Each finished run is a record,
one line of a JSON lines file; a run that has its record is not repeated.
"""

import hashlib
import json
import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback

from cppo_trl.config import CPPOConfig
from cppo_trl.data import arithmetic
from cppo_trl.evaluation import evaluate
from cppo_trl.evaluation.generation import completion_of
from cppo_trl.output.run_files import PROFILES, read_lines, whole_lines
from cppo_trl.rewards import accuracy_reward
from cppo_trl.trainer import CPPOTrainer

SERIES = {
    "reward": "reward",
    "length": "completions/mean_length",
    "masked": "cppo/masked",
    "masked_by_threshold": "cppo/masked_by_threshold",
    "masked_by_budget": "cppo/masked_by_budget",
    "weight": "cppo/weight",
    "divergence": "cppo/divergence/mean",
}
"""A record's per-rollout series, and the logged scalar each is taken from: means over the rollout's updates."""


@dataclass(frozen=True)
class Task:
    """The built-in task: sums of ``terms`` digits, and the warm start of all runs."""

    terms: int = 6
    error_rate: float = 0.25
    warm_start_steps: int = 1000
    hidden: int = 64
    train_problems: int = 8000
    test_problems: int = 64
    seed: int = 0


@dataclass(frozen=True)
class StudyRun:
    """One training run. ``fields`` holds fields of `CPPOConfig`."""

    setting: str
    method: str
    seed: int
    rollouts: int
    responses_per_rollout: int
    updates_per_rollout: int
    stale_rollouts: int = 0
    """Age of the rollout policy, in rollouts."""
    evaluate_every: int = 15
    """Rollouts between two evaluations on the held-out problems."""
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, int]:
        """Identifies a run within its study."""
        return self.setting, self.method, self.seed

    def config(self, output_dir: str) -> CPPOConfig:
        """The run's configuration, validated by `CPPOConfig`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # one update per rollout is intended here
            return CPPOConfig(
                output_dir,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                per_device_train_batch_size=self.responses_per_rollout // self.updates_per_rollout,
                steps_per_generation=self.updates_per_rollout,
                max_steps=self.rollouts * self.updates_per_rollout,
                logging_steps=self.updates_per_rollout,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                seed=self.seed,
                **self.fields,
            )


@dataclass(frozen=True)
class Study:
    """A study, as read from its YAML file."""

    name: str
    task: Task
    runs: tuple[StudyRun, ...]

    @classmethod
    def load(cls, path: Path) -> "Study":
        """Read a study and validate the configuration of every run.

        Raises:
            ValueError: for an unknown key, an unknown method, or a value that `CPPOConfig` rejects.
        """
        content = yaml.safe_load(path.read_text())
        unknown = set(content) - {"task", "common", "settings", "methods", "seeds"}
        if unknown:
            raise ValueError(f"{path}: unknown keys {sorted(unknown)}; known: task, common, settings, methods, seeds.")
        runs = tuple(_expand(path, content))
        with TemporaryDirectory() as directory:
            for run in runs:
                try:
                    run.config(directory)
                except (TypeError, ValueError) as error:
                    raise ValueError(f"{path}: setting {run.setting!r}, method {run.method!r}: {error}") from error
        return cls(path.stem, Task(**content.get("task", {})), runs)


def _expand(path: Path, content: Mapping[str, Any]) -> Iterator[StudyRun]:
    of_the_run = {
        name for name in StudyRun.__dataclass_fields__ if name not in ("setting", "method", "seed", "fields")
    }
    for setting, changes in content["settings"].items():
        changes = dict(changes or {})  # noqa: PLW2901
        methods, seeds = changes.pop("methods", list(content["methods"])), changes.pop("seeds", content["seeds"])
        missing = [method for method in methods if method not in content["methods"]]
        if missing:
            raise ValueError(f"{path}: setting {setting!r} names {missing}, which `methods` does not define.")
        for seed in seeds:  # outermost: an interrupted study has all methods on some seeds
            for method in methods:
                merged = {**content["common"], **changes, **(content["methods"][method] or {})}
                schedule = {name: merged.pop(name) for name in of_the_run if name in merged}
                yield StudyRun(str(setting), method, seed, **schedule, fields=merged)


def prepare(task: Task, directory: Path) -> Path:
    """Path of the task's warm start below ``directory``; trained on the first call."""
    name = "-".join(str(value) for value in asdict(task).values())
    model = directory / f"warm-start-{name}"
    if not (model / "config.json").exists():
        _, held_out = _problems(task)
        arithmetic.warm_start(
            model,
            terms=task.terms,
            error_rate=task.error_rate,
            seed=task.seed,
            exclude=set(held_out["prompt"]),
            steps=task.warm_start_steps,
            hidden=task.hidden,
        )
    return model


def digest(warm_start: Path) -> str:
    """Identifies a warm start: the first half of the SHA-256 of its weights."""
    return hashlib.sha256((warm_start / "model.safetensors").read_bytes()).hexdigest()[:32]


def _problems(task: Task) -> tuple[Any, Any]:
    return arithmetic.splits(task.train_problems, task.test_problems, task.terms, task.seed)


class _Evaluation(TrainerCallback):
    """Measures held-out accuracy before the first update and every ``evaluate_every`` rollouts."""

    def __init__(self, run: StudyRun, measure: Callable[[Any], Any], on_rollout: Callable[[], None]) -> None:
        self.run, self.measure, self.on_rollout = run, measure, on_rollout
        self.points: list[list[float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._measure(0, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rollout, within = divmod(state.global_step, self.run.updates_per_rollout)
        if within:
            return
        self.on_rollout()
        if rollout % self.run.evaluate_every == 0 or rollout == self.run.rollouts:
            self._measure(rollout, kwargs["model"])

    def _measure(self, rollout: int, model: Any) -> None:
        accuracy = self.measure(model)
        self.points.append([rollout, accuracy.avg_at_k, accuracy.avg_at_k_stderr, accuracy.greedy])


class LaggedRollouts:
    """A ``rollout_func`` that samples from the weights of ``lag`` rollouts ago, as an asynchronous engine does."""

    def __init__(self, lag: int) -> None:
        self.lag = lag
        self.snapshots: deque[dict[str, Tensor]] = deque(maxlen=lag + 1)
        self.model: Any = None

    @torch.no_grad()
    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        """Complete plain-text prompts; log-probs are the lagged policy's, at the run's temperature."""
        self.snapshots.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
        if self.model is None:
            self.model = type(trainer.model)(trainer.model.config).eval()  # a deepcopy would call the patched forward
        self.model.load_state_dict(self.snapshots[0])
        args, pad, eos = trainer.args, trainer.processing_class.pad_token_id, trainer.processing_class.eos_token_id
        inputs = trainer.processing_class(prompts, return_tensors="pt", padding=True, padding_side="left")
        width = inputs["input_ids"].size(1)
        output = self.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=True,
            temperature=args.temperature,
            top_k=0,
            max_new_tokens=args.max_completion_length,
            pad_token_id=pad,
        )
        answers = [torch.tensor(completion_of(row, eos).tokens) for row in output[:, width:].tolist()]
        completion = pad_sequence(answers, batch_first=True, padding_value=pad)
        answered = pad_sequence([torch.ones_like(row) for row in answers], batch_first=True)
        attention = torch.cat([inputs["attention_mask"], answered], 1)
        logits = self.model(input_ids=torch.cat([inputs["input_ids"], completion], 1), attention_mask=attention).logits
        logps = (logits[:, width - 1 : -1] / args.temperature).log_softmax(-1)
        sampled = logps.gather(-1, completion.unsqueeze(-1)).squeeze(-1)
        return {
            "prompt_ids": trainer.processing_class(prompts)["input_ids"],
            "completion_ids": [row.tolist() for row in answers],
            "logprobs": [row[: len(answer)].tolist() for row, answer in zip(sampled, answers, strict=True)],
        }


def train(
    run: StudyRun, task: Task, warm_start: Path, on_rollout: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Train one run and return its record.

    Returns:
        The fields of the run, the task, the series of `SERIES` (one value per rollout), ``evaluations`` (rollout,
        avg@16, its standard error, greedy accuracy), ``profile`` (`metrics.position_profile` summed over the run),
        ``seconds`` and ``versions``.
    """
    problems, test = _problems(task)
    tokenizer = AutoTokenizer.from_pretrained(warm_start)
    with TemporaryDirectory() as directory:
        config = run.config(directory)
        sampling = {"max_new_tokens": config.max_completion_length, "seed": task.seed}
        held_out = (tokenizer, test["prompt"], test["solution"], accuracy_reward)
        evaluation = _Evaluation(run, lambda model: evaluate(model, *held_out, **sampling), on_rollout)
        trainer = CPPOTrainer(
            str(warm_start),
            accuracy_reward,
            config,
            train_dataset=problems,
            rollout_func=LaggedRollouts(run.stale_rollouts) if run.stale_rollouts else None,
            callbacks=[evaluation],
        )
        trainer.remove_callback(PrinterCallback)
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        profiles = read_lines(Path(directory) / PROFILES)
    rows = [row for row in trainer.state.log_history if "reward" in row]
    return {
        **asdict(run),
        "task": asdict(task),
        "warm_start": digest(warm_start),
        **{name: [_short(row.get(logged, math.nan)) for row in rows] for name, logged in SERIES.items()},
        "evaluations": [[_short(value) for value in point] for point in evaluation.points],
        "profile": {
            name: [_short(math.fsum(p[name][i] for p in profiles)) for i in range(len(profiles[0][name]))]
            for name in profiles[0]
            if name != "step"
        },
        "seconds": round(seconds, 1),
        "versions": {name: version(name) for name in ("cppo-trl", "trl", "transformers", "torch")},
    }


def _short(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


def finished(path: Path, study: Study, warm_start: str | None = None) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Records of a study's finished runs, by `StudyRun.key`. An incomplete last line is ignored.

    Args:
        path: the JSON lines file.
        study: the study.
        warm_start: `digest` of the warm start that the remaining runs use, or None to skip that check.

    Raises:
        ValueError: if a record has other fields, another task, or another warm start.
    """
    records = {(row["setting"], row["method"], row["seed"]): row for row in whole_lines(path)}
    records = {run.key: records[run.key] for run in study.runs if run.key in records}
    for run in study.runs:
        if run.key not in records:
            continue
        record = records[run.key]
        expected = json.loads(json.dumps({**asdict(run), "task": asdict(study.task)}))
        changed = [name for name, value in expected.items() if record[name] != value]
        if warm_start not in (None, record["warm_start"]):
            changed.append("warm_start")
        if changed:
            raise ValueError(
                f"{path} holds {run.key} with a different {', '.join(changed)}. Remove its line to repeat the run, or "
                "pass another --output."
            )
    return records
