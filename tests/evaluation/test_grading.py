"""Scores, answers and votes of fixed completions."""

import pytest
from transformers import PreTrainedTokenizerFast

from cppo_trl.evaluation.generation import Completion
from cppo_trl.evaluation.grading import grade, group_answers
from cppo_trl.evaluation.metrics import maj_at_n
from cppo_trl.evaluation.problems import Problem
from cppo_trl.rewards import AccuracyReward, accuracy_reward


class Texts(PreTrainedTokenizerFast):
    """Its tokens are texts."""

    def __init__(self): ...

    def batch_decode(self, rows, skip_special_tokens):
        assert skip_special_tokens
        return ["".join(tokens) for tokens in rows]


def graded(texts, solution, prompt="?", reward=accuracy_reward):
    completions = [Completion(list(text), False) for text in texts]
    return grade([Problem("b", "1", prompt, solution)], completions, Texts(), reward)[0]


def test_equal_answers_vote_together():
    # half of the samples say a half in four ways; by spelling the right answer would win
    texts = [r"\boxed{1/2}", r"\boxed{2}", "Answer: 0.5", r"\boxed{2}", r"\boxed{\frac12}", r"\boxed{2/4}", "none"]
    result = graded(texts, "2")
    assert result.scores == [0, 1, 0, 1, 0, 0, 0]
    assert result.answers == ["1/2", "2", "0.5", "2", r"\frac12", "2/4", None]
    assert result.groups == [1, 0, 1, 0, 1, 1, None]
    assert maj_at_n(result.scores, result.groups) == 0.0
    assert graded([*texts[:3], r"\boxed{2.0}"], "2").groups == [1, 0, 1, 0]


def test_every_problem_gets_its_own_samples():
    problems = [Problem("b", name, "?", solution) for name, solution in (("x", "1"), ("y", "2"))]
    texts = [r"\boxed{1}", r"a \boxed{2}", r"\boxed{1}", r"b \boxed{2}"]
    completions = [Completion(list(text), text.startswith("b")) for text in texts]
    first, second = grade(problems, completions, Texts(), accuracy_reward)
    assert (first.id, first.completions, first.scores, first.answers) == ("x", texts[:2], [1, 0], ["1", "2"])
    assert (second.id, second.completions, second.scores, second.answers) == ("y", texts[2:], [0, 1], ["1", "2"])
    assert (first.lengths, second.truncated) == ([len(texts[0]), len(texts[1])], [False, True])


def test_wrong_answers_are_compared_only_where_it_decides(monkeypatch):
    compared = []

    def compare(golds, answers):
        compared.extend(zip(golds, answers, strict=True))
        return []

    monkeypatch.setattr("cppo_trl.evaluation.grading.compare_answers", compare)
    assert group_answers(["1/2", "0.5"], [0, 0]) == [1, 2]
    assert group_answers(["2", "2", "1/2"], [1, 1, 0]) == [0, 0, 1]
    assert compared == []
    with pytest.raises(ValueError, match="shorter"):
        group_answers(["2", "1/2", "0.5"], [1, 0, 0])
    assert compared == [("1/2", "0.5")]


def test_the_reward_decides_where_answers_are_found_and_how_they_are_scored():
    assert graded([r"\boxed{042}", r"\boxed{42}", "Answer: 42"], "42").scores == [1, 1, 1]  # AIME: 0 to 999
    assert graded([r"\boxed{1}"] * 2, None).excluded
    boxed = graded(["Answer: 42", r"\boxed{42}"], "42", reward=AccuracyReward("boxed"))
    assert (boxed.answers, boxed.scores) == ([None, "42"], [0, 1])
    seen = []

    def reward(completions, solution):
        seen.extend(completions)
        return [0.0] * len(completions)

    graded(["x"], "1", prompt=[{"role": "user", "content": "?"}], reward=reward)
    assert seen == [[{"role": "assistant", "content": "x"}]]
