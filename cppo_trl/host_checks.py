"""What the seam relies on in TRL and vLLM, checked before training so that a change is loud."""

import inspect
from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig
from trl import GRPOTrainer

from cppo_trl.config import CPPOConfig

_HOOKS = {  # the parts of TRL 1.16 that the seam relies on, by their first parameters
    "_compute_loss": ["self", "model", "inputs"],
    "_generate_and_score_completions": ["self", "inputs"],
    "_get_per_token_logps_and_entropies": [
        "self",
        "model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
        "batch_size",
    ],
    "get_off_policy_mask": [
        "advantages",
        "per_token_logps",
        "sampling_per_token_logps",
        "mask",
        "off_policy_threshold",
    ],
}


def check_hooks() -> None:
    """Compare the signatures of `GRPOTrainer`'s hooks with those that the trainer was written for.

    Raises:
        RuntimeError: if one differs.
    """
    for name, expected in _HOOKS.items():
        method = getattr(GRPOTrainer, name, None)
        found = list(inspect.signature(method).parameters)[: len(expected)] if method else None
        if found != expected:
            raise RuntimeError(
                f"GRPOTrainer.{name} of the installed TRL takes {found}, expected {expected}: its loss has changed "
                "under cppo_trl. Install trl>=1.16,<1.17."
            )


def check_arguments(config: CPPOConfig, arguments: Mapping[str, Any]) -> None:
    """Refuse arguments of the trainer that do not go with its configuration, before a model is loaded.

    Args:
        config: the trainer's.
        arguments: the others, by `GRPOTrainer`'s names.

    Raises:
        ValueError: if one does not.
    """
    for name in ("tools", "rollout_func", "environment_factory"):
        if config.uses_topk and arguments.get(name):
            raise ValueError(
                f"{name} with cppo_divergence={config.cppo_divergence!r}: rollouts of several turns, or of one's own, "
                "are not supported with Top-K. Set cppo_divergence to binary_tv or binary_kl."
            )
    if config.cast_lm_head_to_fp32 and arguments.get("peft_config"):
        model, init = arguments["model"], config.model_init_kwargs
        known = {k: init[k] for k in ("revision", "trust_remote_code") if k in init} if isinstance(init, dict) else {}
        of_the_model = AutoConfig.from_pretrained(model, **known) if isinstance(model, str) else model.config
        if of_the_model.get_text_config().tie_word_embeddings:
            raise ValueError(
                "cast_lm_head_to_fp32=True with a peft_config: TRL 1.16 fails on it where the LM head is the "
                "embedding, as in this model. Set cast_lm_head_to_fp32 to false."
            )


def check_server(info: dict[str, Any]) -> None:
    """Refuse a vLLM server whose log-probs are not the rollout policy's.

    Args:
        info: what the server's ``/server_info`` says.

    Raises:
        ValueError: with the option to restart it with.
    """
    mode = info["model_config"]["logprobs_mode"]
    if mode != "processed_logprobs":
        raise ValueError(
            f"The vLLM server runs with --logprobs-mode {mode}: its log-probs are not those of the distribution "
            "that it samples from. Restart it with --logprobs-mode processed_logprobs."
        )
