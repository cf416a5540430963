"""`EvaluationCallback`: the metrics of ``cppo-trl evaluate`` while a model trains."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback
from trl.distributed import DistributedBackend
from trl.models import unwrap_model_for_generation

from cppo_trl.evaluation.generation import (
    EngineGenerator,
    Generator,
    Sampling,
    TransformersGenerator,
    end_tokens,
    undisturbed,
)
from cppo_trl.evaluation.grading import Evaluator, Reward
from cppo_trl.evaluation.metrics import Record, all_metrics, table
from cppo_trl.evaluation.problems import Problem
from cppo_trl.evaluation.runner import chunks
from cppo_trl.rewards import accuracy_reward


class EvaluationCallback(TrainerCallback):
    """Evaluates a model before the first update, at regular intervals, and after the last update.

    Works with `trl.GRPOTrainer` and its subclasses. Metrics are logged as ``eval_avg@16`` and so on, which
    ``report_to`` integrations show as ``eval/avg@16``. Of several benchmarks, ``eval_avg@16`` is the mean and
    ``eval_aime24/avg@16`` is that of one. Processes share the problems. With vLLM the trainer's engine generates,
    otherwise ``generate`` does. Modes of the model and torch's random state are restored.

    As TRL's `LogCompletionsCallback`, it is added to an existing trainer, whose engine, wrapped model and log it uses:
    ``trainer.add_callback(EvaluationCallback(trainer, ...))``.

    Args:
        trainer: The trainer.
        problems: From `load_problems` or `problems_of`.
        sampling: How completions are sampled; independent of how rollouts are.
        every: Updates between two evaluations.
        reward: As in `cppo_trl.evaluation.grading.grade`.
    """

    def __init__(
        self,
        trainer: Trainer,
        problems: Sequence[Problem],
        sampling: Sampling,
        *,
        every: int,
        reward: Reward = accuracy_reward,
    ):
        self.trainer, self.problems, self.sampling = trainer, problems, sampling
        self.every, self.reward = every, reward
        self.batch_size = trainer.args.per_device_eval_batch_size
        self._results: list[dict[str, Any]] = []  # of each evaluation, as `table` takes them

    def card_sections(self) -> dict[str, str]:
        """Sections for the model card, title to markdown: the first and the last evaluation."""
        return {"Evaluation": table([*self._results[:1], *self._results[1:][-1:]])} if self._results else {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate, unless training resumes from a checkpoint."""
        if state.global_step == 0:
            self.evaluate()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate if it is time."""
        if state.global_step % self.every == 0 or state.global_step >= state.max_steps:
            self.evaluate()

    def evaluate(self) -> None:
        """Evaluate now and log the metrics; every process must call it."""
        metrics = all_metrics(self._records())
        run = {"samples": self.sampling.samples, "model": f"update {self.trainer.state.global_step}"}
        self._results.append({"settings": run, "benchmarks": dict(metrics)})
        logs = dict(metrics.pop("mean", {}) or next(iter(metrics.values())))
        if len(metrics) > 1:
            logs |= {f"{name}/{key}": value for name, values in metrics.items() for key, value in values.items()}
        control = self.trainer.control
        training_row_due = control.should_log  # logging clears it
        # transformers' log: that of GRPOTrainer would also write out the training metrics collected so far
        Trainer.log(self.trainer, {f"eval_{name}": value for name, value in logs.items() if value is not None})
        control.should_log = training_row_due

    def _records(self) -> list[Record]:
        """Answer all problems; every process gets all records."""
        trainer, accelerator = self.trainer, self.trainer.accelerator
        batch, samples = self.batch_size, self.sampling.samples
        if trainer.args.use_vllm:  # the engine does its own batching: one part per process
            batch = math.ceil(len(self.problems) / accelerator.num_processes) * samples
        parts = chunks(self.problems, batch, samples)
        # sharded models need every process in every forward pass: a process without a part repeats the last one
        with accelerator.split_between_processes(parts, apply_padding=True) as mine, self._generator() as generate:
            template_kwargs = trainer.args.chat_template_kwargs or {}
            evaluator = Evaluator(generate, trainer.processing_class, self.sampling, self.reward, template_kwargs)
            gathered = gather_object([record for part in mine for record in evaluator(part)])
        records = {(record.benchmark, record.id): record for record in gathered}
        return [records[problem.benchmark, problem.id] for problem in self.problems]

    @contextmanager
    def _generator(self) -> Iterator[Generator]:
        trainer = self.trainer
        with undisturbed(trainer.model):
            if trainer.args.use_vllm:
                trainer.vllm_generation.sync_weights()
                yield EngineGenerator(trainer.vllm_generation, end_tokens(trainer.model, trainer.processing_class))
                return
            with (
                unwrap_model_for_generation(
                    trainer.model_wrapped,
                    trainer.accelerator,
                    gather_deepspeed3_params=trainer.args.ds3_gather_for_generation,
                    gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
                ) as model,
                DistributedBackend(trainer.accelerator).summon_full_params(trainer.model_wrapped, recurse=False),
            ):
                yield TransformersGenerator(model, trainer.processing_class, self.batch_size)
