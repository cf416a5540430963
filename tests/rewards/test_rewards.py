"""The reward functions as a trainer sees them, and the audit of a dataset."""

import inspect
import json
import pickle

import pytest

from cppo_trl.rewards import (
    AccuracyReward,
    AsyncAccuracyReward,
    Outcome,
    accuracy_reward,
    accuracy_reward_async,
    format_reward,
    soft_overlong_punishment,
)
from cppo_trl.rewards import audit as audit_module
from cppo_trl.rewards.__main__ import main
from cppo_trl.rewards.audit import audit_golds

pytestmark = pytest.mark.timeout(120)


def test_conversations_and_strings_are_graded_alike():
    text = r"So \boxed{0.5}"
    conversation = [{"role": "assistant", "content": text}]
    with_tools = [
        {"role": "assistant", "content": r"\boxed{7}", "tool_calls": []},
        {"role": "tool", "content": "0.5"},
        {"role": "assistant", "content": [{"type": "text", "text": text}]},
        {"role": "assistant", "content": None, "tool_calls": []},
    ]
    assert accuracy_reward([text, conversation, with_tools, [], None], ["1/2"] * 5) == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_what_a_trainer_passes_is_accepted_and_logged():
    columns, metrics = {}, {}
    rewards = accuracy_reward(
        prompts=["p"] * 6,
        completions=[r"\boxed{0.5}", r"\boxed{2}", "no idea", r"\boxed{?!}", r"\boxed{1}", r"\boxed{3}"],
        completion_ids=[[1]] * 6,
        solution=["1/2", "3", "3", "3", r"\boxed{", "3"],
        difficulty=[1] * 6,
        log_extra=columns.__setitem__,
        log_metric=metrics.__setitem__,
        trainer_state=None,
    )
    assert rewards == [1.0, 0.0, 0.0, 0.0, None, 1.0]
    assert columns == {
        "gold_parsed": ["1/2", "3", None, "3", None, "3"],
        "answer_parsed": ["0.5", "2", None, None, None, "3"],
        "verdict": ["right", "wrong", "wrong", "wrong", "skipped", "right"],
        "why": ["equal", "different", "no_answer", "unparseable_answer", "unparseable_gold", "equal"],
    }
    assert metrics == {
        "reward/unparseable_gold": 1 / 6,
        "reward/no_answer": 1 / 6,
        "reward/unparseable_answer": 1 / 6,
        "reward/timeout": 0.0,
        "reward/error": 0.0,
    }


def test_time_outs_and_errors_are_counted(hanging):
    metrics = {}
    reward = AccuracyReward(time_limit=2.0)
    completions = [r"\boxed{hang}", r"\boxed{memory}", r"\boxed{1/2}", r"\boxed{1/2}"]
    golds = ["3", "3", "9^{9^{9}}", "1/2"]
    assert reward(completions, golds, log_metric=metrics.__setitem__) == [0.0, 0.0, None, 1.0]
    assert metrics["reward/timeout"] == 0.25
    assert metrics["reward/error"] == 0.25
    assert metrics["reward/unparseable_gold"] == 0.25


def test_an_empty_batch_is_graded():
    assert accuracy_reward([], [], log_extra=lambda *_: None, log_metric=lambda *_: None) == []


