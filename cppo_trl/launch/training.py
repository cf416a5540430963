"""A training run from its configuration: data, rewards, trainer, checkpoint, card. What ``cppo-trl train`` calls."""

import copy
import gc
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import datasets
from datasets import load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from transformers import TrainerCallback
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)

from cppo_trl.config import CPPOConfig
from cppo_trl.data.sources import require_on_hub
from cppo_trl.evaluation import EvaluationCallback, Problem, Sampling, load_problems
from cppo_trl.evaluation.command import require_model
from cppo_trl.fields import documented
from cppo_trl.launch.parsing import parse
from cppo_trl.output.callbacks import SaveOnInterrupt
from cppo_trl.output.checkpoints import TrainingFinished, checkpoint_to_resume, saving
from cppo_trl.output.hub import push, require_repository
from cppo_trl.output.model_card import CURVES
from cppo_trl.output.run_files import exclusive
from cppo_trl.rules import import_object
from cppo_trl.seam.inputs import require_columns, require_rows
from cppo_trl.trainer import CPPOTrainer, check_trl

if TYPE_CHECKING:
    from cppo_trl.asynchronous.config import AsyncCPPOConfig
    from cppo_trl.asynchronous.trainer import AsyncCPPOTrainer

RunConfig = Union[CPPOConfig, "AsyncCPPOConfig"]
RunTrainer = Union[CPPOTrainer, "AsyncCPPOTrainer"]


@documented
@dataclass
class CPPOScriptArguments(ScriptArguments):
    """Arguments of a training run, in addition to `CPPOConfig`, `trl.ModelConfig` and `trl.DatasetMixtureConfig`.

    Args:
        asynchronous: train with `AsyncCPPOTrainer`; `AsyncCPPOConfig` then takes the place of `CPPOConfig`.
        reward_funcs: dotted import paths of reward functions in TRL's signature.
        eval_benchmarks: benchmarks or files to evaluate on during training, as for ``cppo-trl evaluate``; independent
            of TRL's ``eval_strategy``.
        eval_every: updates between two such evaluations.
        eval_samples: answers to each problem.
        eval_temperature: temperature of these answers.
        eval_top_p: top-p of these answers.
        eval_max_new_tokens: longest answer in tokens; None for ``max_completion_length``.
        eval_template: as ``template`` of ``cppo-trl evaluate``.
    """

    asynchronous: bool = False
    reward_funcs: list[str] = field(default_factory=lambda: ["cppo_trl.rewards.accuracy_reward"])
    eval_benchmarks: list[str] = field(default_factory=list)
    eval_every: int = 100
    eval_samples: int = 16
    eval_temperature: float = 0.7
    eval_top_p: float = 0.95
    eval_max_new_tokens: int | None = None
    eval_template: str | None = None


ARGUMENT_TYPES = (CPPOScriptArguments, CPPOConfig, ModelConfig, DatasetMixtureConfig)


@dataclass
class _AsyncModelConfig(ModelConfig):
    dtype: str | None = field(default=None, init=False)  # TRL's AsyncGRPOConfig has it as well


def argument_types(args: Sequence[str] | None = None) -> tuple[type[Any], ...]:
    """`ARGUMENT_TYPES`, or those of an asynchronous run where the recipe or the command line asks for one."""
    script, *_ = parse((CPPOScriptArguments,), args, others=True)
    if not script.asynchronous:
        return ARGUMENT_TYPES
    from cppo_trl.asynchronous.config import AsyncCPPOConfig  # noqa: PLC0415 (TRL warns that it is experimental)

    return (CPPOScriptArguments, AsyncCPPOConfig, _AsyncModelConfig, DatasetMixtureConfig)


def parse_arguments(
    args: Sequence[str] | None = None, **attributes: Any
) -> tuple[CPPOScriptArguments, RunConfig, ModelConfig, DatasetMixtureConfig]:
    """Parse ``--config FILE.yaml`` and command-line fields, which take precedence.

    Args:
        args: the command line; None for this process's own.
        attributes: class attributes that replace those of the configuration.

    Raises:
        ValueError: as `cppo_trl.launch.parsing.parse`, or for what an asynchronous run cannot do.
    """
    kinds = list(argument_types(args))
    kinds[1] = type(f"{kinds[1].__name__}OfRun", (kinds[1],), attributes) if attributes else kinds[1]
    script, config, model, mixture = parse(kinds, args)
    if script.asynchronous:
        model.dtype = config.dtype
        _refuse(script, config, model)
    return script, config, model, mixture


