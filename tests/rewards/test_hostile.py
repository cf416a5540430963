"""What a model may write to stop a training run: every input ends within the time limit, and only it suffers."""

import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cppo_trl.rewards import AccuracyReward, Checker, accuracy_reward, extract_answer, extract_gold, format_reward

pytestmark = pytest.mark.timeout(120)

LIMIT_S = 0.7
SLACK_S = 1.5  # a replaced worker, on a busy machine
HOSTILE = {
    "power tower": r"\boxed{9^{9^{9}}}",
    "huge binomial": r"\boxed{\binom{100000}{50000}}",
    "huge factorial": r"\boxed{10^{10^{10}}!}",
    "nested braces": r"\boxed{" + "{" * 100_000 + "}" * 100_000 + "}",
    "nested parentheses": r"\boxed{" + "(" * 2_000 + "1" + ")" * 2_000 + "}",
    "ten thousand boxes": r"\boxed{2}" * 10_000,
    "ten thousand nested boxes": r"\boxed{" * 10_000 + "2" + "}" * 10_000,
    "NUL": "\\boxed{\0}",
    "NUL in a number": "\\boxed{1\0/2}",
    "lone surrogate": "\\boxed{\ud800}",
    "lone surrogate in text": "\udfff Answer: \udc00",
    "fraction tower": r"\boxed{" + r"\frac{1}{" * 3_000 + "1" + "}" * 3_000 + "}",
    "root tower": r"\boxed{" + r"\sqrt{" * 3_000 + "1" + "}" * 3_000 + "}",
    "never closed": r"\boxed{1/2",
    "empty box": r"\boxed{}",
    "long sum": r"\boxed{" + "+".join(["x"] * 50_000) + "}",
    "long number": r"\boxed{" + "7" * 200_000 + "}",
    "long word": r"\boxed{" + "a" * 200_000 + "}",
    "dollars": "Answer: " + "$" * 200_000,
    "commands": r"\boxed{" + r"\text{" * 20_000 + "}",
    "big matrix": r"\boxed{\begin{pmatrix}" + "&".join(["1"] * 20_000) + r"\end{pmatrix}}",
    "hard integral": r"\boxed{\int_0^{10} \frac{\sin(x^{x^{x}})}{\ln(1+x^7)} dx}",
    "hard equation": r"\boxed{x^{17}+\sin(x^5)+e^{x^3}=\ln(x)+7^{x}}",
    "big memory": r"\boxed{2^{2^{40}}}",
    "control characters": "\\boxed{\x01\x02\x1b[31m\x7f}",
    "right to left": "\\boxed{\u202e5}",
}
GOLD = r"\frac{1}{2}"
reward = AccuracyReward(time_limit=LIMIT_S)


def check_alone(completion):
    began = time.monotonic()
    assert reward([completion], [GOLD]) == [0.0]
    assert time.monotonic() - began < LIMIT_S + SLACK_S


@pytest.fixture(scope="module", autouse=True)
def _started():
    reward([r"\boxed{1/2}"] * 2, [GOLD, "0.5"])


@pytest.mark.parametrize("name", HOSTILE)
def test_completion_in_the_main_thread(name):
    check_alone(HOSTILE[name])


@pytest.mark.parametrize("name", HOSTILE)
def test_completion_in_a_thread(name):
    failures = []

    def run():
        try:
            check_alone(HOSTILE[name])
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    assert not failures


@pytest.mark.parametrize("name", HOSTILE)
def test_gold(name):
    """As a gold each is unusable, or was readable after all and the answer is wrong."""
    began = time.monotonic()
    assert reward([r"\boxed{1/2}"], [HOSTILE[name]])[0] in (None, 0.0)
    assert time.monotonic() - began < LIMIT_S + SLACK_S


def test_a_gold_that_hangs_is_given_up_for_the_batch(hanging):
    answers = [rf"\boxed{{1/{i}}}" for i in range(2, 34)]
    began = time.monotonic()
    rewards = AccuracyReward(time_limit=2.0)([*answers, r"\boxed{1/2}"], ["hang"] * len(answers) + ["0.5"])
    assert rewards == [0.0] * len(answers) + [1.0]
    assert time.monotonic() - began < 2 * 2.0 + SLACK_S


def test_an_answer_that_hangs_is_given_up_for_the_batch(hanging):
    golds = [f"1/{i}" for i in range(2, 34)]
    began = time.monotonic()
    rewards = AccuracyReward(time_limit=2.0)([r"\boxed{hang}"] * len(golds) + [r"\boxed{1/2}"], [*golds, "0.5"])
    assert rewards == [0.0] * len(golds) + [1.0]
    assert time.monotonic() - began < 2.0 + 0.5 + SLACK_S


