r"""What a policy would find: a search over short answers for one that scores against golds of different value.

No two golds of the list have the same value, and none is another's hundredth or in degrees another's radians (the
conventions for a percent sign and for degrees, see docs/rewards.md). An answer that earns its reward from two of them
would earn it without knowing which one is right.
"""

import os
import random
import re

import pytest

from cppo_trl.rewards.comparing import compare

ROUNDS = int(os.environ.get("REWARD_CASES", "2000")) // 2
SEED = int(os.environ.get("REWARD_SEED", "0"))
pytestmark = pytest.mark.timeout(1800)
# ruff: noqa: E501

GOLDS = r"""
0 | 1 | -1 | 2 | 3 | 4 | 5 | 7 | 12 | 25 | 144 | -6 | 2024 | 1000000 | 0.25 | 3.14 | -0.7 | 0.333333 | \frac{1}{3} + 1 | \frac{5}{8} | -\frac{7}{9} |
\sqrt{2} | 3\sqrt{3} | 1+\sqrt{5} | \frac{\pi}{3} | 2\pi | e | e^2 | \ln 3 | 2^{100} | 6.02\times 10^{23} | i | 2-3i | \infty | -\infty |
\emptyset | \mathbb{R} | (0,1) | [0,1] | (2,5) | [2,5) | (-\infty,3) | x>4 | x \leq 7 | x\neq 2 | (-\infty,-2)\cup(2,\infty) | \{1,2\} |
\{1,2,3\} | \{-1,1\} | 1,5 | 3\pm\sqrt{2} | x=2,y=3 | (1,2,3) | (3,4) | \{x \mid x<-1\} | 2:7 | 12:00 | 5 million | 8 (apples) | 9\text{ cm} | 9.5 km |
x | y | n | xy | x+1 | x^2 | x^2-1 | 2x+3 | \frac{x}{y} | \sqrt{x} | |x| | \sin x | f(x)=x^3 | y=4x+1 | x+y=10 | x^2+y^2=16 | x+y<1 | n! |
f'(x) | a_1 | \gamma + 2 | \begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}1&0\\0&1\end{pmatrix} | A | B | C | D | Yes | No | True | blue |
Monday | no triangle | increasing | 101_2 | 6\text{ pm} | k=11 | t=-13 | f(2)=17 | I=19 | \log_2 8=3 \cdot 7 | \$23 | 29^\circ | 31\% | 2.5\text{ MHz}
"""
GOLDS = [gold.strip() for gold in re.split(r" \| ", GOLDS.replace("\n", " ").strip().replace("| |x| |", "| ABS |"))]
GOLDS = [r"|x|" if gold == "ABS" else gold for gold in GOLDS if gold and "=3 \\cdot" not in gold]
PIECES = [
    *"0123456789xyniefAB+-*/^_=<>()[]{}|!%,.;:'&$ ",
    *r"\frac{ \sqrt{ \pi \infty \pm \leq \geq \neq \in \cup \cap \emptyset \mathbb{R} \{ \} \ldots \text{ \circ \% \cdot".split(),
    *r"\sin \ln \left( \right) \mid \approx \boxed{ \begin{pmatrix} \end{pmatrix} \\ \mp \bar \vec \gamma \binom{ \lfloor".split(),
    *[
        "and",
        " or ",
        "x=",
        "=x",
        " cm",
        " million",
        "no solution",
        "all real numbers",
        "nan",
        "inf",
        "true",
        "A, B, C",
    ],
]


def mutate(text, other, rng):
    """Change a text in a few places, or put two together."""
    if rng.random() < 0.2:
        return text[: rng.randint(0, len(text))] + other[rng.randint(0, len(other)) :]
    for _ in range(rng.randint(1, 3)):
        at = rng.randint(0, len(text))
        until = min(len(text), at + rng.choice([0, 0, 0, 1, 1, 2, 5]))
        text = text[:at] + rng.choice([*PIECES, ""]) + text[until:]
    return text[:60]


def scored(answer):
    return [gold for gold in GOLDS if compare(gold, answer)[0] == "equal"]


def test_golds_have_different_values():
    assert [scored(gold) for gold in GOLDS] == [[gold] for gold in GOLDS]


PERCENT = {"25", "0.25"}  # a percent sign may be missing or written out: a convention of docs/rewards.md


def test_no_short_answer_scores_against_two_golds():
    rng = random.Random(SEED)
    pool = [*GOLDS, *PIECES, "x=x", "0=0", "1=1", r"\{\}", r"x \in \mathbb{R}", "0/0", "1/0", "True", "0.", "1e400"]
    found = {}
    for _ in range(ROUNDS):
        answer = mutate(rng.choice(pool), rng.choice(pool), rng)
        hits = scored(answer)
        if len(hits) > 1 and not ("%" in answer and set(hits) == PERCENT):
            found[answer] = hits
        if hits or rng.random() < 0.02:
            pool.append(answer)  # what scores once is nearer to what scores twice
    assert found == {}
