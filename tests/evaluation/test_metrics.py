"""Formulas against numbers worked by hand, brute force, and lighteval's."""

import math
import random
from itertools import combinations

import numpy as np
import pytest

from cppo_trl.evaluation.metrics import (
    Record,
    all_metrics,
    benchmark_metrics,
    maj_at_n,
    mean_metrics,
    pass_at_k,
    problem_metrics,
    standard_error,
)


def record(scores, groups=None, lengths=None, truncated=None, benchmark="b", name="0"):
    n = len(scores)
    groups = groups or [None if s is None else int(s != 1) for s in scores]
    return Record(
        benchmark=benchmark,
        id=name,
        solution="5",
        completions=[""] * n,
        lengths=lengths or [1] * n,
        truncated=truncated or [False] * n,
        answers=[None if g is None else str(g) for g in groups],
        groups=groups,
        scores=scores,
    )


def test_numbers_worked_by_hand():
    one = record(
        [1.0, 0.0, 0.0, 1.0], groups=[0, 1, 1, 0], lengths=[2, 4, 6, 8], truncated=[False, False, False, True]
    )
    # the answer of group 0 came first; pass@2 misses only with the two wrong ones, 1 of 6 pairs
    expected = {"avg@4": 0.5, "pass@1": 0.5, "pass@2": 5 / 6, "pass@4": 1.0, "maj@4": 1.0}
    assert problem_metrics(one) == pytest.approx({**expected, "response_length": 5, "truncated": 0.25})
    two = record([0.0, 0.0, 1.0, 0.0], groups=[1, 2, 0, 2], name="1", lengths=[1, 1, 1, 1])
    no_gold = record([None] * 4, name="2", lengths=[9, 9, 9, 9])
    result = benchmark_metrics([one, two, no_gold])
    assert (result["problems"], result["excluded"]) == (2, 1)
    assert result["avg@4"] == pytest.approx(0.375)
    assert result["avg@4_stderr"] == pytest.approx(0.125)  # deviations of 1/8: s = √(2/64), over √2
    assert result["pass@2"] == pytest.approx((5 / 6 + 1 / 2) / 2)
    assert result["maj@4"] == 0.5
    assert result["maj@4_stderr"] == pytest.approx(0.5)
    assert (result["response_length"], result["truncated"]) == (3, 0.125)


def test_the_mean_over_benchmarks_is_unweighted():
    first = [record([1.0, 0.0], benchmark="a"), record([1.0, 1.0], benchmark="a", name="1")]
    second = [record([0.0, 0.0], benchmark="b", name=str(i)) for i in range(3)] + [record([1.0, 0.0], benchmark="b")]
    result = all_metrics(first + second)
    assert result["mean"]["avg@2"] == pytest.approx((0.75 + 0.125) / 2)  # unweighted, though b is larger
    assert result["mean"]["avg@2_stderr"] == pytest.approx(math.sqrt(0.25**2 + 0.125**2) / 2)
    assert result["mean"]["problems"] == 6
    assert all_metrics(first).keys() == {"a"}
    single = benchmark_metrics([record([1.0, 0.0])])
    assert single["avg@2_stderr"] is None
    assert mean_metrics([single, result["a"]])["avg@2_stderr"] is None
    with pytest.raises(ValueError, match="b: no problem has a readable gold answer"):
        all_metrics([record([None, 1.0])])


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n):
    for right in range(n + 1):
        samples = [True] * right + [False] * (n - right)
        for k in range(1, n + 1):
            subsets = list(combinations(samples, k))
            assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize(
    ("groups", "scores", "expected"),
    [
        ([1, 0, 0], [0.0, 1.0, 1.0], 1.0),
        ([1, 0, 1, 0], [0.0, 1.0, 0.0, 1.0], 0.0),  # a tie: the first answer wins
        ([0, 1, 1, 0], [1.0, 0.0, 0.0, 1.0], 1.0),
        ([None, None, 0], [0.0, 0.0, 1.0], 1.0),  # no answer is no vote
        ([None, None], [0.0, 0.0], 0.0),
    ],
)
def test_the_most_frequent_answer_wins_and_on_a_tie_the_first(groups, scores, expected):
    assert maj_at_n(scores, groups) == expected


# lighteval 0.13.0: metrics/metrics_sample.py (AvgAtN, PassAtK.pass_at_k, MajAtN) and metrics/utils/stderr.py


def lighteval_avg_at_n(scores):
    return np.mean(scores)


def lighteval_pass_at_k(scores, k):
    n, c = len(scores), scores.count(1)
    return 1.0 if n - c < k else 1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1))


def lighteval_maj_at_n(predictions, gold):
    return float(max(predictions, key=predictions.count) == gold)


def lighteval_mean_stderr(values):
    mean = np.mean(values)
    return math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1)) / math.sqrt(len(values))


def test_metrics_agree_with_lighteval_on_the_same_generations():
    generator = random.Random(0)
    problems = [[generator.choice("5678") for _ in range(16)] for _ in range(30)]
    records = []
    for row, answers in enumerate(problems):
        groups = ["5678".index(a) for a in answers]
        records.append(record([float(a == "5") for a in answers], groups=groups, name=str(row)))
    result = benchmark_metrics(records)
    scores = [[int(a == "5") for a in answers] for answers in problems]
    theirs = {"avg@16": [lighteval_avg_at_n(s) for s in scores]}
    theirs |= {f"pass@{k}": [lighteval_pass_at_k(s, k) for s in scores] for k in (1, 2, 4, 8, 16)}
    theirs["maj@16"] = [lighteval_maj_at_n(answers, "5") for answers in problems]
    assert 0 < np.mean(theirs["maj@16"]) < 1
    for name, values in theirs.items():
        assert result[name] == pytest.approx(np.mean(values), abs=1e-12)
        assert result[f"{name}_stderr"] == pytest.approx(lighteval_mean_stderr(values), abs=1e-12)
    assert standard_error([0.0, 1.0]) == 0.5
