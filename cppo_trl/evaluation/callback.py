"""`EvaluationCallback`: the same numbers while a model trains."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
from trl.distributed import DistributedBackend
from trl.models import unwrap_model_for_generation

from cppo_trl.evaluation.generation import (
    Completion,
    Generator,
    Sampling,
    TransformersGenerator,
    completion_of,
    undisturbed,
)
from cppo_trl.evaluation.grading import Evaluator, Reward
from cppo_trl.evaluation.metrics import Record, all_metrics
from cppo_trl.evaluation.problems import Problem
from cppo_trl.evaluation.report import table
from cppo_trl.evaluation.runner import chunks
from cppo_trl.rewards import accuracy_reward


class EvaluationCallback(TrainerCallback):
    """Evaluates before the first update, every so many updates, and after the last; for `trl.GRPOTrainer` and its kin.

    The numbers go to the trainer's log history as ``eval_avg@16`` and so on, and so to every integration of
    ``report_to``, which show them as ``eval/avg@16``. Of several benchmarks, ``eval_avg@16`` is their mean, and
    ``eval_aime24/avg@16`` that of one. Processes share the problems. A trainer with vLLM answers with its engine, any
    other with ``generate``. The model's mode and torch's random state are left as they were.

    Args:
        trainer: The trainer that it is added to: ``trainer.add_callback(EvaluationCallback(trainer, ...))``.
        problems: What to evaluate on: from `load_problems`, or from `problems_of` a dataset.
        sampling: How answers are sampled, apart from how rollouts are.
        every: Updates between two evaluations.
        reward: As in `cppo_trl.evaluation.grading.grade`.
        batch_size: Answers that a process generates at once, without vLLM; default: ``per_device_eval_batch_size``.
    """

    def __init__(
        self,
        trainer: Trainer,
        problems: Sequence[Problem],
        sampling: Sampling,
        *,
        every: int,
        reward: Reward = accuracy_reward,
        batch_size: int | None = None,
    ):
        self.trainer, self.every, self.sampling, self.reward = trainer, every, sampling, reward
        self.batch_size = batch_size or trainer.args.per_device_eval_batch_size
        self.problems = problems
        self.measured: list[dict[str, Any]] = []  # each evaluation, as `report.table` takes it

    @property
    def table(self) -> str | None:
        """A markdown table of the first and the last evaluation, for a model card."""
        return table([*self.measured[:1], *self.measured[1:][-1:]]) if self.measured else None

    def card_sections(self) -> dict[str, str]:
        """The table for a model card, by the title of its section."""
        return {"Evaluation": self.table} if self.table else {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate, unless training is resumed."""
        if state.global_step == 0:
            self.evaluate()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate if it is time."""
        if state.global_step % self.every == 0 or state.global_step >= state.max_steps:
            self.evaluate()

    def evaluate(self) -> None:
        """Evaluate now and log; every process must call it."""
        accelerator = self.trainer.accelerator
        rank, processes = accelerator.process_index, accelerator.num_processes
        parts = self._parts(processes)
        mine: list[tuple[int, list[Record]]] = []
        with self._generator() as generate:
            evaluator = Evaluator(
                generate,
                self.trainer.processing_class,
                self.sampling,
                self.reward,
                self.trainer.args.chat_template_kwargs or {},
            )
            for at in range(rank, -(-len(parts) // processes) * processes, processes):
                # a process without a part left answers the last one again: sharded models need every process
                mine.append((at, evaluator(parts[min(at, len(parts) - 1)])))
        answered = dict(gather_object(mine))
        metrics = all_metrics([record for at in range(len(parts)) for record in answered[at]])
        update = {"samples": self.sampling.samples, "model": f"update {self.trainer.state.global_step}"}
        self.measured.append({"settings": update, "benchmarks": dict(metrics)})
        logs = dict(metrics["mean"] if len(metrics) > 1 else next(iter(metrics.values())))
        if len(metrics) > 1:
            del metrics["mean"]
            logs |= {f"{name}/{key}": value for name, values in metrics.items() for key, value in values.items()}
        control = self.trainer.control
        training_row_due = control.should_log  # a log clears it
        # transformers' own log: GRPOTrainer's would also write out the training metrics gathered so far
        Trainer.log(self.trainer, {f"eval_{name}": value for name, value in logs.items() if value is not None})
        control.should_log = training_row_due

    def _parts(self, processes: int) -> list[Sequence[Problem]]:
        if getattr(self.trainer, "use_vllm", False):  # an engine batches by itself
            return chunks(self.problems, -(-len(self.problems) // processes), 1)
        return chunks(self.problems, self.batch_size, self.sampling.samples)

    @contextmanager
    def _generator(self) -> Iterator[Generator]:
        trainer = self.trainer
        with undisturbed(trainer.model):
            if getattr(trainer, "use_vllm", False):
                trainer.vllm_generation.sync_weights()
                yield EngineGenerator(trainer.vllm_generation, trainer.processing_class)
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


class EngineGenerator:
    """The engine of a trainer with vLLM, with another sampling for as long as a call takes.

    Seeds are not used: TRL gives its engine none, and with tensor parallelism all processes must draw alike.

    Args:
        engine: TRL's ``VLLMGeneration``, with the model's present weights.
        tokenizer: The model's.
    """

    def __init__(self, engine: Any, tokenizer: PreTrainedTokenizerBase):
        self.engine, self.end = engine, tokenizer.eos_token_id

    def __call__(
        self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int]
    ) -> list[list[Completion]]:
        """As `Generator` says, but for the seeds; every process must call it."""
        most = max(gather_object([len(prompts)]))  # TRL slices what all processes share by the length of one
        rows = [prompts[at % len(prompts)] for at in range(most) for _ in range(sampling.samples)]
        ours = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_completion_length": sampling.max_new_tokens,
            "logprobs": 0,
        }
        theirs = {name: getattr(self.engine, name) for name in ours}
        vars(self.engine).update(ours)
        try:  # of the class: CPPOTrainer wraps the instance's, to keep the rollout's Top-K
            _, completions, _, _ = type(self.engine).generate(self.engine, rows, None, sampling.samples)
        finally:
            vars(self.engine).update(theirs)
        done = [completion_of(list(tokens), self.end) for tokens in completions]
        return [done[at * sampling.samples : (at + 1) * sampling.samples] for at in range(len(prompts))]
