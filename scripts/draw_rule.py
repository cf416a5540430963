"""Draw docs/figures/rule.png: one response under CPPO's mask and under one threshold for all tokens.

    python scripts/draw_rule.py

The divergences are made up (a response that drifts twice); the weights and masks are the package's own.
"""

from pathlib import Path

import torch
from matplotlib.figure import Figure

from cppo_trl.trust_region import cppo_mask, dppo_mask, position_weights

DELTA, DELTA_B, W_MIN, TOKENS = 0.15, 0.02, 0.8, 160
BLUE, ORANGE, RED, GRAY = "#2a6f97", "#e09f3e", "#c1121f", "#8d99ae"


def response() -> torch.Tensor:
    """D_t of one response, (1, T): mostly small, with a burst early on and a long drift later."""
    g = torch.Generator().manual_seed(3)
    divergence = 0.01 * torch.rand(1, TOKENS, generator=g) ** 2
    divergence[:, 22:40] += 0.13 * torch.rand(1, 18, generator=g)
    divergence[:, 95:135] += 0.215 * torch.rand(1, 40, generator=g) ** 2
    return divergence


def main() -> None:
    """Draw and write the figure."""
    divergence, mask = response(), torch.ones(1, TOKENS)
    advantages = away = torch.ones(1, TOKENS)  # every token moves away from the rollout policy
    kept = cppo_mask(divergence, advantages, away, mask, delta=DELTA, w_min=W_MIN, delta_b=DELTA_B)[0]
    kept_by_dppo = dppo_mask(divergence, advantages, away, mask, delta=DELTA)[0]
    divergence, weights = divergence[0], position_weights(mask, W_MIN)[0]
    spent, weight_sum = (weights * divergence).cumsum(0), weights.cumsum(0)  # S_t, W_t
    left = DELTA + DELTA_B * (weight_sum - weights) - (spent - weights * divergence)  # δ + δ_b W_{t-1} - S_{t-1}
    threshold, limit = DELTA / weights, left.clamp(0, DELTA) / weights
    position = torch.arange(1, TOKENS + 1)
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for tokens, color, label in (
        (kept, BLUE, "kept"),
        (~kept & (divergence > threshold), ORANGE, "masked by the threshold"),
        (~kept & (divergence <= threshold), RED, "masked by the budget"),
    ):
        top.vlines(position[tokens], 0, divergence[tokens], color=color, linewidth=2, label=label)
    top.plot(position, threshold, color="black", linestyle=":", linewidth=1.2, label="CPPO's threshold $δ / w_t$")
    top.plot(position, limit, color="black", linewidth=1.5, label="CPPO's limit, with the budget")
    top.axhline(DELTA, color=GRAY, linestyle="--", linewidth=1, label="DPPO's limit $δ$")
    top.set(
        ylabel="$D_t$",
        ylim=(0, 0.3),
        title="Tokens that lead away from the rollout policy, in a response that drifts twice",
    )
    top.legend(fontsize="small", loc="upper left", ncols=2)
    bottom.plot(position, spent / weight_sum, color="black", label="$S_t / W_t$, average over the prefix")
    bottom.axhline(DELTA_B, color=GRAY, linestyle="--", linewidth=1, label="$δ_b$, its budget")
    bottom.set(xlabel="token of the response", ylabel="drift so far", ylim=(0, None))
    bottom.legend(fontsize="small", loc="lower right")
    path = Path("docs/figures/rule.png")
    figure.savefig(path, dpi=130)
    print(f"wrote {path}: CPPO masks {int((~kept).sum())} of {TOKENS} tokens, DPPO {int((~kept_by_dppo).sum())}")


if __name__ == "__main__":
    main()
