"""What users hand to a trainer: arguments, data, rewards and packages before a model is loaded; then the model."""

import functools
import inspect
import math
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.integrations.integration_utils import get_available_reporting_integrations

from cppo_trl.config import CPPOConfig


def check_arguments(config: CPPOConfig, arguments: Mapping[str, Any]) -> None:
    """Refuse arguments of the trainer that do not go with its configuration, before a model is loaded.

    Args:
        config: the trainer's configuration.
        arguments: the others, by `GRPOTrainer`'s names.

    Raises:
        ValueError: if one does not, or a package that it needs is missing; as `require_rows` and `require_columns`.
    """
    for missing in missing_packages(config):
        raise ValueError(missing)
    for name in ("tools", "rollout_func", "environment_factory"):
        if config.uses_topk and not config.topk_of_policy and arguments.get(name):
            raise ValueError(
                f"{name} with cppo_divergence={config.cppo_divergence!r}: an engine gives no Top-K of such rollouts. "
                "Set cppo_topk_source to policy, or cppo_divergence to binary_tv."
            )
    if config.uses_topk and getattr(arguments.get("rollout_func"), "lag", False):
        raise ValueError(
            "rollout_func.lag says that it samples from older weights, whose Top-K the trained model does not have. "
            "Set cppo_divergence to binary_tv or binary_kl."
        )
    if config.cast_lm_head_to_fp32 and arguments.get("peft_config"):
        model, init = arguments["model"], config.model_init_kwargs
        given = init if isinstance(init, dict) else {}
        of_the_model = AutoConfig.from_pretrained(model, **given) if isinstance(model, str) else model.config
        if of_the_model.get_text_config().tie_word_embeddings:
            raise ValueError(
                "cast_lm_head_to_fp32=True with a peft_config: TRL 1.16 fails on it with tied word "
                "embeddings. Set cast_lm_head_to_fp32 to false."
            )
    require_rows(arguments.get("train_dataset"), config)
    require_columns(arguments.get("train_dataset"), arguments.get("reward_funcs"))


def require_rows(dataset: Any, config: Any) -> None:
    """Refuse a run that would make no update.

    TRL takes whole rollouts from the dataset, so one with fewer rows than a rollout has prompts trains for zero steps.
    A dataset without a length (a streamed one) is not checked; an asynchronous run repeats the dataset.

    Args:
        dataset: the training data, a row per prompt.
        config: the trainer's configuration.

    Raises:
        ValueError: if there are fewer rows than prompts in a rollout, or the updates or epochs are zero.
    """
    if config.max_steps == 0:
        raise ValueError("max_steps=0 makes no update: set a number of updates, or -1 for num_train_epochs.")
    if config.max_steps < 0 and config.num_train_epochs <= 0:
        raise ValueError(f"num_train_epochs={config.num_train_epochs:g} makes no update: set max_steps or raise it.")
    if not isinstance(config, CPPOConfig):
        return
    prompts = config.generation_batch_size // config.num_generations
    if hasattr(dataset, "__len__") and len(dataset) < prompts:
        raise ValueError(
            f"The training data has {len(dataset)} rows and a rollout takes {prompts} prompts: add data, or lower "
            f"generation_batch_size={config.generation_batch_size} (responses)."
        )


_EXTRAS = {name: f"cppo-trl[{name}]" for name in ("vllm", "deepspeed", "trackio")}


def missing_packages(config: Any, sharding: str = "none") -> list[str]:
    """What the run needs and is not installed, with the fix.

    Args:
        config: the run's, synchronous or not.
        sharding: a sharding strategy, as in `cppo_trl.launch.plan.Layout`.
    """
    trackers = set(config.report_to) - set(get_available_reporting_integrations())
    switch = "use_vllm" if isinstance(config, CPPOConfig) else "asynchronous"
    wanted = {
        "vllm": (f"set {switch} to false", getattr(config, switch, True) and not find_spec("vllm")),
        "deepspeed": ("use --accelerate_config fsdp2", sharding.startswith("zero") and not find_spec("deepspeed")),
        **dict.fromkeys(sorted(trackers), ("set report_to to none", True)),
    }
    return [
        f"{name} is not installed here: pip install '{_EXTRAS.get(name, name)}', or {other}."
        for name, (other, missing) in wanted.items()
        if missing
    ]


_GIVEN = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments"}
"""What TRL gives a reward besides the columns of the dataset."""


def require_columns(dataset: Any, reward_funcs: Any) -> None:
    """Refuse prompts of the wrong form, rewards that cannot be called, and rewards that read a column that is missing.

    Raises:
        ValueError: for each of these.
    """
    columns = set(getattr(dataset, "column_names", None) or ())
    if "prompt" in columns and hasattr(dataset, "__len__"):
        prompt = dataset[0]["prompt"]
        messages = isinstance(prompt, list) and all(
            isinstance(m, dict) and {"role", "content"} <= m.keys() for m in prompt
        )
        if not (isinstance(prompt, str) or messages):
            raise ValueError(f"The column 'prompt' must hold a text, or messages; got {prompt!r:.80}.")
    for reward in reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]:
        if isinstance(reward, str | torch.nn.Module) or reward is None:
            continue
        if not callable(reward):
            raise ValueError(f"reward_funcs: {reward!r} is not callable. Give a function of the completions.")
        parameters = inspect.signature(reward).parameters.values()
        reads = {
            p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        }
        if columns and (lacking := sorted(reads - columns - _GIVEN)):
            raise ValueError(
                f"reward_funcs: {_name(reward)} reads the column {', '.join(map(repr, lacking))}; the dataset has "
                f"{sorted(columns)}. Rename one, or name another reward."
            )


def checked(reward_funcs: Any) -> Any:
    """The rewards, each of which raises ValueError where it does not return a number or None for each completion."""
    if isinstance(reward_funcs, list):
        return [checked(reward) for reward in reward_funcs]
    call = getattr(reward_funcs, "__call__", None)  # noqa: B004
    if (
        call is None
        or isinstance(reward_funcs, torch.nn.Module)
        or any(map(inspect.iscoroutinefunction, (reward_funcs, call)))
    ):
        return reward_funcs

    @functools.wraps(reward_funcs)
    def reward(*args: Any, completions: Any, **kwargs: Any) -> Any:
        scores = reward_funcs(*args, completions=completions, **kwargs)
        valid = hasattr(scores, "__len__") and len(scores) == len(completions)
        if not (valid and all(s is None or (hasattr(s, "__float__") and not math.isnan(s)) for s in scores)):
            raise ValueError(
                f"reward_funcs: {_name(reward_funcs)} must return {len(completions)} numbers, one for each completion "
                f"(None to abstain); got {scores!r:.80}."
            )
        return scores

    return reward


def _name(reward: Any) -> str:
    return getattr(reward, "__name__", type(reward).__name__)


def check_model(config: CPPOConfig, model: PreTrainedModel) -> None:
    """Warn of dropout that stays on, and refuse a K that the vocabulary does not have.

    Raises:
        ValueError: for such a K.
    """
    text_config = model.config.get_text_config()
    if config.disable_dropout and getattr(text_config, "attention_dropout", None):
        dropout = f"attention_dropout={text_config.attention_dropout} stays on and counts as divergence."
        warnings.warn(f'{dropout} Set model_init_kwargs={{"attention_dropout": 0.0}}.', stacklevel=3)
    if config.uses_topk and config.cppo_topk > text_config.vocab_size:
        raise ValueError(f"cppo_topk={config.cppo_topk} exceeds the model's vocabulary of {text_config.vocab_size}.")
