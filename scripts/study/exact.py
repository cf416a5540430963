"""The rules on a policy so small that everything about them is known without noise.

    python scripts/study/exact.py --output docs/results/exact.jsonl --figure docs/figures/exact.png

A recurrent policy over three tokens writes responses of T tokens, all of which are enumerated: J, the surrogate L',
its error Δ, the total variation between whole responses, D_t at every state, and Theorem 1's bound are exact. A unit
is one checkpoint and one rollout of it, on which every arm makes the same updates. A line for each unit; finished ones
are kept. docs/exact.md says what is asked, and what came out.
"""

import argparse
import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor, nn
from tqdm.auto import tqdm

from cppo_trl.output.run_files import whole_lines
from cppo_trl.rules import RULES

TOKENS, LENGTHS = 3, (4, 6, 8, 10)
TRAJECTORIES, MATURITIES, ROLLOUTS = 8, (0.3, 0.5, 0.7), 3
"""Checkpoints are taken where J first reaches a maturity."""
RESPONSES, UPDATES, LEARNING_RATE, BASE_LEARNING_RATE = 128, 16, 2e-3, 1e-3
W_MIN = 0.8
CPPO = {"w_min": W_MIN, "delta_b_quantile": None, "delta_b_max_multiple": 2.0, "shuffle_weights": False}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"cppo {d:g}": ("cppo", {**CPPO, "delta": d, "delta_b": d / 5}) for d in (0.02, 0.05, 0.1, 0.2, 0.4)},
    **{
        f"budget {d:g}": ("cppo", {**CPPO, "w_min": 1.0, "delta": d, "delta_b": d / 5})
        for d in (0.02, 0.05, 0.1, 0.2, 0.4)
    },
    **{f"weight {d:g}": ("cppo", {**CPPO, "delta": d, "delta_b": math.inf}) for d in (0.02, 0.05, 0.1, 0.2, 0.4)},
    **{f"dppo {d:g}": ("dppo", {"delta": d}) for d in (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)},
    **{f"grpo {e:g}": ("grpo", {"ratio_min": 1 - e, "ratio_max": 1 + e}) for e in (0.05, 0.1, 0.2, 0.4)},
    "none": ("none", {}),
}
"""Ladders of thresholds: CPPO, its budget alone (w = 1), its position weight alone, DPPO, GRPO's clip."""


class Policy(nn.Module):
    """A recurrent policy over `TOKENS` tokens."""

    def __init__(self, length: int, hidden: int = 32) -> None:
        super().__init__()
        self.length, self.hidden = length, hidden
        self.embed, self.cell = nn.Embedding(TOKENS + 1, hidden), nn.GRUCell(hidden, hidden)
        self.head = nn.Linear(hidden, TOKENS)

    def tree(self) -> list[Tensor]:
        """The log π(· | s) at every state, ``(TOKENS^t, TOKENS)`` for t = 0 to T - 1, states in lexical order."""
        state = self.cell(self.embed(torch.tensor([TOKENS])), torch.zeros(1, self.hidden))
        levels = [self.head(state).log_softmax(-1)]
        for _ in range(self.length - 1):
            tokens = torch.arange(TOKENS).repeat(len(state))
            state = self.cell(self.embed(tokens), state.repeat_interleave(TOKENS, 0))
            levels.append(self.head(state).log_softmax(-1))
        return levels

    def along(self, responses: Tensor) -> Tensor:
        """The log π(· | s_t) along responses, ``(B, T)`` to ``(B, T, TOKENS)``."""
        start = torch.full((len(responses), 1), TOKENS)
        state, levels = torch.zeros(len(responses), self.hidden), []
        for tokens in torch.cat([start, responses[:, :-1]], 1).T:
            state = self.cell(self.embed(tokens), state)
            levels.append(self.head(state).log_softmax(-1))
        return torch.stack(levels, 1)

    @torch.no_grad()
    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """``(count, T)`` responses."""
        responses = torch.zeros(count, 0, dtype=torch.long)
        for at in range(self.length):
            padded = torch.cat([responses, torch.zeros(count, self.length - at, dtype=torch.long)], 1)
            token = torch.multinomial(self.along(padded)[:, at].exp(), 1, generator=generator)
            responses = torch.cat([responses, token], 1)
        return responses


