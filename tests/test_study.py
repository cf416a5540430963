import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from cppo_trl.data import arithmetic
from cppo_trl.report import study as report
from cppo_trl.study import LaggedRollouts, Run, Study, Task, carry_out, finished
from tests.conftest import tiny_model

ROOT = Path(__file__).parents[1]
TASK = {"terms": 3, "train_problems": 64, "test_problems": 4, "warm_start_steps": 1, "hidden": 16}
STUDY = {
    "task": TASK,
    "common": {
        "rollouts": 2,
        "responses_per_rollout": 8,
        "updates_per_rollout": 2,
        "evaluate_every": 1,
        "num_generations": 4,
        "max_completion_length": 8,
    },
    "settings": {"a": None, "b": {"updates_per_rollout": 4, "methods": ["dppo"], "seeds": [7]}},
    "methods": {"cppo": {"cppo_delta": 0.1}, "dppo": {"trust_region": "dppo"}},
    "seeds": [0, 1],
}


def write(tmp_path, **changes):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({**STUDY, **changes}))
    return path


def test_expansion(tmp_path):
    study = Study.load(write(tmp_path))
    assert study.name == "small"
    keys = [("a", m, s) for s in (0, 1) for m in ("cppo", "dppo")] + [("b", "dppo", 7)]
    assert [run.key for run in study.runs] == keys
    assert study.runs[0].config(str(tmp_path)).cppo_delta == 0.1
    last = study.runs[-1].config(str(tmp_path))
    assert (last.trust_region, last.updates_per_rollout, last.max_steps, last.seed) == ("dppo", 4, 8, 7)
    assert last.generation_batch_size == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": [1]}, r"unknown keys \['seed'\]"),
        ({"settings": {"a": {"methods": ["ppo"]}}}, "names .'ppo'.*, which methods lacks"),
        (
            {"methods": {"cppo": {}, "dppo": {"trust_region": "dppo", "cppo_w_min": 0.5}}},
            "'dppo': cppo_w_min must be left at",
        ),
        ({"methods": {"cppo": {}, "dppo": {"cppo_epsilon": 0.5}}}, "'dppo': .*cppo_epsilon"),
    ],
)
def test_what_a_study_refuses_before_any_run(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        Study.load(write(tmp_path, **changes))


def test_resumption_by_lines(tmp_path):
    study, lines = Study.load(write(tmp_path)), tmp_path / "small.jsonl"
    assert finished(lines, study) == {}
    first = {**json.loads(json.dumps({**vars(study.runs[0]), "task": vars(study.task)})), "warm_start": "ab"}
    lines.write_text(json.dumps(first) + "\n" + json.dumps(first)[:50])  # the second was cut short
    assert list(finished(lines, study)) == [study.runs[0].key]
    assert list(finished(lines, study, "ab")) == [study.runs[0].key]
    with pytest.raises(ValueError, match="from another warm start"):
        finished(lines, study, "cd")
    lines.write_text(json.dumps({**first, "rollouts": 3}) + "\n")
    with pytest.raises(ValueError, match=r"another value of \['rollouts'\]"):
        finished(lines, study)


def test_lagged_rollouts_are_those_of_the_older_weights(make_trainer):
    seen = []

    class Spy(LaggedRollouts):
        def __call__(self, prompts, trainer):
            result = super().__call__(prompts, trainer)
            seen.append((prompts, result, trainer.model.state_dict()["lm_head.weight"].clone()))
            return result

    trainer = make_trainer(
        trainer={"rollout_func": Spy(lag=2)}, temperature=0.7, learning_rate=5e-3, max_steps=6, loss_type="dapo"
    )
    trainer.train()
    assert len(seen) == 3
    # the first three rollouts are all of the first weights; the third is two rollouts old
    prompts, rollout, _ = seen[2]
    tokenizer, first = arithmetic.tokenizer(), tiny_model()
    assert not torch.equal(seen[0][2], seen[2][2])
    for prompt, ids, answer, logps in zip(
        prompts, rollout["prompt_ids"], rollout["completion_ids"], rollout["logprobs"], strict=True
    ):
        assert ids == tokenizer(prompt)["input_ids"]
        assert tokenizer.eos_token_id not in answer[:-1]
        with torch.no_grad():
            logits = first(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1] / 0.7
        expected = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logps), expected, rtol=1e-4, atol=1e-5)
    # with no lag the rollout policy is the trained one
    fresh = make_trainer(trainer={"rollout_func": LaggedRollouts(0)}, learning_rate=5e-3, max_steps=3)
    fresh.train()
    assert fresh.state.log_history[0]["cppo/rollout_mismatch"] < 1e-5
    assert trainer.state.log_history[4]["cppo/divergence/mean"] > 1e-3


