"""The study's runner against its claims: what it trains, refuses and resumes, and its statistics by hand."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from cppo_trl.data import arithmetic
from study import LaggedRollouts, Study, finished
from tables import best, collapsed, confidence_interval, last, paired_difference, write_tables
from tests.conftest import tiny_model

ROOT = Path(__file__).parents[2]
STUDY = {
    "task": {"terms": 3, "train_problems": 64, "test_problems": 4, "warm_start_steps": 1, "hidden": 16},
    "common": {
        "rollouts": 3,
        "responses_per_rollout": 8,
        "updates_per_rollout": 2,
        "evaluate_every": 2,
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


def test_every_method_runs_on_every_seed_of_its_settings(tmp_path):
    study = Study.load(write(tmp_path))
    keys = [("a", m, s) for s in (0, 1) for m in ("cppo", "dppo")] + [("b", "dppo", 7)]
    assert [run.key for run in study.runs] == keys
    assert study.runs[0].config(str(tmp_path)).cppo_delta == 0.1
    config = study.runs[-1].config(str(tmp_path))
    assert (config.trust_region, config.updates_per_rollout, config.max_steps, config.seed) == ("dppo", 4, 12, 7)
    assert config.generation_batch_size == 8


@pytest.mark.parametrize("path", sorted((ROOT / "scripts/study").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_published_studies_load_and_their_records_are_theirs(path):
    study = Study.load(path)
    assert len(finished(ROOT / f"docs/results/{path.stem}.jsonl", study)) == len(study.runs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": [1]}, r"unknown keys \['seed'\]"),
        ({"settings": {"a": {"methods": ["ppo"]}}}, "names .'ppo'.*, which `methods` does not define"),
        ({"methods": {"cppo": {}, "dppo": {"cppo_epsilon": 0.5}}}, "'dppo': .*cppo_epsilon"),
    ],
)
def test_a_mistake_in_a_study_is_refused_before_any_run(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        Study.load(write(tmp_path, **changes))


def test_a_finished_run_is_recognized_and_one_of_another_study_refused(tmp_path):
    study, lines = Study.load(write(tmp_path)), tmp_path / "small.jsonl"
    assert finished(lines, study) == {}
    first = {**json.loads(json.dumps({**vars(study.runs[0]), "task": vars(study.task)})), "warm_start": "ab"}
    lines.write_text(json.dumps(first) + "\n" + json.dumps(first)[:50])  # the second line is incomplete
    assert list(finished(lines, study, "ab")) == [study.runs[0].key]
    with pytest.raises(ValueError, match="different warm_start"):
        finished(lines, study, "cd")
    lines.write_text(json.dumps({**first, "rollouts": 4}) + "\n")
    with pytest.raises(ValueError, match="different rollouts"):
        finished(lines, study)


def test_lagged_rollouts_come_from_the_older_weights(make_trainer):
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
    # the first three rollouts all come from the initial weights; the third lags by two
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
    # without a lag, the rollout policy is the current one
    fresh = make_trainer(trainer={"rollout_func": LaggedRollouts(0)}, learning_rate=5e-3, max_steps=3)
    fresh.train()
    assert fresh.state.log_history[0]["cppo/rollout_mismatch"] < 1e-5
    assert trainer.state.log_history[4]["cppo/divergence/mean"] > 1e-3


def record(method, seed, accuracy, setting="a", start=0.4):
    evaluations = [[0, start, 0.1, 0.9], *([i + 1, x, 0.1, x / 2] for i, x in enumerate(accuracy))]
    sums = {"active": 4.0, "masked_by_threshold": 1.0, "masked_by_budget": 0.5}
    weight = [0.5, None, 0.75]  # no token had an advantage in the second rollout
    profile = {name: [value] * 20 for name, value in sums.items()}
    keys = {"method": method, "seed": seed, "setting": setting}
    return {**keys, "evaluations": evaluations, "profile": profile, "weight": weight}


def test_statistics_by_hand():
    # 0.5, 0.7, 0.6: mean 0.6, standard deviation 0.1, t(0.975, 2) = 4.3027: half-width 4.3027 * 0.1 / sqrt(3)
    mean, half = confidence_interval([0.5, 0.7, 0.6])
    assert mean == pytest.approx(0.6)
    assert half == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-5)
    assert math.isnan(confidence_interval([0.5])[1])
    ours = [record("cppo", s, [0.5 + s / 10, 0.4]) for s in range(3)]
    theirs = [record("dppo", s, [0.2, 0.1 + s / 10]) for s in (1, 2)]
    assert (best(ours[2]), last(ours[2])) == (pytest.approx(0.7), 0.4)
    mean, _, pairs = paired_difference(ours, theirs, best)  # 0.6 - 0.2 and 0.7 - 0.3, seeds 1 and 2
    assert (mean, pairs) == (pytest.approx(0.4), 2)
    assert collapsed(record("x", 0, [0.9, 0.19]))
    assert not collapsed(record("x", 0, [0.1, 0.21]))


def test_a_table_by_hand(tmp_path):
    records = [record(m, s, [0.5 + s / 10, 0.4]) for m in ("cppo", "dppo", "grpo") for s in range(3)]
    records += [record(m, 0, [0.6], setting="b") for m in ("cppo", "dppo")]
    page, *figures = write_tables(records, tmp_path, "x")
    assert [path.name for path in figures] == ["x-accuracy.png", "x-masks.png"]
    text = page.read_text()
    row = "| cppo | 3 | 0.600 ± 0.248 | 0.400 ± 0.000 | 0.200 ± 0.000 | +0.000 ± 0.000 | +0.000 ± 0.000 | 0 of 3 "
    assert row + "| 37.50 % | 25.00 %, 12.50 % | 0.625 |" in text
    assert "**b**, warm start: avg@16 0.400, greedy 0.900" in text


@pytest.mark.timeout(900)
def test_the_command_resumes_and_repeats_a_run_exactly(tmp_path):
    config = write(
        tmp_path, seeds=[0], settings={"a": {"methods": ["cppo"]}, "stale": {"stale_rollouts": 1, "methods": ["dppo"]}}
    )
    command = [sys.executable, str(ROOT / "scripts/study/compare.py"), "--config", str(config), "--processes", "1"]
    command += ["--output", "out"]

    def compare():
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=os.environ)

    first = compare()
    assert first.returncode == 0, first.stderr[-3000:]
    lines = (tmp_path / "out/small.jsonl").read_text().splitlines()
    records = {(r["setting"], r["method"], r["seed"]): r for r in map(json.loads, lines)}
    assert set(records) == {("a", "cppo", 0), ("stale", "dppo", 0)}
    for made in records.values():
        assert [point[0] for point in made["evaluations"]] == [0, 2, 3]
        assert len(made["reward"]) == len(made["masked"]) == 3
        assert sum(made["profile"]["tokens"]) >= 3 * 8  # every response has at least one token
    (tmp_path / "out/small.jsonl").write_text("\n".join(lines[1:]) + "\n")
    assert "2 runs, 1 of them finished" in compare().stdout
    repeated, original = json.loads((tmp_path / "out/small.jsonl").read_text().splitlines()[-1]), json.loads(lines[0])
    assert repeated["reward"] == original["reward"]
    assert repeated["evaluations"] == original["evaluations"]
