"""What the seam relies on in TRL and vLLM, checked before training so that a change is loud."""

import inspect
from typing import Any

from trl import GRPOTrainer

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
