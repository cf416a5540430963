"""The paired study: exact quantities against enumeration, the pairing, contrasts against ladders made by hand."""

import copy
import dataclasses
import itertools
import math
import random
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

import frontier
import paired
from cppo_trl.data import arithmetic
from cppo_trl.output.run_files import whole_lines
from cppo_trl.rules import RULES
from cppo_trl.trust_region import position_weights
from task import PROMPT, TOKENIZER, Task, encode, logps, sample, warm_start

RESULTS = Path(__file__).parents[2] / "docs" / "results"
TINY = dataclasses.replace(
    paired.SETTINGS["main"],
    task=Task(steps=1, errors=(("", 0.2),), updates=(250, 0)),
    prompts=8,
    trajectories=1,
    maturities=(0, 1),
    rollouts=1,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def policy(models):
    return warm_start(TINY.task, 0, models)


def test_a_right_response_is_a_chain_of_sums_modulo_100():
    task = Task(steps=3, errors=(("b", 0.0), ("d", 0.5)))
    answers = task.answers(encode(["97+3+5=", "04+9+1="]))
    texts = [[TOKENIZER.decode(ids).replace(" ", "") for ids in of] for of in answers]
    assert texts[0] == ["b97+3=00;00+5=05;05+3=08;", "d97+3=00;00+5=05;05+3=08;"]
    assert texts[1][0] == "b04+9=13;13+1=14;14+9=23;"
    assert answers.shape == (2, 2, task.length)


def test_demonstrations_err_as_often_as_they_should():
    task = Task(errors=(("b", 0.0), ("d", 0.4)))
    rows = task.demonstrations(200, random.Random(0))
    right = (rows[:, None, PROMPT:] == task.answers(rows[:, :PROMPT])).all(-1).any(-1)
    assert right[:100].all()
    assert right[100:].float().mean() == pytest.approx(0.6**6, abs=0.06)


def test_the_objective_is_the_share_of_right_samples(policy):
    task = TINY.task
    torch.manual_seed(0)
    expected, _ = task.objective(policy)
    assert expected > 0.02
    prompts, answers = task.held_out
    hits = [
        float((sample(policy, prompts, task.length)[:, None, PROMPT:] == answers).all(-1).any(-1).float().mean())
        for _ in range(60)
    ]
    error = torch.tensor(hits).std() / len(hits) ** 0.5
    assert sum(hits) / len(hits) == pytest.approx(expected, abs=4 * float(error))


def test_drift_is_that_of_whole_responses():
    """KL and total variation of responses of two tokens, by a sum over all of them."""
    prompt = TINY.task.prompts(1, random.Random(1))
    torch.manual_seed(3)
    policy = arithmetic.model(TOKENIZER, hidden=64)  # untrained: every response has a chance
    moved = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        everything = torch.tensor(list(itertools.product(range(len(TOKENIZER)), repeat=2)))
        ids = torch.cat([prompt.expand(len(everything), -1), everything], 1)
        mu, pi = (logps(p, ids).gather(-1, everything[..., None]).squeeze(-1).sum(1).double() for p in (policy, moved))
        kl, tv = float((mu.exp() * (mu - pi)).sum()), 0.5 * float((mu.exp() - pi.exp()).abs().sum())
        torch.manual_seed(0)
        sampled = sample(policy, prompt.expand(4000, -1), 2)
        fresh = paired.Rollout(sampled, logps(policy, sampled), torch.zeros(4000, 1))
    found = paired.measure(TINY.task, moved, 0.0, fresh, fresh, 0.0)
    assert kl > 0.01
    assert found.kl == pytest.approx(kl, rel=0.05)
    assert found.tv == pytest.approx(tv, rel=0.1)


def test_an_arm_does_the_same_whatever_other_arms_there_are(models):
    both, alone = (
        list(paired.trajectory("x", dataclasses.replace(TINY, arms=arms), 0, set(), models))
        for arms in (paired.FEW, {"dppo 0.02": paired.FEW["dppo 0.02"]})
    )
    assert both[1]["arms"]["dppo 0.02"] != both[1]["arms"]["none"]
    assert [row["arms"]["dppo 0.02"] for row in both] == [row["arms"]["dppo 0.02"] for row in alone]
    assert [row["maturity"] for row in both] == [0, 1]
    resumed = list(paired.trajectory("x", TINY, 0, {("x", 0, 0, 0)}, models))
    assert [row["maturity"] for row in resumed] == [1]
    assert resumed[0]["arms"]["dppo 0.02"] == both[1]["arms"]["dppo 0.02"]


def test_without_a_limit_every_rule_is_no_trust_region(models):
    loose = {
        "none": paired.Arm(RULES["none"], {}),
        "dppo": paired.Arm(RULES["dppo"], {"delta": 1.0}),
        "grpo": paired.Arm(RULES["grpo"], {"ratio_min": 0.0, "ratio_max": math.inf}),
        "reversed": paired.Arm(paired.Rule(paired.reversed_weights, ""), {"delta": 1.0, "w_min": 0.2}),
    }
    (row,) = paired.trajectory("x", dataclasses.replace(TINY, arms=loose, maturities=(1,)), 0, set(), models)
    assert len({tuple(measured) for measured in row["arms"].values()}) == 1
    assert row["arms"]["none"][0] != 0


@pytest.mark.parametrize("delta", [0.02, 0.1])
def test_reversed_weights_are_those_of_eq_9_backward(delta):
    torch.manual_seed(0)
    divergence, ones = 0.2 * torch.rand(50, 9), torch.ones(50, 9)
    weights = position_weights(ones, 0.2).flip(-1)
    found = paired.reversed_weights(divergence, ones[:, :1], ones, ones, delta=delta, w_min=0.2)
    assert torch.equal(found, weights * divergence <= delta)
    assert 0 < found.float().mean() < 1


def row(trajectory, **arms):
    """A unit whose arms are given as (gain, KL)."""
    return {
        "setting": "s",
        "trajectory": trajectory,
        "before": [0.5, 1.0],
        "arms": {name.replace("_", " "): [gain, kl, 0.0, 0.0, kl, 0.0, 1.0] for name, (gain, kl) in arms.items()},
    }


def test_rules_are_compared_where_both_ladders_reach_and_nowhere_else():
    one = row(0, cppo_1=(0.0, 0.0), cppo_2=(0.4, 0.16), dppo_1=(0.0, 0.04), dppo_2=(0.3, 0.25))
    # over sqrt(KL) in [0.2, 0.4]: CPPO is x, DPPO x - 0.2
    assert frontier.difference(one, "cppo", "dppo", "kl") == pytest.approx(0.2)
    assert frontier.difference(one, "dppo", "cppo", "kl") == pytest.approx(-0.2)
    apart = row(0, cppo_1=(0.0, 0.0), cppo_2=(0.4, 0.04), dppo_1=(0.0, 0.09), dppo_2=(0.3, 0.25))
    assert frontier.difference(apart, "cppo", "dppo", "kl") is None
    assert frontier.difference(one, "cppo", "grpo", "kl") is None


def test_intervals_count_trajectories_not_units():
    rows = [
        row(t, cppo_1=(d, 0.0), cppo_2=(d, 1.0), dppo_1=(0.0, 0.0), dppo_2=(0.0, 1.0))
        for t, d in enumerate((0.01, 0.02, 0.03))
        for _ in range(50)
    ]
    found = frontier.contrast(rows, "cppo", "dppo")
    assert found.mean == pytest.approx(0.02)
    assert found.half == pytest.approx(4.3027 * 0.01 / math.sqrt(3), rel=1e-3)  # t for 2 degrees of freedom
    assert (found.trajectories, found.units) == (3, 150)
    assert frontier.contrast([r for r in rows if r["trajectory"] < 2], "cppo", "dppo") is None


@pytest.mark.parametrize(
    ("mean", "half", "verdict"),
    [
        (0.02, 0.01, "above"),
        (-0.02, 0.01, "below"),
        (0.001, 0.003, "equivalent"),
        (0.003, 0.002, "above, equivalent"),
        (0.004, 0.006, "undecided"),
    ],
)
def test_a_verdict_follows_from_the_interval(mean, half, verdict):
    assert frontier.Interval(mean, half, 12, 288).verdict == verdict


def test_a_rule_of_the_users_own_stands_beside_cppo_and_dppo(tmp_path, models, monkeypatch):
    (tmp_path / "my_study_rule.py").write_text(
        "def soft(divergence, advantages, log_ratio, mask, *, delta, weight):\n"
        "    return mask * (1 - weight * ((divergence > delta) & (log_ratio * advantages > 0)).float())\n"
    )
    monkeypatch.chdir(tmp_path)
    setting = paired.own_rule("my_study_rule.soft", ["delta=0.02,0.08", "weight=1"])
    steps = [arm.parameters for name, arm in setting.arms.items() if frontier.ladder_of(name) == "my_study_rule.soft"]
    assert steps == [{"delta": 0.02, "weight": 1.0}, {"delta": 0.08, "weight": 1.0}]
    tiny = dataclasses.replace(setting, task=TINY.task, prompts=8, maturities=(1,), rollouts=3)
    rows = list(paired.trajectory("my_study_rule.soft", tiny, 0, set(), models))
    rows = [{**of, "trajectory": number} for number, of in enumerate(rows)]  # an interval needs three
    assert all(of["arms"]["my_study_rule.soft 0.08,1"] == of["arms"]["dppo 0.08"] for of in rows)  # weight 1: a mask
    text = frontier.tables(rows, "my_study_rule.soft")
    assert "my_study_rule.soft − DPPO" in text
    frontier.draw(rows, tmp_path / "figure.png")
    assert len(set(imread(tmp_path / "figure.png").reshape(-1, 4)[:, :3].sum(1).round(2))) > 10  # lines and bands
    with pytest.raises(ValueError, match="wieght"):
        paired.own_rule("my_study_rule.soft", ["delta=0.1", "wieght=0.5"])


def test_no_committed_unit_is_there_twice_and_the_page_has_their_table():
    for file in (RESULTS / "paired-pilot.jsonl", RESULTS / "paired.jsonl"):
        rows = list(whole_lines(file))
        assert len(rows) == len({paired.key_of(row) for row in rows})
    page = (RESULTS.parent / "results.md").read_text(encoding="utf-8")
    for line in frontier.summary(rows).splitlines():
        assert line in page
