"""A training run from its configuration: data, rewards, trainer, checkpoint, card. What ``scripts/train.py`` calls."""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import load_dataset, load_from_disk
from transformers import TrainerCallback
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)

from cppo_trl.config import CPPOConfig
from cppo_trl.evaluation import EvaluationCallback, Problem, Sampling, load_problems
from cppo_trl.output.checkpoints import ExactResume, TrainingFinished, checkpoint_to_resume, require_writable, saving
from cppo_trl.output.hub import ReportFailedPushes, require_repository
from cppo_trl.output.model_card import CURVES, command_line
from cppo_trl.trainer import CPPOTrainer


@dataclass
class CPPOScriptArguments(ScriptArguments):
    """Arguments of a training run beside `CPPOConfig`, `trl.ModelConfig` and `trl.DatasetMixtureConfig`.

    Args:
        reward_funcs: dotted import paths of reward functions in TRL's signature.
        eval_benchmarks: benchmarks or files to evaluate on during training, as for ``scripts/evaluate.py``; apart from
            TRL's ``eval_strategy``, which needs a split of the dataset and samples as the rollouts do.
        eval_every: updates between two such evaluations.
        eval_samples: answers to each problem.
        eval_temperature: of these samples.
        eval_top_p: of these samples.
        eval_max_new_tokens: longest answer in tokens; null: ``max_completion_length``.
        eval_template: as ``template`` of ``scripts/evaluate.py``.
    """

    reward_funcs: list[str] = field(
        default_factory=lambda: ["cppo_trl.rewards.accuracy_reward"],
        metadata={"help": "Dotted import paths of the reward functions."},
    )
    eval_benchmarks: list[str] = field(
        default_factory=list, metadata={"help": "Benchmarks or files to evaluate on during training."}
    )
    eval_every: int = field(default=100, metadata={"help": "Updates between two evaluations on eval_benchmarks."})
    eval_samples: int = field(default=16, metadata={"help": "Answers to each problem of eval_benchmarks."})
    eval_temperature: float = field(default=0.7, metadata={"help": "Of the samples on eval_benchmarks."})
    eval_top_p: float = field(default=0.95, metadata={"help": "Of the samples on eval_benchmarks."})
    eval_max_new_tokens: int | None = field(
        default=None, metadata={"help": "Longest answer on eval_benchmarks; null: max_completion_length."}
    )
    eval_template: str | None = field(
        default=None, metadata={"help": "How problems are put; null: boxed for named benchmarks, nothing for files."}
    )


ARGUMENT_TYPES = (CPPOScriptArguments, CPPOConfig, ModelConfig, DatasetMixtureConfig)


def parse_arguments(
    args: Sequence[str] | None = None, config_type: type[CPPOConfig] = CPPOConfig
) -> tuple[CPPOScriptArguments, CPPOConfig, ModelConfig, DatasetMixtureConfig]:
    """Parse ``--config FILE.yaml`` and command-line fields, which win over the file's.

    Args:
        args: the command line; None for the process's own.
        config_type: `CPPOConfig`, or a subclass to make in its place.

    Raises:
        ValueError: for a field that no dataclass knows, or a value that `CPPOConfig` refuses.
    """
    parser = TrlParser(tuple(config_type if kind is CPPOConfig else kind for kind in ARGUMENT_TYPES))
    return parser.parse_args_and_config(args)


