"""`AsyncCPPOConfig`: the fields of the trust region on TRL's `AsyncGRPOConfig`."""

from dataclasses import dataclass

from trl.experimental.async_grpo import AsyncGRPOConfig

from cppo_trl.config import TrustRegionConfig


@dataclass
class AsyncCPPOConfig(TrustRegionConfig, AsyncGRPOConfig):
    """Configuration of `AsyncCPPOTrainer`: TRL's `AsyncGRPOConfig` plus the trust region, `TrustRegionConfig`.

    Raises:
        ValueError: for a value out of range, an option of TRL's that contradicts the rule, or a Top-K estimator, as
            TRL's rollout worker asks for the sampled token's log-prob alone.
    """

    def __post_init__(self) -> None:
        self._resolve_rule()
        if self.uses_topk:
            raise ValueError(
                f"cppo_divergence={self.cppo_divergence!r}: TRL's rollout worker asks for the sampled token's "
                "log-prob alone. Set cppo_divergence to binary_tv or binary_kl."
            )
        self._rename_checkpointing()
        super().__post_init__()
        self._refuse_contradictions()

    def schedule(self) -> dict[str, str]:
        """What will happen, in words, row by row: the table printed when training starts."""
        stale = f"samples up to {self.max_staleness} weight syncs old, a sync every {self.weight_sync_steps} updates"
        return {
            "rollouts": f"continuous, from {self.vllm_server_base_url}; {stale}",
            "trust region": ", ".join(self._rule_in_words()),
            "loss": "mean over the tokens of an update, advantages divided by the group's standard deviation",
        }
