"""Draw docs/figures/rule.png: CPPO's limit on D_t along one response, beside DPPO's threshold.

    python scripts/draw_rule.py

The divergences are made up; weights, limits and masks are computed by the package. At equal δ, CPPO's threshold
δ / w_t equals DPPO's at the first token and is looser at every later one; only the prefix budget is tighter.
"""

from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from cppo_trl.trust_region import cppo_mask, dppo_mask, prefix_sums

DELTA, DELTA_B, W_MIN, TOKENS = 0.15, 0.02, 0.8, 160
BLUE, ORANGE, RED, GREY = "#2a6f97", "#e09f3e", "#c1121f", "#8d99ae"


def response() -> torch.Tensor:
    """D_t of one response, (1, T): mostly small, with a burst early on and a long drift later."""
    g = torch.Generator().manual_seed(3)
    divergence = 0.01 * torch.rand(1, TOKENS, generator=g) ** 2
    divergence[:, 22:40] += 0.13 * torch.rand(1, 18, generator=g)
    divergence[:, 95:135] += 0.19 * torch.rand(1, 40, generator=g) ** 2
    return divergence


def main() -> None:
    """Draw and write the figure."""
    divergence, mask = response(), torch.ones(1, TOKENS)
    advantages = away = torch.ones(1, TOKENS)  # every token moves away from the rollout policy
    limits: dict[str, Any] = {"delta": DELTA, "w_min": W_MIN, "delta_b": DELTA_B}
    prefix = prefix_sums(divergence, mask, **limits)
    kept = cppo_mask(divergence, advantages, away, mask, **limits)[0]
    uniform = dppo_mask(divergence, advantages, away, mask, delta=DELTA)[0]
    position, spent, weights = torch.arange(1, TOKENS + 1), divergence[0], prefix.weights[0]
    by_threshold = weights * spent > DELTA
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for tokens, color, label in (
        (kept, BLUE, "kept"),
        (~kept & by_threshold, ORANGE, "masked by the threshold"),
        (~kept & ~by_threshold, RED, "masked by the budget"),
    ):
        top.vlines(position[tokens], 0, spent[tokens], color=color, linewidth=2.5, label=label)
    limit = (prefix.threshold[0] / weights).clamp(min=0)
    top.plot(
        position, DELTA / weights, color="black", linestyle=":", linewidth=1.2, label="CPPO's threshold $δ / w_t$"
    )
    top.plot(position, limit, color="black", linewidth=1.5, label="CPPO's limit with the budget, $c_t / w_t$")
    top.axhline(DELTA, color=GREY, linestyle="--", linewidth=1.2, label="DPPO's threshold $δ$")
    top.set(ylabel="$D_t$", ylim=(0, 0.29), title="One response that drifts twice; every token moves away from $μ$")
    top.legend(fontsize="small", loc="upper left", ncols=2)
    bottom.plot(position, prefix.average()[0], color="black", label="prefix average $S_t / W_t$")
    bottom.axhline(DELTA_B, color=GREY, linestyle="--", linewidth=1.2, label="budget $δ_b$")
    bottom.set(xlabel="token of the response", ylabel="drift so far", ylim=(0, None))
    bottom.legend(fontsize="small", loc="lower right")
    path = Path("docs/figures/rule.png")
    figure.savefig(path, dpi=130)
    print(f"wrote {path}: CPPO masks {int((~kept).sum())} of {TOKENS} tokens, DPPO {int((~uniform).sum())}")


if __name__ == "__main__":
    main()