def _refuse(script: CPPOScriptArguments, config: RunConfig, model: ModelConfig) -> None:
    """Refuse what an asynchronous run cannot do."""
    for name, given, why in (
        ("eval_benchmarks", script.eval_benchmarks, "evaluate its checkpoints with cppo-trl evaluate"),
        ("eval_strategy", config.eval_strategy != "no", "evaluate its checkpoints with cppo-trl evaluate"),
        ("load_in_8bit", model.load_in_8bit, "the server would sample from other weights"),
        ("load_in_4bit", model.load_in_4bit, "the server would sample from other weights"),
        ("attn_implementation", model.attn_implementation, "leave it out, as TRL brings its own for packed rows"),
    ):
        if given:
            raise ValueError(f"{name} does not go with asynchronous: true: {why}.")


def main(arguments: Sequence[str]) -> None:
    """Train as a command line says, and upload the result where the recipe asks for it."""
    trainer = train(*parse_arguments(arguments), callbacks=[SaveOnInterrupt()])
    trainer.accelerator.print(f"Model saved to {trainer.args.output_dir}")
    push(trainer)
    trainer.end()
    del trainer
    gc.collect()  # a process group that the wrapped model keeps alive must not outlast the interpreter


def train(
    script: CPPOScriptArguments,
    config: RunConfig,
    model: ModelConfig,
    mixture: DatasetMixtureConfig,
    callbacks: Sequence[TrainerCallback] = (),
    drop_callbacks: Sequence[type[TrainerCallback]] = (),
) -> RunTrainer:
    """Train, and save model, log, curves and card to ``config.output_dir``; `cppo_trl.output.hub.push` uploads them.

    ``resume_from_checkpoint`` may be a path, or ``True`` for the last complete checkpoint in ``output_dir`` and a
    fresh start where there is none. ``callbacks`` are added to the trainer's own; those of the types in
    ``drop_callbacks`` are removed. The arguments are left as they are.

    Returns:
        The trainer, with its model and its log history.

    Raises:
        ValueError: if no dataset, model or reward is named, a dataset lacks a column or has fewer rows than a rollout
            has prompts, or ``output_dir`` cannot be written to, is being written to by another run, or holds
            checkpoints of an earlier run that ``resume_from_checkpoint`` does not continue.
        RunError: if the Hub refuses, the loss or a weight is not finite, saving fails, or the server of an
            asynchronous run dies.
    """
    check_trl()
    if not model.model_name_or_path:
        raise ValueError("model_name_or_path must name a model on the Hub or a local directory.")
    main_process = config.process_index == 0
    with exclusive(Path(config.output_dir), main_process):
        resume = checkpoint_to_resume(config.output_dir, config.resume_from_checkpoint, main_process)
        rewards = [import_object(path, "reward_funcs") for path in script.reward_funcs]
        evaluation = _evaluation(script, config)
        data = load_data(script, config, mixture)
        data[script.dataset_train_split].info.dataset_name = ", ".join(dataset_names(script, mixture))
        require_repository(config)
        require_model(model.model_name_or_path)
        given: dict[str, Any] = {
            "train_dataset": data[script.dataset_train_split],
            "callbacks": list(callbacks),
            "peft_config": get_peft_config(model),
        }
        config, name = _with_loading(config, model), model.model_name_or_path
        trainer: RunTrainer
        if isinstance(config, CPPOConfig):
            given["eval_dataset"] = data[script.dataset_test_split] if config.eval_strategy != "no" else None
            trainer = CPPOTrainer(name, rewards, config, **given, quantization_config=get_quantization_config(model))
        else:
            from cppo_trl.asynchronous.trainer import AsyncCPPOTrainer  # noqa: PLC0415

            trainer = AsyncCPPOTrainer(name, rewards, config, **given)
        if evaluation:
            trainer.add_callback(EvaluationCallback(trainer, *evaluation, every=script.eval_every))
        for callback in drop_callbacks:
            trainer.remove_callback(callback)
        with suppress(TrainingFinished):
            trainer.train(resume_from_checkpoint=resume)
        _save(trainer, [name for name in dataset_names(script, mixture) if not os.path.exists(name)])
    return trainer


