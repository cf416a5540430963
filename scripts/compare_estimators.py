"""How the Binary and the Top-K mask differ on the same tokens, measured while the built-in task is trained.

    python scripts/compare_estimators.py --config configs/quickstart/cppo.yaml --cppo_divergence topk_tv --cppo_topk 5

Runs a recipe made for a Top-K estimator; at every update the Binary mask is computed beside the one in force.
"""

from typing import Any

import torch

from cppo_trl import CPPOTrainer
from cppo_trl.divergence import binary_kl, binary_tv
from cppo_trl.launch import training
from cppo_trl.trust_region import cppo_mask, prefix_budget


class ComparingTrainer(CPPOTrainer):
    """Counts, over tokens with an advantage, what each mask keeps and where they differ."""

    counts = torch.zeros(6, dtype=torch.float64)

    def get_off_policy_mask(self, **inputs: Any) -> torch.Tensor:  # type: ignore[override]
        """The Top-K weight, unchanged."""
        kept = super().get_off_policy_mask(**inputs).bool()
        logps, rollout_logps, mask = (inputs[k] for k in ("per_token_logps", "sampling_per_token_logps", "mask"))
        binary = (binary_tv if self.args.cppo_divergence == "topk_tv" else binary_kl)(logps, rollout_logps)
        quantile, multiple = self.args.cppo_delta_b_quantile, self.args.cppo_delta_b_max_multiple
        budget = prefix_budget(binary, mask, self.args.cppo_delta_b, quantile, multiple)
        limits = {"delta": self.args.cppo_delta, "w_min": self.args.cppo_w_min, "delta_b": budget}
        binary_kept = cppo_mask(binary, inputs["advantages"], logps.detach() - rollout_logps, mask, **limits)
        active = mask.bool() & (inputs["advantages"] != 0)
        topk, _ = self._divergence(logps, rollout_logps)
        sums = [active, active & ~kept, active & ~binary_kept, active & ~kept & ~binary_kept]
        sums += [topk.where(active, 0.0), binary.where(active, 0.0)]
        self.counts += torch.stack([x.double().sum() for x in sums])
        return kept.float()


def main() -> None:
    """Train with Top-K and print the shares."""
    arguments = training.parse_arguments()
    if arguments[1].trust_region != "cppo" or not arguments[1].uses_topk:
        raise ValueError(
            "cppo_divergence must be topk_tv or topk_kl, and trust_region cppo: Binary is computed beside it."
        )
    training.CPPOTrainer = ComparingTrainer  # type: ignore[misc]
    training.train(*arguments)
    tokens, topk, binary, both, topk_divergence, binary_divergence = ComparingTrainer.counts.tolist()
    print(f"tokens with an advantage            {tokens:.0f}")
    print(f"mean D_t, Top-K and Binary          {topk_divergence / tokens:.2e}  {binary_divergence / tokens:.2e}")
    print(f"masked by Top-K                     {topk / tokens:.3%}")
    print(f"masked by Binary                    {binary / tokens:.3%}")
    print(f"masked by both                      {both / tokens:.3%}")
    print(f"of the tokens masked by either, by both: {both / max(topk + binary - both, 1):.1%}")


if __name__ == "__main__":
    main()