def test_settings():
    batch = ([r"\boxed{2}", r"\boxed{?!}", "2", r"\boxed{3}"], ["3"] * 4)
    assert AccuracyReward(partial_credit=0.1)(*batch) == [0.1, 0.0, 0.0, 1.0]
    assert AccuracyReward(name="boxed_only").__name__ == "boxed_only"
    for reward in (AccuracyReward("boxed", 2.0, 0.1, "mine"), AsyncAccuracyReward("boxed", 2.0, 0.1, "mine")):
        again = pickle.loads(pickle.dumps(reward))
        assert type(again) is type(reward)
        assert vars(again) == vars(reward)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sources": "box"}, "sources must name some of boxed, answer_line"),
        ({"sources": []}, "sources must name"),
        ({"time_limit": 0}, "time_limit must be a positive"),
        ({"partial_credit": 1.0}, "partial_credit must be at least 0"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        AccuracyReward(**settings)


def test_a_gold_too_few_is_named():
    with pytest.raises(ValueError, match="solution has 1 golds for 2 completions"):
        accuracy_reward(["a", "b"], ["1"])


def test_format_reward():
    right = ["<think>a</think> b", "  <think>a\nb</think>\n\\boxed{1}\n"]
    wrong = [
        "b",
        "<think>a",
        "x <think>a</think> b",
        "<think>a</think>  ",
        "<think>a<think></think>b",
        "<think>a</think>b</think>c",
        "</think>a<think>",
        "",
    ]
    assert format_reward(right) == [1.0] * len(right)
    assert format_reward(wrong) == [0.0] * len(wrong)
    assert format_reward([[{"role": "assistant", "content": right[0]}]], prompts=["p"], solution=["1"]) == [1.0]


def test_trl_takes_them():
    from trl.trainer.utils import is_async_callable

    assert not is_async_callable(accuracy_reward)
    assert is_async_callable(accuracy_reward_async)
    assert accuracy_reward.__name__ == accuracy_reward_async.__name__ == "accuracy_reward"
    parameters = inspect.signature(accuracy_reward).parameters
    assert {"completions", "solution", "log_extra", "log_metric", "kwargs"} == set(parameters)


def test_overlong_punishment_is_trls():
    """DAPO: nothing up to 100 - 20 tokens, then linear down to -1 at 100."""
    punish = soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    assert punish(completion_ids=[[1] * 80, [1] * 90, [1] * 100, [1] * 101]) == [0.0, -0.5, -1.0, -1.0]


ROWS = [
    {"prompt": "What is 1+1?", "solution": "2"},
    {"prompt": "What is  1+1?", "solution": "2.0"},
    {"prompt": [{"role": "user", "content": "What is 1+1?"}], "solution": "3"},
    {"prompt": "Where?", "solution": "(1, 2)"},
    {"prompt": "How?", "solution": r"\boxed{1} or \boxed{2}"},
    {"prompt": "Why?", "solution": r"\boxed{"},
    {"prompt": "Who?", "solution": None},
    {"prompt": "When?", "solution": r"\}"},
    {"prompt": "Which?", "solution": "Answer: 1}"},
    {"prompt": "Whence?", "solution": "7"},
    {"prompt": "a", "solution": "9 (pears)"},
    {"prompt": "b", "solution": "2+2=5"},
    {"prompt": "c", "solution": r"\frac{1}{0}"},
    {"prompt": "d", "solution": r"(1) \boxed{\frac{1}{2}} (2) \boxed{\{3\}}"},
    {"prompt": "e", "solution": r"\sum_{k=1}^{n} k^2"},
    {"prompt": "f", "solution": "0,111"},
    {"prompt": "g", "solution": "12:00"},
    {"prompt": "h", "solution": "101_2"},
    {"prompt": "i", "solution": r"\{x \mid x < 3\}"},
    {"prompt": "j", "solution": "$C$ is not invertible"},
    {"prompt": "k", "solution": "x" * 3000},
    {"prompt": "l", "solution": r"\{1, 2, \ldots\}"},
]


def test_audit_finds_what_is_wrong():
    audit = audit_golds([row["solution"] for row in ROWS], [row["prompt"] for row in ROWS])
    rows = {name: [row for row, _ in found] for name, found in audit.findings.items()}
    assert rows["unusable"] == [5, 6, 7, 8, 11, 12, 20]
    assert rows["unequal"] == rows["indiscriminate"] == []
    assert rows["verbatim"] == [14, 17, 19, 21]
    assert rows["duplicates"] == [1, 2]
    assert rows["conflicts"] == [2]
    assert rows["ambiguous"] == [3, 4, 13, 15, 16, 17]
    assert audit.rows == len(ROWS)
    assert "conflicts            1    4.55%" in audit.report()
    assert "    row 2: 3, but 2 in row 0" in audit.report()


def test_audit_finds_golds_that_reward_anything(monkeypatch):
    """With a comparison that takes everything for equal, as none of the real one is known to do."""
    monkeypatch.setattr(audit_module, "compare_answers", lambda golds, _: [Outcome("equal")] * len(golds))
    assert [row for row, _ in audit_golds(["5", "x"]).findings["indiscriminate"]] == [0, 1]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_audit_command(tmp_path, capsys):
    clean = write_rows(tmp_path / "clean.jsonl", [{"question": str(i), "answer": f"#### {i}"} for i in range(20)])
    assert main(["audit", clean]) == 0
    assert "20 rows" in capsys.readouterr().out
    repeated = write_rows(tmp_path / "repeated.jsonl", [{"question": "a", "answer": "1"}] * 3)
    assert main(["audit", repeated]) == 0
    assert main(["audit", repeated, "--fail-on", "duplicates"]) == 1
    nested = write_rows(tmp_path / "nested.jsonl", [{"prompt": "a", "reward_model": {"ground_truth": "\\boxed{"}}])
    assert main(["audit", nested]) == 1
    assert main(["audit", nested, "--gold-column", "reward_model.ground_truth", "--fail-on"]) == 0


def test_audit_command_names_what_it_cannot_read(tmp_path, capsys):
    path = write_rows(tmp_path / "rows.jsonl", [{"question": "a", "label": "1"}])
    assert main(["audit", path]) == 2
    assert "set --gold-column" in capsys.readouterr().err
    assert main(["audit", path, "--gold-column", "label", "--prompt-column", "text"]) == 2
    assert "set --prompt-column" in capsys.readouterr().err
    assert main(["audit", write_rows(tmp_path / "rows.txt", [])]) == 2
    assert ".jsonl" in capsys.readouterr().err
