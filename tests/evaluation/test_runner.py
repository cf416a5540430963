"""The directory of an evaluation: resumed, claimed, locked."""

import os
import signal

import pytest
import torch

from cppo_trl.data import arithmetic
from cppo_trl.evaluation import command
from cppo_trl.evaluation.command import EvaluationArguments, evaluate_command
from cppo_trl.evaluation.grading import Evaluator
from tests.conftest import tiny_model
from tests.evaluation.conftest import arguments, lines, results, save_model


def killed_after(parts, args):
    """Run in a child process that is killed by SIGKILL when its next part begins."""
    child = os.fork()
    if child == 0:
        answer, done = Evaluator.__call__, []

        def answer_some(self, problems):
            if len(done) == parts:
                os.kill(os.getpid(), signal.SIGKILL)
            done.append(None)
            return answer(self, problems)

        Evaluator.__call__ = answer_some
        try:
            evaluate_command(args)
        finally:
            os._exit(1)  # the child must not go on with the tests
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def test_a_killed_run_resumes_to_the_same_results(here, monkeypatch):
    table = evaluate_command(arguments(output_dir="whole"))
    args = arguments(samples=4)
    killed_after(1, args)
    assert len(lines("out")) == 2
    torch.manual_seed(7)  # another process would be in another random state
    killed_after(1, args)  # each time two more problems of eight
    whole = (here / "out/generations.jsonl").read_text()
    assert len(whole.splitlines()) == 4
    *first, last = whole.splitlines(keepends=True)
    (here / "out/generations.jsonl").write_text("".join(first) + last[: len(last) // 2])  # killed while writing
    assert evaluate_command(args) == table
    assert lines("out") == lines("whole")
    evaluate_command(arguments(output_dir="other", seed=1))
    assert lines("other") != lines("whole")
    assert results("out")["benchmarks"] == results("whole")["benchmarks"]
    monkeypatch.setattr(command, "_evaluator", None)  # finished: no model is loaded
    assert evaluate_command(args) == table


def test_a_finished_run_leaves_its_samples_and_their_metrics(here):
    table = evaluate_command(arguments(temperature=1.0, top_p=1.0))
    written = results()
    rows = lines("out")
    assert (here / "out/table.md").read_text().strip() == table
    assert [(r["benchmark"], r["id"]) for r in rows] == [("sums", i) for i in "01234"] + [("pairs", i) for i in "012"]
    assert len({text for r in rows for text in r["completions"]}) > 16
    assert list(written["benchmarks"]) == ["sums", "pairs", "mean"]
    for name, count in (("sums", 5), ("pairs", 3)):
        mine = [r for r in rows if r["benchmark"] == name]
        metrics = written["benchmarks"][name]
        assert metrics["problems"] == count
        for key, column in (("avg@4", "scores"), ("response_length", "lengths"), ("truncated", "truncated")):
            assert metrics[key] == pytest.approx(sum(sum(r[column]) for r in mine) / (4 * count))
    assert written["benchmarks"]["sums"]["truncated"] > 0
    assert written["settings"]["samples"] == 4
    assert {"torch", "transformers", "cppo-trl"} <= written["versions"].keys()
    assert "± " in table
    both = evaluate_command(EvaluationArguments(compare=["out", "out"]))
    assert both.splitlines()[:5] == table.splitlines()
    assert len(both.splitlines()) == 8


def test_another_evaluation_is_not_mixed_in(here):
    evaluate_command(arguments())
    with pytest.raises(ValueError, match=r"other settings: temperature 0.7 there, 0.9 here; seed 0 there, 3 here\."):
        evaluate_command(arguments(temperature=0.9, seed=3))
    arithmetic.problems(5, 3, 1).to_json("sums.jsonl")
    with pytest.raises(ValueError, match=r"problems .* there"):
        evaluate_command(arguments())
    arithmetic.problems(5, 3, 0).to_json("sums.jsonl")
    save_model(tiny_model(seed=1), "model")
    with pytest.raises(ValueError, match=r"weights .* there"):
        evaluate_command(arguments())
    (here / "other").mkdir()
    (here / "other/thesis.txt").write_text("")
    with pytest.raises(ValueError, match="holds no evaluation"):
        evaluate_command(arguments(output_dir="other"))


def test_one_process_writes_at_a_time(here, monkeypatch):
    def meanwhile(args):
        child = os.fork()
        if child == 0:
            try:
                evaluate_command(args)
            except ValueError as error:
                os._exit("is in use by" not in str(error))
            finally:
                os._exit(2)
        assert os.waitpid(child, 0)[1] == 0
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_evaluator", meanwhile)
    with pytest.raises(KeyboardInterrupt):
        evaluate_command(arguments())
