"""What the trainer relies on in TRL and vLLM, checked at start-up and after each weight sync; any mismatch raises."""

import functools
import inspect
import math
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from transformers import AutoConfig, PreTrainedModel
from transformers.integrations.integration_utils import get_available_reporting_integrations

from cppo_trl.config import CPPOConfig, TrustRegionConfig

MAX_MISMATCH_NATS = 0.1
"""Largest mean |log π - log μ| of unmoved weights that is put down to rounding (docs/vllm.md says why)."""

NOTICEABLE_SHARE = 0.1
"""Share of the budget that triggers the warning of `EngineCheck`."""

# TRL 1.16 and PEFT 0.21 call by the old names what transformers 5.23 has renamed
warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing", FutureWarning, r"transformers\.modeling_utils")


def check_hooks(trainer: type, hooks: Mapping[str, list[str]]) -> None:
    """Compare TRL's version and the signatures of a trainer of TRL's with those that ours was written for.

    A later version is taken if its signatures are the same.

    Args:
        trainer: TRL's class.
        hooks: the first parameters of each method that is relied on.

    Raises:
        RuntimeError: if the version is lower or a signature differs.
    """
    installed = version("trl")
    if tuple(map(int, installed.split(".")[:2])) < (1, 16):
        raise RuntimeError(f"TRL {installed} is installed; cppo_trl needs 1.16: pip install 'trl>=1.16,<1.17'.")
    for name, expected in hooks.items():
        method = getattr(trainer, name, None)
        found = list(inspect.signature(method).parameters)[: len(expected)] if method else None
        if found != expected:
            raise RuntimeError(
                f"{trainer.__name__}.{name} of the installed TRL takes {found}, expected {expected}. "
                "Install trl>=1.16,<1.17."
            )


def check_arguments(config: CPPOConfig, arguments: Mapping[str, Any]) -> None:
    """Refuse arguments of the trainer that do not go with its configuration, before a model is loaded.

    Args:
        config: the trainer's.
        arguments: the others, by `GRPOTrainer`'s names.

    Raises:
        ValueError: if one does not, or a package that it needs is missing.
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
                "cast_lm_head_to_fp32=True with a peft_config: TRL 1.16 fails on it where the LM head is the "
                "embedding. Set cast_lm_head_to_fp32 to false."
            )


def require_rows(dataset: Any, config: Any) -> None:
    """Refuse a run that would make no update.

    TRL takes whole rollouts from the dataset, so one with fewer rows than a rollout has prompts trains for zero steps.
    A dataset without a length (a streamed one) is not checked; an asynchronous run goes round and round.

    Args:
        dataset: the training data, a row per prompt.
        config: the trainer's.

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
        sharding: as `cppo_trl.launch.plan.Layout` has it.
    """
    trackers = set(config.report_to) - set(get_available_reporting_integrations())
    switch = "use_vllm" if isinstance(config, CPPOConfig) else "asynchronous"
    wanted = {
        "vllm": (f"set {switch} to false", getattr(config, switch, True) and not find_spec("vllm")),
        "deepspeed": ("take an fsdp2 file", sharding.startswith("zero") and not find_spec("deepspeed")),
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


def keep_fp32_outputs(accelerator: Accelerator) -> None:
    """Let FSDP2 under bf16 hand log-probs back, and reduce gradients, in fp32.

    Accelerate sets all three data types of FSDP2's policy to bf16, so that log π, scored by an fp32 head or not, would
    be rounded on its way out of the model. Call it before the model is prepared.
    """
    if not accelerator.is_fsdp2 or accelerator.mixed_precision != "bf16":
        return
    accelerator.state.fsdp_plugin.mixed_precision_policy = torch.distributed.fsdp.MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=None
    )


def is_reference(model: torch.nn.Module, trained: torch.nn.Module) -> bool:
    """Whether a pass over a rollout scores the reference policy: another model, or the model without its adapter.

    Args:
        model: of the pass, unwrapped.
        trained: the model that is trained, unwrapped.
    """
    if not isinstance(trained, PeftModel):
        return model is not trained
    status = trained.get_model_status()
    return status.enabled is not True or status.active_adapters == ["ref"]


def check_server(info: dict[str, Any], topk: int) -> None:
    """Refuse a vLLM server whose log-probs are not the rollout policy's, or too few.

    Args:
        info: what the server's ``/server_info`` says.
        topk: how many of the likeliest tokens it must return, 0 for the sampled one alone.

    Raises:
        ValueError: with the option to restart it with.
    """
    mode = info["model_config"]["logprobs_mode"]
    if mode != "processed_logprobs":
        raise ValueError(
            f"The vLLM server runs with --logprobs-mode {mode}: restart it with --logprobs-mode processed_logprobs."
        )
    most = info["model_config"]["max_logprobs"]
    if most != -1 and most < topk:
        raise ValueError(
            f"The vLLM server returns {most} log-probs: restart it with --max-logprobs {topk}, or lower cppo_topk."
        )


class EngineCheck:
    """Compares vLLM with the trainer after each weight sync: the tokens of a rollout, before the weights have moved.

    Both computed them with the same weights, or should have, so what they differ by is noise. More than rounding can
    make is an engine with other weights, which nothing else would show.

    Args:
        config: the trainer's.
        warns: whether this process is the one that warns.
    """

    def __init__(self, config: TrustRegionConfig, warns: bool) -> None:
        self._budget = config.rule.budget
        self._limit = config.rule_parameters.get(str(self._budget), math.inf)
        self._warns = warns and self._limit < math.inf

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        """Check the metrics of a loss; those of an update whose rollouts are all older have nothing to check.

        Args:
            step: updates made so far.
            metrics: as from `cppo_trl.metrics.summarize`, the same on all processes.

        Raises:
            RuntimeError: if the difference cannot be rounding.
        """
        nats, divergence = (metrics.get(f"cppo/rollout_mismatch{unit}", 0.0) for unit in ("_nats", ""))
        if nats > MAX_MISMATCH_NATS:
            raise RuntimeError(
                f"After {step} updates, right after a weight sync, vLLM's log-probs differ from the trainer's by "
                f"{nats:.2g} nats a token on average; rounding stays below {MAX_MISMATCH_NATS:g}. The sync leaves "
                "some stale (often a head that is the embedding), or the server holds another model. Restart it "
                "with the trained model, or install a vLLM whose load_weights fits it (docs/vllm.md, stale weights)."
            )
        if self._warns and divergence > NOTICEABLE_SHARE * self._limit:
            self._warns = False
            warnings.warn(
                f"cppo/rollout_mismatch is {divergence:.2g} after {step} updates: rounding that differs between vLLM "
                f"and the trainer spends {divergence / self._limit:.0%} of cppo_{self._budget}={self._limit:g} before "
                "any update. Take Top-K with cppo_topk_source=policy, run both in float32 (a server's --dtype), or "
                f"raise cppo_{self._budget}. If it grows from rollout to rollout, vLLM's weights are stale.",
                stacklevel=2,
            )
