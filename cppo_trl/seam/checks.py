"""What the trainer relies on in TRL and vLLM, checked at start-up and after each weight sync; any mismatch raises."""

import inspect
import math
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel

from cppo_trl.config import TrustRegionConfig

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
        model: model of the pass, unwrapped.
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

    Both should have computed them with the same weights, so the difference is rounding. A larger difference means that
    the engine has other weights, which nothing else would show.

    Args:
        config: the trainer's configuration.
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
            metrics: result of `cppo_trl.metrics.summarize`, the same on all processes.

        Raises:
            RuntimeError: if the difference cannot be rounding.
        """
        nats, divergence = (metrics.get(f"cppo/rollout_mismatch{unit}", 0.0) for unit in ("_nats", ""))
        if nats > MAX_MISMATCH_NATS:
            raise RuntimeError(
                f"After {step} updates, right after a weight sync, vLLM's log-probs differ from the trainer's by "
                f"{nats:.2g} nats a token on average; rounding stays below {MAX_MISMATCH_NATS:g}. Some weights were "
                "not updated by the sync (often a tied LM head), or the server holds another model. Restart it with "
                "the trained model, or install a vLLM whose load_weights fits it (docs/vllm.md, stale weights)."
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
