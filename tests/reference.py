"""The paper's equations as plain Python loops over floats. Imports nothing from the package."""

import math


def algorithm_1(ratios, advantages, divergences, delta, delta_b, w_min):
    """Algorithm 1 of arXiv 2606.10968, for the tokens of one response.

    Returns the mask, the cause of each rejected token, and the smallest relative distance of any comparison to its
    limit (rows that sit on a threshold up to rounding can be left out).
    """
    length, s, w_sum = len(ratios), 0.0, 0.0
    keep, causes, margin = [], [], math.inf
    for t in range(1, length + 1):
        w = 1.0 if length == 1 else 1 - (1 - w_min) / (length - 1) * (t - 1)
        z = w * divergences[t - 1]
        budget_left = math.inf if delta_b == math.inf else delta + delta_b * w_sum - s
        c = min(delta, budget_left)
        if advantages[t - 1] * (ratios[t - 1] - 1) <= 0 or z <= c:
            keep.append(True)
            causes.append(None)
        else:
            keep.append(False)
            causes.append("threshold" if z > delta else "budget")
        if c != math.inf:
            margin = min(margin, abs(z - delta), abs(z - c) / max(1.0, abs(s)))
        s, w_sum = s + z, w_sum + w
    return keep, causes, margin


def soft_gate(ratios, advantages, divergences, delta, delta_b, w_min):
    """Eq. (19) and (20) with g(x) = min(1, 1/x), for the tokens of one response."""
    length, s, w_sum, weights = len(ratios), 0.0, 0.0, []
    for t in range(1, length + 1):
        w = 1.0 if length == 1 else 1 - (1 - w_min) / (length - 1) * (t - 1)
        s += w * divergences[t - 1]
        x = max(w * divergences[t - 1] / delta, s / (delta + delta_b * w_sum))
        away = advantages[t - 1] * (ratios[t - 1] - 1) > 0
        weights.append(1 / x if away and x > 1 else 1.0)
        w_sum += w
    return weights


def clipped_surrogate_slope(ratio, advantage, low, high):
    """d/dρ of min(ρ A, clip(ρ, low, high) A) over A, by a small step: 1 where GRPO learns, 0 where it is clipped."""

    def surrogate(rho):
        return min(rho * advantage, min(max(rho, low), high) * advantage)

    step = 1e-7
    return (surrogate(ratio + step) - surrogate(ratio - step)) / (2 * step * advantage)


def minpro_coefficients(ratios, low, high):
    """clip(m_t ρ_t, low, high) with m_t the running minimum of the ratios before t, from 1; arXiv 2601.22718."""
    coefficients, minimum = [], 1.0
    for ratio in ratios:
        coefficients.append(min(max(minimum * ratio, low), high))
        minimum = min(minimum, ratio)
    return coefficients


def drpo_slope(ratio, advantage, mu, delta):
    """d/dρ of DRPO's ρ A - |A| μ (ρ - 1)² / (2δ) over A, by a small step; Eq. (8) of arXiv 2606.09821."""

    def objective(rho):
        return rho * advantage - abs(advantage) * mu * (rho - 1) ** 2 / (2 * delta)

    step = 1e-6
    return (objective(ratio + step) - objective(ratio - step)) / (2 * step * advantage)


def tv_filter(ratios, advantages, delta):
    """open-instruct's TV filter for the tokens of a response: if it has moved too far, those that go on are out."""
    distance = sum(abs(ratio - 1) for ratio in ratios) / max(len(ratios), 1)
    return [
        not (distance > delta and ((a > 0 and r > 1) or (a < 0 and r < 1)))
        for r, a in zip(ratios, advantages, strict=True)
    ]


def clipped_quantile(divergences, floor, quantile, multiple):
    """Eq. (22) with linear interpolation, for the tokens of one response."""
    if not divergences:
        return floor
    ordered = sorted(divergences)
    rank = quantile * (len(ordered) - 1)
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    value = ordered[low] + (rank - low) * (ordered[high] - ordered[low])
    return min(multiple * floor, max(floor, value))


def bernoulli_kl(p, q):
    """KL(p || q) of two coins, in nats, for 0 < p, q < 1."""
    return p * math.log(p / q) + (1 - p) * (math.log1p(-p) - math.log1p(-q))


def reduced(pi, mu, sampled, k, kind):
    """Eq. (15) and (16) of DPPO at one position, over a plain set of tokens."""
    tokens = set(sorted(range(len(mu)), key=lambda a: -mu[a])[:k]) | {sampled}
    p_mu, p_pi = [math.exp(mu[a]) for a in tokens], [math.exp(pi[a]) for a in tokens]
    p_mu, p_pi = [*p_mu, max(1 - sum(p_mu), 1e-12)], [*p_pi, max(1 - sum(p_pi), 1e-12)]
    if kind == "tv":
        return 0.5 * sum(abs(a - b) for a, b in zip(p_mu, p_pi, strict=True))
    return sum(a * math.log(a / b) for a, b in zip(p_mu, p_pi, strict=True))