def reward(responses: Tensor) -> Tensor:
    """1 where three quarters of the tokens follow a rule that the first token picks, ``(B, T)`` to ``(B,)``."""
    step = responses[:, :1].clamp(min=1)  # the first token decides how the rest is worked out
    follows = responses[:, 1:] == (responses[:, :-1] + step) % TOKENS
    return (follows.float().mean(1) >= 0.75).float()


def sequence_logps(levels: Sequence[Tensor]) -> Tensor:
    """The log π of every response in lexical order, fp64, from `Policy.tree`."""
    logps = torch.zeros(1, dtype=torch.float64)
    for level in levels:
        logps = (logps[:, None] + level.double()).flatten()
    return logps


class Exact(NamedTuple):
    """What a policy π is against the rollout policy μ, over all responses."""

    improvement: float
    """J(π) - J(μ)"""
    surrogate: float
    """L', Eq. (1)"""
    error: float
    """|Δ| = |L' - (J(π) - J(μ))|"""
    tv: float
    """total variation between whole responses"""
    drift: tuple[float, ...]
    """u_t = E_μ[D_t]"""
    largest: float
    """the largest D_t at any state"""
    bound: float
    """4ξ Σ_t u_t Σ_{j>t} l_j, Eq. (4), with l_j the largest D_j and ξ = 1"""
    theorem: float
    """2ξ T (T-1) l δ_b, Eq. (6), with the smallest l and δ_b for which Eq. (5) holds"""


@torch.no_grad()
def compare(mu: Sequence[Tensor], pi: Sequence[Tensor], rewards: Tensor) -> Exact:
    """Enumerate all responses.

    Args:
        mu: as from `Policy.tree`.
        pi: the same of the other policy.
        rewards: of all responses, in lexical order.
    """
    length = len(mu)
    log_mu = log_pi = ratio_sum = torch.zeros(1, dtype=torch.float64)
    weighted = torch.zeros(1, dtype=torch.float64)
    weights = 1 - (1 - W_MIN) / (length - 1) * torch.arange(length, dtype=torch.float64)
    drift, largest, average = [], [], 0.0
    for at, (level_mu, level_pi) in enumerate(zip(mu, pi, strict=True)):
        a, b = level_mu.double(), level_pi.double()
        divergence = 0.5 * (a.exp() - b.exp()).abs().sum(-1)  # at each state
        drift.append(float((log_mu.exp() * divergence).sum()))
        largest.append(float(divergence.max()))
        weighted = weighted + weights[at] * divergence
        if at < length - 1:  # P_m <= δ_b W_m for every proper prefix
            average = max(average, float(weighted.max() / weights[: at + 1].sum()))
        weighted = weighted.repeat_interleave(TOKENS)
        ratio_sum = (ratio_sum[:, None] + (b - a).exp() - 1).flatten()
        log_mu, log_pi = (log_mu[:, None] + a).flatten(), (log_pi[:, None] + b).flatten()
    p_mu, p_pi = log_mu.exp(), log_pi.exp()
    improvement = float(((p_pi - p_mu) * rewards).sum())
    surrogate = float((p_mu * rewards * ratio_sum).sum())
    later = [sum(largest[at + 1 :]) for at in range(length)]
    return Exact(
        improvement,
        surrogate,
        abs(surrogate - improvement),
        0.5 * float((p_mu - p_pi).abs().sum()),
        tuple(drift),
        max(largest),
        4 * sum(u * after for u, after in zip(drift, later, strict=True)),
        2 * length * (length - 1) * max(largest) * average,
    )


