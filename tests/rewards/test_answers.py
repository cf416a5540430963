"""The table of hand-written cases, the labeled GSM8K answers, and the edges of extraction."""

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest

from cppo_trl.rewards import AccuracyReward, accuracy_reward, extract_answer, extract_gold

CASES = Path(__file__).with_name("cases.txt")
DOCS = Path(__file__).parents[2] / "docs" / "rewards.md"
GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"


def load_cases():
    """Return (line, sign, gold, completion) for each case of the table."""
    cases = []
    for line in CASES.read_text(encoding="utf-8").splitlines():
        if line.startswith(("+", "-", "~")):
            sign, _, rest = line.partition(" ")
            gold, arrow, answer = rest.replace("⏎", "\n").partition(" <- ")
            assert arrow, line
            cases.append((line, sign[0], gold, answer if len(sign) == 2 else rf"\boxed{{{answer}}}"))
    return cases


def test_table_has_no_false_accept_and_no_unlisted_false_reject():
    cases = load_cases()
    rewards = accuracy_reward([case[3] for case in cases], [case[2] for case in cases])
    expected = {"+": 1.0, "-": 0.0, "~": 0.0}
    assert [line for (line, sign, *_), reward in zip(cases, rewards, strict=True) if reward != expected[sign]] == []
    assert [line for line, count in Counter(case[0] for case in cases).items() if count > 1] == []
    signs = Counter(case[1] for case in cases)
    assert signs["+"] + signs["-"] >= 300
    assert signs["~"] < 0.005 * (signs["+"] + signs["~"])
    documented = DOCS.read_text(encoding="utf-8")
    assert [line for line, sign, *_ in cases if sign == "~" and line.partition(" <- ")[2] not in documented] == []


def test_right_cases_survive_a_trip_through_an_answer_line():
    cases = [case for case in load_cases() if case[0].startswith("+ ") and "\\boxed" not in case[0]]
    answers = [line.replace("⏎", "\n").partition(" <- ")[2] for line, *_ in cases]
    for form in ("Reasoning.\nAnswer: {}", "Reasoning.\nAnswer: ${}$"):
        chosen = [(case, answer) for case, answer in zip(cases, answers, strict=True) if "$" not in answer]
        rewards = accuracy_reward([form.format(answer) for _, answer in chosen], [case[2] for case, _ in chosen])
        assert [case[0] for (case, _), reward in zip(chosen, rewards, strict=True) if reward != 1.0] == []


@pytest.mark.skipif(not GSM8K.exists(), reason="the GSM8K data is not beside the project")
@pytest.mark.parametrize("form", [r"\boxed{%s}", "Answer: %s"])
def test_labeled_gsm8k_answers(form):
    completions, golds, labels = [], [], []
    for line in (GSM8K / "example_model_solutions.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for model in (value for value in row.values() if isinstance(value, dict)):
            work, found, answer = model["solution"].rpartition("\nA: ")
            completions.append(f"{work}\n{form % answer}" if found else model["solution"])
            golds.append(row["ground_truth"].rpartition("\nA: ")[2])
            labels.append(float(model["is_correct"]))
    assert len(labels) == 5276
    rewards = accuracy_reward(completions, golds)
    disagreements = [
        (golds[i], completions[i][-80:], labels[i]) for i, reward in enumerate(rewards) if reward != labels[i]
    ]
    assert disagreements == []


@pytest.mark.skipif(not GSM8K.exists(), reason="the GSM8K data is not beside the project")
def test_worked_gsm8k_golds_earn_their_own_reward():
    rows = [json.loads(line) for line in (GSM8K / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    golds = [row["answer"] for row in rows]
    finals = [gold.rpartition("#### ")[2] for gold in golds]
    assert accuracy_reward([rf"\boxed{{{final}}}" for final in finals], golds) == [1.0] * len(golds)
    shifted = [final.replace(",", "") + "1" for final in finals]
    assert accuracy_reward([rf"\boxed{{{answer}}}" for answer in shifted], golds) == [0.0] * len(golds)


@pytest.mark.parametrize(
    ("gold", "text"),
    [
        (42, "42"),
        (-3, "-3"),
        (0.5, "0.5"),
        (Fraction(1, 3), "1/3"),
        (" 42 ", "42"),
        (r"\boxed{42}", "42"),
        ("work\n#### 42\n", "42"),
        ("work\nAnswer: 42", "42"),
        ("", None),
        ("  ", None),
        (r"\boxed{", None),
        (r"\boxed{}", None),
        (None, None),
        (True, None),
        (["42"], None),
        (float("nan"), None),
        pytest.param(10**5000, None, id="more digits than Python writes"),
    ],
)
def test_golds_of_all_kinds(gold, text):
    assert extract_gold(gold) == text


def test_number_golds_are_graded():
    assert accuracy_reward([r"\boxed{0.5}"] * 4, [0.5, Fraction(1, 2), 1, None]) == [1.0, 1.0, 0.0, None]
    assert accuracy_reward([r"\boxed{10^{-7}}"], [1e-07]) == [1.0]


def test_sources_can_be_narrowed():
    boxed, line, both = r"\boxed{1/2}", "Answer: 1/2", "\\boxed{1/3}\nAnswer: 1/2"
    assert AccuracyReward(sources="boxed")([boxed, line, both], ["1/2"] * 3) == [1.0, 0.0, 0.0]
    assert AccuracyReward(sources=["answer_line"])([boxed, line, both], ["1/2"] * 3) == [0.0, 1.0, 1.0]


def test_extraction_is_linear():
    """Each text takes quadratic time in a careless extraction: minutes instead of milliseconds."""
    texts = [
        r"\boxed{" * 30_000,
        r"\boxed{1}" * 20_000,
        "Answer: \\[\n" * 20_000,
        "Answer: $$" * 20_000,
        "</think>" * 30_000 + "<think>" * 30_000,
        "*" * 200_000 + "answer" + " " * 200_000,
        r"\boxed" + " " * 200_000 + "{",
        "\n" * 200_000,
    ]
    for text in texts:
        extract_answer(text)
        extract_gold(text)