@pytest.mark.parametrize("stale", [0, 1])
def test_a_run_and_its_line(tmp_path, stale):
    arithmetic.model(arithmetic.tokenizer(), hidden=16).save_pretrained(tmp_path)
    arithmetic.tokenizer().save_pretrained(tmp_path)
    fields = {"num_generations": 4, "max_completion_length": 8}
    run = Run("a", "cppo", 3, rollouts=3, responses_per_rollout=8, updates_per_rollout=2, fields=fields)
    run, counted = replace(run, stale_rollouts=stale, evaluate_every=2), []
    line = carry_out(run, Task(**TASK), tmp_path, lambda: counted.append(1))
    assert len(counted) == 3
    assert [point[0] for point in line["evaluations"]] == [0, 2, 3]
    assert len(line["reward"]) == len(line["masked"]) == 3
    assert sum(line["profile"]["tokens"]) >= 3 * 8  # every response has a token, in both updates' halves
    assert json.loads(json.dumps(line))["seed"] == 3


def line(method, seed, accuracy, setting="a", start=0.4):
    evaluations = [[0, start, 0.1, 0.5], *([i + 1, x, 0.1, 0.5] for i, x in enumerate(accuracy))]
    series = {"length": [0.5, 0.25], "weight": [0.5, None, 0.75]}  # no token had an advantage in the second rollout
    sums = {"tokens": 5.0, "active": 4.0, "masked_by_threshold": 1.0, "masked_by_budget": 0.5}
    profile = {name: [value] * 20 for name, value in sums.items()}
    return {
        "method": method,
        "seed": seed,
        "setting": setting,
        "evaluations": evaluations,
        "profile": profile,
        "stale_rollouts": 0,
        "updates_per_rollout": 4 if setting == "a" else 1,
        "fields": {"learning_rate": 1e-4},
        **series,
    }


def test_statistics_by_hand():
    # 0.5, 0.7, 0.6: mean 0.6, standard deviation 0.1, t(0.975, 2) = 4.3027: half-width 4.3027 * 0.1 / sqrt(3)
    mean, half = report.confidence_interval([0.5, 0.7, 0.6])
    assert mean == pytest.approx(0.6)
    assert half == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-5)
    assert math.isnan(report.confidence_interval([0.5])[1])
    ours = [line("cppo", s, [0.5 + s / 10, 0.4]) for s in range(3)]
    theirs = [line("dppo", s, [0.2, 0.1 + s / 10]) for s in (1, 2)]
    assert report.best(ours[2]) == pytest.approx(0.7)
    assert report.final(ours[2]) == 0.4
    mean, _, pairs = report.paired_difference(ours, theirs, report.best)  # 0.6 - 0.2 and 0.7 - 0.3, seeds 1 and 2
    assert (mean, pairs) == (pytest.approx(0.4), 2)
    assert report.collapsed(line("x", 0, [0.9, 0.19]))
    assert not report.collapsed(line("x", 0, [0.1, 0.21]))


def test_table_and_figures(tmp_path):
    lines = [line(m, s, [0.5 + s / 10, 0.4]) for m in ("cppo", "dppo", "grpo") for s in range(3)]
    lines += [line(m, 0, [0.6], setting="b") for m in ("cppo", "dppo")]
    written = report.write_report(lines, tmp_path, "x")
    assert [p.name for p in written] == [
        "x.md",
        "x-scores.png",
        "x-accuracy.png",
        "x-masks.png",
        "x-length.png",
        "x-updates.png",
    ]
    assert all(p.stat().st_size > 100 for p in written)
    text = written[0].read_text()
    row = "| cppo | 3 | 0.600 ± 0.248 | 0.400 ± 0.000 | +0.000 ± 0.000 | +0.000 ± 0.000 | 0 of 3 "
    assert row + "| 37.50 % | 25.00 %, 12.50 % | 0.625 |" in text
    assert "**b**, warm start 0.400" in text
    assert report.write_report([], tmp_path, "y") == []


def test_the_command_goes_on_where_it_was(tmp_path):
    config = write(tmp_path, settings={"a": {"methods": ["cppo"]}})
    command = [sys.executable, str(ROOT / "scripts/compare.py"), "--config", str(config), "--processes", "2"]

    def compare(*more):
        return subprocess.run(
            [*command, *more], cwd=tmp_path, capture_output=True, text=True, check=False, env=os.environ, timeout=280
        )

    first = compare("--output", "out")
    assert first.returncode == 0, first.stderr[-3000:]
    lines = (tmp_path / "out/small.jsonl").read_text().splitlines()
    assert {json.loads(text)["seed"] for text in lines} == {0, 1}
    (tmp_path / "out/small.jsonl").write_text(lines[0] + "\n")
    second = compare("--output", "out")
    assert "2 runs, 1 of them finished" in second.stdout
    again = (tmp_path / "out/small.jsonl").read_text().splitlines()
    remade = json.loads(again[1])
    original = json.loads(lines[1])
    assert remade["reward"] == original["reward"]  # the same seed gives the same run
    assert remade["evaluations"] == original["evaluations"]