def train(
    policy: Policy, optimizer: Any, responses: Tensor, mu: Tensor, arm: str, updates: int, order: Tensor
) -> None:
    """One pass over a rollout in so many updates, under a rule with the exact total variation as D_t."""
    rule, parameters = ARMS[arm]
    advantages = reward(responses) - reward(responses).mean()
    for rows in order.chunk(updates):
        logps = policy.along(responses[rows])
        divergence = 0.5 * (logps.detach().exp() - mu[rows].exp()).abs().sum(-1)
        log_ratio = (logps - mu[rows]).gather(-1, responses[rows].unsqueeze(-1)).squeeze(-1)
        mask = torch.ones_like(log_ratio)
        verdict = RULES[rule].judge(
            divergence, advantages[rows, None], log_ratio.detach(), mask, response_ids=rows, **parameters
        )
        loss = -(log_ratio.exp() * advantages[rows, None] * verdict.weight).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def trajectory(length: int, seed: int, done: set[tuple[int, int, float, int]], bar: Any) -> Any:
    """Train a policy on-policy, and yield the units of its checkpoints that are not done."""
    torch.manual_seed(seed)
    policy = Policy(length)
    optimizer = torch.optim.Adam(policy.parameters(), lr=BASE_LEARNING_RATE)
    generator = torch.Generator().manual_seed(seed)
    rewards = reward(torch.cartesian_prod(*[torch.arange(TOKENS)] * length)).double()
    ahead = list(MATURITIES)
    while ahead:
        with torch.no_grad():
            objective = float((sequence_logps(policy.tree()).exp() * rewards).sum())
        while ahead and objective >= ahead[0]:
            for rollout in range(ROLLOUTS):
                key = (length, seed, ahead[0], rollout)
                if key not in done:
                    yield key, unit(policy, optimizer, rewards, hash(key) % 2**31)
                bar.update()
            ahead.pop(0)
        responses, order = policy.sample(RESPONSES, generator), torch.arange(RESPONSES)
        with torch.no_grad():
            mu = policy.along(responses)
        train(policy, optimizer, responses, mu, "none", 1, order)


def unit(policy: Policy, optimizer: Any, rewards: Tensor, seed: int) -> dict[str, Exact]:
    """Every arm from one checkpoint, on one rollout."""
    generator = torch.Generator().manual_seed(seed)
    responses = policy.sample(RESPONSES, generator)
    order = torch.randperm(RESPONSES, generator=generator)
    with torch.no_grad():
        mu, tree = policy.along(responses), policy.tree()
    results = {}
    for arm in ARMS:
        moved = copy.deepcopy(policy)
        own = torch.optim.Adam(moved.parameters(), lr=LEARNING_RATE)
        own.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        own.param_groups[0]["lr"] = LEARNING_RATE
        train(moved, own, responses, mu, arm, UPDATES, order)
        with torch.no_grad():
            results[arm] = compare(tree, moved.tree(), rewards)
    return results


Rows = Sequence[Mapping[str, Any]]
Differences = Mapping[tuple[int, float], Mapping[str, tuple[float, float, int]]]
"""`at_equal_drift` by length and total variation."""
SUMMARIES: dict[str, Callable[[Exact, int], float]] = {
    "Σ (T-t) u_t": lambda e, length: sum((length - t) * u for t, u in enumerate(e.drift, 1)),
    "Σ u_t": lambda e, length: sum(e.drift),
    "max D_t": lambda e, length: e.largest,
}
"""Of the drift, that may predict |Δ|: functions of what was measured and of the length."""
COMPARED = {
    "cppo": "CPPO",
    "budget": "its budget alone",
    "weight": "its position weight alone",
    "grpo": "GRPO's clip",
}
"""Rules that are held against DPPO, and their labels."""


def measured(rows: Rows, **wanted: float) -> list[Exact]:
    """What was measured of every arm, in the units with these values."""
    return [Exact(*e) for row in rows if wanted.items() <= row.items() for e in row["arms"].values()]


def predictors(rows: Rows, length: int) -> dict[str, float]:
    """Spearman's correlation with |Δ| of three summaries of the drift, over units and arms; mean over maturities."""
    correlations: dict[str, list[float]] = {name: [] for name in SUMMARIES}
    for maturity in MATURITIES:
        found = measured(rows, length=length, maturity=maturity)
        for name, summary in SUMMARIES.items():
            values = [summary(e, length) for e in found]
            correlations[name].append(float(stats.spearmanr(values, [e.error for e in found])[0]))
    return {name: float(np.mean(values)) for name, values in correlations.items()}