def train(
    script: CPPOScriptArguments,
    config: CPPOConfig,
    model: ModelConfig,
    mixture: DatasetMixtureConfig,
    callbacks: Sequence[TrainerCallback] = (),
    drop_callbacks: Sequence[type[TrainerCallback]] = (),
) -> CPPOTrainer:
    """Train, and save model, log, curves and card to ``config.output_dir``; `cppo_trl.output.hub.push` uploads them.

    ``resume_from_checkpoint`` may be a path, or ``True`` for the last complete checkpoint in ``output_dir`` and a new
    start where there is none. Callbacks are added to the trainer's own; those of the types ``drop_callbacks`` leave.

    Returns:
        The trainer, with its model and its log history.

    Raises:
        ValueError: if no dataset, model or reward is named, a dataset lacks a column, or ``output_dir`` cannot be
            written to or holds checkpoints of an earlier run that ``resume_from_checkpoint`` does not go on with.
        RunError: if the Hub refuses, the loss or a weight is not finite, or saving fails.
    """
    if not model.model_name_or_path:
        raise ValueError("model_name_or_path must name a model on the Hub or a local directory.")
    require_writable(config.output_dir)
    resume = checkpoint_to_resume(config.output_dir, config.resume_from_checkpoint, config.process_index == 0)
    rewards = [import_reward(path) for path in script.reward_funcs]
    evaluation = _evaluation(script, config)
    data = _load(script, mixture)
    evaluating = config.eval_strategy != "no"
    _check_splits(data, script, evaluating)
    require_repository(config)
    config.model_init_kwargs = _loading(model) | (config.model_init_kwargs or {})
    trainer = CPPOTrainer(
        model.model_name_or_path,
        rewards,
        config,
        train_dataset=data[script.dataset_train_split],
        eval_dataset=data[script.dataset_test_split] if evaluating else None,
        callbacks=[*callbacks, ExactResume()],
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
    trainer.dataset_names = [dataset.path for dataset in mixture.datasets] or [script.dataset_name]
    benchmarks = EvaluationCallback(trainer, *evaluation, every=script.eval_every) if evaluation else None
    _run(trainer, resume, benchmarks, drop_callbacks)
    return trainer


def _loading(model: ModelConfig) -> dict[str, Any]:
    """Of `trl.ModelConfig`, what ``from_pretrained`` takes."""
    return {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    }


def _run(
    trainer: CPPOTrainer,
    resume: str | None,
    benchmarks: EvaluationCallback | None,
    drop_callbacks: Sequence[type[TrainerCallback]],
) -> None:
    trainer.command = command_line(sys.argv)
    if benchmarks:
        trainer.add_callback(benchmarks)
    trainer.add_callback(ReportFailedPushes(trainer))
    for callback in drop_callbacks:
        trainer.remove_callback(callback)
    with suppress(TrainingFinished):
        trainer.train(resume_from_checkpoint=resume)
    trainer.evaluation_table = benchmarks.table if benchmarks else None
    _save(trainer)


def _save(trainer: CPPOTrainer) -> None:
    with saving(trainer.args.output_dir):
        trainer.save_state()
        trainer.save_model(trainer.args.output_dir, _internal_call=True)  # else it would upload: that has its own time
        if trainer.is_world_process_zero():
            _draw_curves(trainer)
        trainer.create_model_card()
    trainer.accelerator.wait_for_everyone()  # no process leaves while the first still writes


def _draw_curves(trainer: CPPOTrainer) -> None:
    try:
        from cppo_trl.report.figures import plot_curves  # noqa: PLC0415 (needs matplotlib, which is optional)
    except ImportError:
        return
    path = Path(trainer.args.output_dir, CURVES)
    plot_curves(trainer.state.log_history, path, title=path.absolute().parent.name)


def _evaluation(script: CPPOScriptArguments, config: CPPOConfig) -> tuple[list[Problem], Sampling] | None:
    """What to evaluate on during training, and how; None for nothing."""
    if not script.eval_benchmarks:
        return None
    if script.eval_every < 1:
        raise ValueError(f"eval_every must be >= 1; got {script.eval_every}.")
    sampling = Sampling(
        script.eval_samples,
        script.eval_temperature,
        script.eval_top_p,
        script.eval_max_new_tokens or config.max_completion_length,
        config.seed,
    )
    return load_problems(script.eval_benchmarks, script.eval_template), sampling


def import_reward(path: str) -> Callable[..., list[float | None]]:
    """The reward function at a dotted path, which may be a file beside the recipe.

    Raises:
        ValueError: if there is none.
    """
    module, _, name = path.rpartition(".")
    sys.path.insert(0, os.getcwd())  # rewards next to the recipe, as in `trl grpo`
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"reward_funcs: cannot import {path!r} ({error}). Give a dotted path, module.function."
        ) from error
    finally:
        sys.path.pop(0)


def _load(script: CPPOScriptArguments, mixture: DatasetMixtureConfig) -> Any:
    if mixture.datasets:
        return get_dataset(mixture)
    if not script.dataset_name:
        raise ValueError("dataset_name (or datasets) must name a dataset on the Hub or a local directory.")
    if os.path.exists(os.path.join(script.dataset_name, "dataset_dict.json")):
        return load_from_disk(script.dataset_name)
    return load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)


def _check_splits(data: Any, script: CPPOScriptArguments, evaluating: bool) -> None:
    _check_split(data, script.dataset_train_split)
    if evaluating:
        _check_split(data, script.dataset_test_split)


def _check_split(data: Any, split: str) -> None:
    if split not in data:
        raise ValueError(
            f"The dataset has no split {split!r}; it has {list(data)}. Set dataset_train_split or _test_split."
        )
    columns = data[split].column_names
    if columns is not None and "prompt" not in columns:
        raise ValueError(
            f"Split {split!r} has no column 'prompt'; it has {columns}. Rename the column of the questions."
        )
