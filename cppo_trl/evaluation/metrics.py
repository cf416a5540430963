"""avg@k, pass@k and maj@k of sampled answers, pure: numbers in, numbers out.

A problem has n samples, each with a score, of which 1.0 is right, and the group of equal answers it belongs to.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

RIGHT = 1.0


@dataclass(frozen=True)
class Record:
    """The graded samples of one problem; every list has one entry for each sample.

    Attributes:
        benchmark: Name of the set of problems.
        id: Of the problem, unique within its benchmark.
        solution: The gold answer.
        completions: What the model wrote.
        lengths: Of the completions, in tokens, the end-of-sequence token included.
        truncated: Whether a completion reached the limit of tokens without an end.
        answers: As extracted from the completions; None where there is none.
        groups: Which samples gave the same answer: equal numbers; None where there is no answer.
        scores: The reward's; None where it could not read the gold.
    """

    benchmark: str
    id: str
    solution: Any
    completions: list[str]
    lengths: list[int]
    truncated: list[bool]
    answers: list[str | None]
    groups: list[int | None]
    scores: list[float | None]

    @property
    def excluded(self) -> bool:
        """Whether the problem does not count: the reward gave no score to some sample, as it does for a bad gold."""
        return None in self.scores


def avg_at_n(scores: Sequence[float]) -> float:
    """Mean score of the samples."""
    return fmean(scores)


def pass_at_k(n: int, right: int, k: int) -> float:
    """Probability that k of n samples, drawn without replacement, hold a right one: 1 - C(n-c, k) / C(n, k).

    The unbiased estimator of Chen et al. (arXiv 2107.03374, Eq. 1), in exact integers.

    Args:
        n: Samples.
        right: Right ones among them, c.
        k: At most n.
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def maj_at_n(scores: Sequence[float], groups: Sequence[int | None]) -> float:
    """Score of the answer given most often; of equally frequent ones the answer that was given first.

    Samples without an answer do not vote; without any vote the score is 0.
    """
    votes = Counter(group for group in groups if group is not None)  # keeps the order of first appearance
    if not votes:
        return 0.0
    return scores[groups.index(votes.most_common(1)[0][0])]


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean, s / √P with P - 1 in s; None for a single value."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def problem_metrics(record: Record) -> dict[str, float]:
    """The numbers of one problem that counts: ``avg@n``, ``pass@k`` for k = 1, 2, 4, ... n, ``maj@n``, lengths."""
    scores = [score for score in record.scores if score is not None]
    n, right = len(scores), scores.count(RIGHT)
    ks = sorted({2**i for i in range(n.bit_length())} | {n})
    return {
        f"avg@{n}": avg_at_n(scores),
        **{f"pass@{k}": pass_at_k(n, right, k) for k in ks},
        f"maj@{n}": maj_at_n(scores, record.groups),
        "response_length": fmean(record.lengths),
        "truncated": fmean(record.truncated),
    }


def benchmark_metrics(records: Sequence[Record]) -> dict[str, float | None]:
    """Means over the problems that count, and the standard errors of accuracies over these problems.

    Returns:
        The keys of `problem_metrics`, ``<key>_stderr`` for those with an ``@``, ``problems`` (that count) and
        ``excluded``.

    Raises:
        ValueError: If no problem counts.
    """
    counted = [problem_metrics(record) for record in records if not record.excluded]
    if not counted:
        raise ValueError(f"{records[0].benchmark}: no problem has a gold that could be read; look at its solutions.")
    result: dict[str, float | None] = {"problems": len(counted), "excluded": len(records) - len(counted)}
    for name in counted[0]:
        values = [metrics[name] for metrics in counted]
        result[name] = fmean(values)
        if "@" in name:
            result[f"{name}_stderr"] = standard_error(values)
    return result


def mean_metrics(benchmarks: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Unweighted mean over benchmarks; its standard error is √Σ s_b² / B, as benchmarks are independent."""
    result: dict[str, float | None] = {}
    for name in benchmarks[0]:
        values = [metrics[name] for metrics in benchmarks]
        known = [value for value in values if value is not None]
        if name in ("problems", "excluded"):
            result[name] = sum(known)
        elif len(known) < len(values):
            result[name] = None
        elif name.endswith("_stderr"):
            result[name] = math.hypot(*known) / len(known)
        else:
            result[name] = fmean(known)
    return result


def all_metrics(records: Sequence[Record]) -> dict[str, dict[str, float | None]]:
    """`benchmark_metrics` by name and, of several benchmarks, their ``"mean"``."""
    by_name: dict[str, list[Record]] = {}
    for record in records:
        by_name.setdefault(record.benchmark, []).append(record)
    result = {name: benchmark_metrics(group) for name, group in by_name.items()}
    if len(result) > 1:
        result["mean"] = mean_metrics(list(result.values()))
    return result