def test_the_rest_of_a_batch_is_answered_as_usual(hanging):
    completions, expected = [], []
    for i in range(2, 402):
        completions.append(rf"\boxed{{\frac{{{i}}}{{{i + 1}}}}}" if i % 2 else r"\boxed{\frac{1}{7}}")
        expected.append(float(i % 2))
    golds = [f"{i}/{i + 1}" for i in range(2, 402)]
    for place in range(5, 400, 100):
        completions[place], expected[place] = r"\boxed{hang}", 0.0
    assert reward(completions, golds) == expected


def test_eight_stuck_answers_among_256_cost_less_than_eight_seconds(hanging):
    """At the default limit of 5 s; no right answer is lost to them."""
    completions = [rf"\boxed{{\frac{{{2 * i}}}{{{14 * i + 2}}}}}" for i in range(256)]
    golds = [f"{i}/{7 * i + 1}" for i in range(256)]
    expected = [1.0] * 256
    for place in range(16, 256, 32):
        completions[place], expected[place] = rf"\boxed{{hang {place}}}", 0.0
    with Checker(workers=2) as checker:
        began = time.monotonic()
        outcomes = checker.check([(gold, extract_answer(text)) for gold, text in zip(golds, completions, strict=True)])
        took = time.monotonic() - began
    assert [float(outcome.why == "equal") for outcome in outcomes] == expected
    assert sum(outcome.why == "timeout" for outcome in outcomes) == 8
    assert took < 8.0 + 2 * SLACK_S  # 6.5 s on two idle cores


@pytest.mark.parametrize("workers", [1, 2])
def test_one_stuck_completion_adds_at_most_one_time_limit(workers, hanging):
    pairs = [(f"{i}/7", f"\\frac{{{2 * i}}}{{14}}") for i in range(1, 801)]
    with Checker(workers=workers) as checker:
        checker.check([("1/2", "0.5"), ("1/3", "0.5")])
        began = time.monotonic()
        outcomes = checker.check(pairs, time_limit=3.0)
        usual = time.monotonic() - began
        assert {outcome.why for outcome in outcomes} == {"equal"}
        stuck = [(f"{i}/11", f"\\frac{{{2 * i}}}{{22}}") for i in range(1, 801)]
        stuck[400] = ("1/7", "hang")
        began = time.monotonic()
        outcomes = checker.check(stuck, time_limit=3.0)
        took = time.monotonic() - began
    assert [outcome.why for outcome in outcomes] == ["equal"] * 400 + ["timeout"] + ["equal"] * 399
    assert took < 1.5 * usual + 3.0 + SLACK_S  # the start of a worker is in it


def test_memory_of_a_worker_is_bounded(hanging):
    with Checker(workers=1, memory_mb=600) as checker:
        outcomes = checker.check(
            [("1", "memory"), ("1/2", "0.5"), ("1", "more memory"), ("1/3", "1/3")], time_limit=3.0
        )
        (child,) = checker._children
        with open(f"/proc/{child.process.pid}/status") as status:
            peak_kb = next(int(line.split()[1]) for line in status if line.startswith("VmPeak"))
    assert [outcome.why for outcome in outcomes] == ["crash", "equal", "crash", "equal"]
    assert peak_kb <= 600 * 1024


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.text(max_size=60), st.text(max_size=40))
def test_garbage_never_raises(completion, gold):
    extract_answer(completion)
    extract_gold(gold)
    assert format_reward([completion])[0] in (0.0, 1.0)
    assert reward([completion, rf"\boxed{{{completion}}}", f"Answer: {completion}"], [gold] * 3)


PIECES = st.sampled_from(
    list(r"0123456789+-*/^_=<>()[]{}|!%$.,:;& xyiAe²")
    + r"\frac \sqrt \{ \} \left \right \pi \text{ \boxed{ \cup \infty \\ \begin{pmatrix} \end{pmatrix} \circ".split()
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(PIECES, max_size=12).map("".join), st.lists(PIECES, max_size=12).map("".join))
def test_latex_like_garbage_never_raises(answer, gold):
    rewards = accuracy_reward([rf"\boxed{{{answer}}}", f"Answer: {answer}"], [gold, f"${gold}$"])
    assert all(r in (None, 0.0, 1.0) for r in rewards)


@settings(max_examples=100, deadline=None)
@given(st.integers(-(10**20), 10**20), st.integers(-(10**20), 10**20))
def test_plain_integers_are_decided_as_the_workers_would(gold, other):
    """Those that fit are compared without a worker; 0.0 added sends the same pair to one."""
    for answer in (gold, other):
        plain = accuracy_reward([rf"\boxed{{{answer}}}"], [gold])
        assert plain == accuracy_reward([rf"\boxed{{({answer})}}"], [f"({gold})"]) == [float(answer == gold)]