def at_equal_drift(rows: Rows, length: int, tv: float) -> dict[str, tuple[float, float, int]]:
    """Improvement of each rule minus DPPO's at one total variation, interpolated along the ladders within each unit.

    Returns:
        Mean, half of the 95 % interval by trajectory, and the units whose ladders both reach ``tv``.
    """
    differences: dict[str, dict[int, list[float]]] = {rule: {} for rule in COMPARED}
    for row in (row for row in rows if row["length"] == length):
        curves = {}
        for rule in (*differences, "dppo"):
            ladder = [Exact(*e) for arm, e in row["arms"].items() if arm.startswith(rule)]
            points = sorted((e.tv, e.improvement) for e in ladder)
            if points and points[0][0] <= tv <= points[-1][0]:
                curves[rule] = float(np.interp(tv, [x for x, _ in points], [y for _, y in points]))
        for rule, by_seed in differences.items():
            if rule in curves and "dppo" in curves:
                by_seed.setdefault(row["seed"], []).append(curves[rule] - curves["dppo"])
    table = {}
    for rule, by_seed in differences.items():
        means = [float(np.mean(values)) for values in by_seed.values()]
        if len(means) > 2:
            half = stats.t.ppf(0.975, len(means) - 1) * np.std(means, ddof=1) / math.sqrt(len(means))
            table[rule] = (float(np.mean(means)), float(half), sum(map(len, by_seed.values())))
    return table


def looseness(rows: Rows, length: int) -> tuple[float, float]:
    """Median of the bounds (4) and (6), each with the smallest constants for which (5) holds, over |Δ|."""
    found = [e for e in measured(rows, length=length) if e.error > 1e-6]
    return float(np.median([e.bound / e.error for e in found])), float(np.median([e.theorem / e.error for e in found]))


def draw(path: Path, differences: Differences, tv: float) -> None:
    """Improvement minus DPPO's at one total variation."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    for place, (rule, label) in enumerate(COMPARED.items()):
        points = [(length, differences[length, tv].get(rule)) for length in LENGTHS]
        known = [(length + 0.15 * (place - 1.5), *point[:2]) for length, point in points if point]
        if known:
            x, y, half = zip(*known, strict=True)
            axes.errorbar(x, y, half, marker="o", linestyle="", capsize=3, label=label)
    axes.axhline(0, color="gray", linewidth=1)
    axes.set(xlabel="length T", ylabel=f"gain in J minus DPPO's, at TV {tv:g}", xticks=LENGTHS)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    figure.savefig(path, dpi=100)


def main() -> None:
    """Make the units that are missing, then the tables and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON lines, one for each unit")
    parser.add_argument("--figure", type=Path, required=True, help="PNG to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = list(whole_lines(options.output))
    done = {(row["length"], row["seed"], row["maturity"], row["rollout"]) for row in rows}
    total = len(LENGTHS) * TRAJECTORIES * len(MATURITIES) * ROLLOUTS
    with options.output.open("a", encoding="utf-8") as file, tqdm(total=total, unit="unit") as bar:
        for length in LENGTHS:
            for seed in range(100, 100 + TRAJECTORIES):
                for key, arms in trajectory(length, seed, done, bar):
                    rounded = {
                        arm: json.loads(json.dumps(e), parse_float=lambda x: float(f"{float(x):.6g}"))
                        for arm, e in arms.items()
                    }
                    row = dict(zip(("length", "seed", "maturity", "rollout"), key, strict=True)) | {"arms": rounded}
                    rows.append(row)
                    print(json.dumps(row), file=file, flush=True)
    correlations = {length: predictors(rows, length) for length in LENGTHS}
    differences = {(length, tv): at_equal_drift(rows, length, tv) for length in LENGTHS for tv in (0.1, 0.2, 0.3)}
    print("T   rank correlation with |Δ|: Σ (T-t) u_t, Σ u_t, max D_t   bound (4) / |Δ|   bound (6) / |Δ|")
    for length in LENGTHS:
        print(
            length,
            *(f"{value:.3f}" for value in correlations[length].values()),
            *(f"{x:.3g}" for x in looseness(rows, length)),
        )
    print("T   TV   rule   difference in J to DPPO ± 95 %   units")
    for place, table in differences.items():
        for rule, (mean, half, units) in table.items():
            print(*place, rule, f"{mean:+.4f} ± {half:.4f}", units)
    draw(options.figure, differences, tv=0.2)


if __name__ == "__main__":
    main()
