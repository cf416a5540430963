"""Responses logged token by token: against independent loops, for every rule, and from a training run."""

import json
import sys

import pytest
import torch
from transformers.integrations import integration_utils

import cppo_trl.trainer as seam
from cppo_trl.output import tokens
from cppo_trl.output.run_files import FATES, append_profile, append_tokens, read_lines
from cppo_trl.output.tokens import token_records
from cppo_trl.rules import RULES
from tests.conftest import LIMITS, parameters_of, random_rows, tiny_data
from tests.reference import algorithm_1


def decode(ids):
    return [" ".join(map(str, row)) for row in ids]


def batch_of(mask):
    ids = torch.arange(mask.numel()).view_as(mask) + 100_000
    prompts = torch.arange(2 * len(mask)).view(-1, 2)
    return {"completion_ids": ids, "prompt_ids": prompts, "prompt_mask": torch.tensor([0, 1]).expand_as(prompts)}


def records_of(rule, rows, **parameters):
    parameters = {**parameters_of(rule), **parameters}
    return token_records(batch_of(rows[3]), *rows, RULES[rule].judge(*rows, **parameters), decode)


def test_a_record_equals_algorithm_1():
    rows = random_rows(60, 33, seed=5)
    divergence, advantages, log_ratio, mask = rows
    records, compared, most_masked = records_of("cppo", rows), 0, []
    for record in records:
        first = int(record["text"][0]) - 100_000
        row = first // mask.size(1)
        assert record["prompt"] == str(2 * row + 1)  # without its padding
        length = int(mask[row].nonzero().max()) + 1
        own = mask[row, :length]
        assert record["length"] == len(record["text"]) == length
        at = own.nonzero().flatten().tolist()
        d, a = (x[row, at].double().tolist() for x in (divergence, advantages))
        ratios = log_ratio[row, at].double().exp().tolist()
        kept, causes, margin = algorithm_1(ratios, a, d, **LIMITS)
        assert torch.equal(torch.tensor(record["divergence"]), divergence[row, :length])
        s = w_sum = 0.0
        for j, t in enumerate(at):
            w = 1.0 if len(at) == 1 else 1 - (1 - LIMITS["w_min"]) / (len(at) - 1) * j
            c = min(LIMITS["delta"], LIMITS["delta"] + LIMITS["delta_b"] * w_sum - s)
            s, w_sum = s + w * d[j], w_sum + w
            expected = {"position_weight": w, "threshold": c, "spent": s, "weight_sum": w_sum, "ratio": ratios[j]}
            assert {name: record[name][t] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
            toward = a[j] * (ratios[j] - 1) <= 0
            fate = "idle" if a[j] == 0 else causes[j] or ("toward" if toward else "within")
            assert margin < 1e-6 or FATES[record["fate"][t]] == fate
        assert {FATES[record["fate"][t]] for t in range(length) if t not in at} <= {"foreign"}
        most_masked.append(kept.count(False))
        compared += margin >= 1e-6
    assert compared >= 2
    judged = RULES["cppo"].judge(*rows, **parameters_of("cppo"))
    masked = (mask.bool() & (advantages != 0) & (judged.weight == 0)).sum(1)
    assert most_masked == masked.sort(descending=True).values[:4].tolist()


@pytest.mark.parametrize("rule", RULES)
def test_a_record_holds_what_its_rule_defines(rule):
    divergence, advantages, log_ratio, mask = random_rows(40, 20, seed=6)
    rows = (divergence, advantages, log_ratio * 5, mask)
    record = records_of(rule, rows)[0]
    names = {"response", "prompt", "text", "length", "advantage", "fate", "divergence", "ratio", "weight"}
    prefix = {"position_weight", "threshold", "spent", "weight_sum", "delta_b"} if rule.startswith("cppo") else set()
    assert record.keys() == names | prefix
    seen = {FATES[code] for record in records_of(rule, rows) for code in record["fate"]}
    masks = {"cppo": {"threshold", "budget"}, "dppo": {"threshold"}, "grpo": {"threshold"}}
    masks |= {rule: {"threshold"} for rule in ("trm_max", "trm_avg", "ipo", "vaco")}
    assert seen & {"threshold", "budget"} == masks.get(rule, set())
    assert ("reweighted" in seen) == (rule in ("cppo_soft", "cispo", "minpro", "drpo"))


def test_a_rule_without_budget_keeps_its_weights():
    rows = random_rows(10, 8, seed=7)
    (record, *_) = records_of("cppo", rows, delta_b=float("inf"))
    assert set(record["threshold"]) == {0.05}
    assert "delta_b" not in record
    assert "delta_b" not in records_of("cppo", rows, delta=float("inf"))[0]


def test_records_are_bounded(monkeypatch):
    for name, most in (("RESPONSES", 2), ("RESPONSE_TOKENS", 5), ("PROMPT_TOKENS", 1)):
        monkeypatch.setattr(tokens, name, most)
    rows = random_rows(30, 12, seed=8)
    records = records_of("cppo", rows)
    assert len(records) == 2
    assert all(len(record["text"]) == len(record["threshold"]) == 5 < record["length"] for record in records)
    empty = records_of("cppo", (*rows[:3], 0 * rows[3].long()))
    assert empty == []


def test_training_logs_the_very_numbers_of_its_loss(make_trainer, tmp_path, monkeypatch):
    seen, forwards = [], []
    original = seam.token_records
    monkeypatch.setattr(seam, "token_records", lambda *args: seen.append(args) or original(*args))
    fields = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "cppo_delta": 0.01}
    trainer = make_trainer(max_steps=4, log_tokens_steps=2, learning_rate=3e-3, **fields)
    trainer.model.register_forward_hook(lambda *args: forwards.append(1))
    trainer.train()
    records = read_lines(tmp_path / "trust_region_tokens.jsonl")
    assert {record["step"] for record in records} == {2, 4}
    assert len(seen) == 2
    batch, divergence, advantages, log_ratio, mask, verdict, _ = seen[1]
    record = next(record for record in records if record["step"] == 4)
    text = trainer.processing_class.batch_decode(batch["completion_ids"])
    row = next(i for i in range(len(mask)) if text[i].startswith("".join(record["text"])))
    n = record["length"]
    assert n == mask[row].sum()
    for name, values in (("divergence", divergence), ("ratio", log_ratio.exp()), ("weight", verdict.weight)):
        assert torch.equal(torch.tensor(record[name]), values[row, :n].float())
    assert record["advantage"] == pytest.approx(advantages[row].item(), rel=1e-7)
    assert max(record["divergence"]) > 0  # the last update of its rollout
    assert json.loads((tmp_path / "run.json").read_text())["config"]["cppo_delta"] == 0.01
    with_log = len(forwards)
    make_trainer(max_steps=4, model=trainer.model, **fields).train()
    assert len(forwards) == 2 * with_log  # no pass of its own


