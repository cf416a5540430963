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