def _with_loading(config: RunConfig, model: ModelConfig) -> RunConfig:
    """The configuration with what ``from_pretrained`` takes of `trl.ModelConfig`."""
    loading = {name: getattr(model, name) for name in ("attn_implementation", "dtype")}
    if not isinstance(config, CPPOConfig):
        del loading["attn_implementation"]  # TRL gives its own
    config = copy.copy(config)
    config.model_init_kwargs = {"revision": model.model_revision, **loading, **(config.model_init_kwargs or {})}
    return config


def _save(trainer: RunTrainer, datasets_on_hub: list[str]) -> None:
    with saving(trainer.args.output_dir):
        trainer.save_state()
        trainer.save_model(trainer.args.output_dir, _internal_call=True)  # else it would upload already
        if trainer.is_world_process_zero():
            _draw_curves(trainer)
        trainer.create_model_card(dataset_name=datasets_on_hub[0] if len(datasets_on_hub) == 1 else None)
    trainer.accelerator.wait_for_everyone()  # no process exits while the main one writes


def _draw_curves(trainer: RunTrainer) -> None:
    try:
        from cppo_trl.report.pictures import plot_curves  # noqa: PLC0415 (needs matplotlib, which is optional)
    except ImportError:
        return
    path = Path(trainer.args.output_dir, CURVES)
    plot_curves(trainer.state.log_history, path, title=path.absolute().parent.name)


def _evaluation(script: CPPOScriptArguments, config: RunConfig) -> tuple[list[Problem], Sampling] | None:
    """What to evaluate on during training, and how; None without ``eval_benchmarks``."""
    if not script.eval_benchmarks:
        return None
    if script.eval_every < 1:
        raise ValueError(f"eval_every must be >= 1; got {script.eval_every}.")
    longest = script.eval_max_new_tokens or config.max_completion_length
    sampling = Sampling(script.eval_samples, script.eval_temperature, script.eval_top_p, longest, config.seed)
    return load_problems(script.eval_benchmarks, script.eval_template), sampling


def dataset_names(script: CPPOScriptArguments, mixture: DatasetMixtureConfig) -> list[str]:
    """Names on the Hub or local paths of the training data."""
    return [dataset.path for dataset in mixture.datasets] or [script.dataset_name or ""]


def load_data(script: CPPOScriptArguments, config: RunConfig, mixture: DatasetMixtureConfig) -> Any:
    """Load the datasets of a run, split by name, and check what training needs of them.

    Raises:
        ValueError: if none is named, a split or a column that training or a reward reads is missing, or the rows are
            too few.
    """
    try:
        if mixture.datasets:
            data = get_dataset(mixture)
        elif not script.dataset_name:
            raise ValueError("dataset_name (or datasets) must name a dataset on the Hub or a local directory.")
        elif os.path.exists(os.path.join(script.dataset_name, "dataset_dict.json")):
            data = load_from_disk(script.dataset_name)
        else:
            cached = Path(datasets.config.HF_DATASETS_CACHE, script.dataset_name.replace("/", "___"))
            if not (os.path.exists(script.dataset_name) or cached.exists()):
                require_on_hub(script.dataset_name, "dataset", "Check dataset_name, or make it: cppo-trl prepare-data")
            data = load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)
    except (DatasetGenerationError, StopIteration, OSError) as error:  # a file without rows, or not in its format
        why = error.__cause__ or (str(error) if isinstance(error, OSError) else "it is empty")
        raise ValueError(f"dataset_name: cannot read {script.dataset_name!r}: {why}") from error
    for name in ("dataset_train_split", *(["dataset_test_split"] if config.eval_strategy != "no" else [])):
        if (split := getattr(script, name)) not in data:
            raise ValueError(f"The dataset has no split {split!r}; it has {list(data)}. Set {name}.")
        columns = data[split].column_names
        if columns is not None and "prompt" not in columns:
            raise ValueError(f"Split {split!r} has no column 'prompt'; it has {columns}. Rename another to it.")
    if script.asynchronous and isinstance(next(iter(data[script.dataset_train_split]))["prompt"], str):
        raise ValueError("The column 'prompt' holds texts: with asynchronous: true it must hold messages.")
    require_rows(data[script.dataset_train_split], config)
    rewards = [import_object(path, "reward_funcs") for path in script.reward_funcs]
    require_columns(data[script.dataset_train_split], rewards)
    return data