def test_a_resume_takes_back_what_it_makes_anew(tmp_path):
    for step in (1, 2, 3, 3):  # died after the log of update 3, went on from update 2
        append_profile(tmp_path, step, {"tokens": [float(step)]})
    with (tmp_path / "trust_region.jsonl").open("a") as file:
        file.write('{"step": 4, "tok')
    assert [row["step"] for row in read_lines(tmp_path / "trust_region.jsonl")] == [1, 2, 3]
    for step in (2, 4, 6, 4):
        append_tokens(tmp_path, step, [{"response": 0, "of": step}, {"response": 1}])
    assert [row["step"] for row in read_lines(tmp_path / "trust_region_tokens.jsonl")] == [2, 2, 4, 4]
    assert read_lines(tmp_path / "none.jsonl") == []


def test_the_scalars_reach_tensorboard(make_trainer, monkeypatch):
    class Writer:
        scalars = {}  # noqa: RUF012

        def add_scalar(self, name, value, step):
            self.scalars.setdefault(name, {})[step] = value

        def __getattr__(self, name):
            return lambda *args, **kwargs: None

    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    monkeypatch.setitem(sys.modules, "tensorboardX", type("Stub", (), {"SummaryWriter": None}))
    trainer = make_trainer(max_steps=2, eval_strategy="steps", eval_steps=2, trainer={"eval_dataset": tiny_data(8)})
    trainer.add_callback(integration_utils.TensorBoardCallback(Writer()))
    trainer.train()
    logged = trainer.state.log_history
    for name in ("cppo/masked", "cppo/delta_b", "cppo/theorem/prefixes", "cppo/theorem/bound_ratio", "reward"):
        assert Writer.scalars[f"train/{name}"] == {row["step"]: row[name] for row in logged if name in row}
    assert Writer.scalars["eval/cppo/masked"].keys() == {2}
