import copy
import functools
import math
import sys
from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl import GRPOConfig, GRPOTrainer

from cppo_trl import CPPOConfig, CPPOTrainer
from cppo_trl.data import arithmetic
from cppo_trl.seam.checks import check_hooks
from tests.conftest import (
    COMPLETION,
    SMALL_RUN,
    digit_reward,
    full_logps,
    gradients,
    injected_batch,
    tiny_data,
    tiny_model,
)
from tests.reference import algorithm_1, clipped_quantile

LOSS_TYPES = ["dr_grpo", "dapo", "grpo", "bnpo"]
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, task_type="CAUSAL_LM")


def reference_mask(trainer, batch, logps):
    """Keep mask of every row by the plain loop of Algorithm 1, with the budget of Eq. (22)."""
    args, rows = trainer.args, []
    tokens = batch["completion_mask"] * batch.get("tool_mask", 1)
    for b, length in enumerate(tokens.sum(1).tolist()):
        own = tokens[b].nonzero().flatten()
        pi, mu = logps[b, own].double(), batch["old_per_token_logps"][b, own].double()
        divergences = (pi.exp() - mu.exp()).abs().tolist()
        delta_b = clipped_quantile(divergences, args.cppo_delta_b, 0.9, args.cppo_delta_b_max_multiple)
        advantages = [batch["advantages"][b].item()] * length
        keep, _, margin = algorithm_1(
            (pi - mu).exp().tolist(), advantages, divergences, args.cppo_delta, delta_b, args.cppo_w_min
        )
        assert margin > 1e-6
        row = torch.zeros(COMPLETION)
        row[own] = torch.tensor(keep, dtype=torch.float32)
        rows.append(row)
    return torch.stack(rows)


def normalized(loss_type, per_token, mask, batch, trainer):
    """The four normalizers of TRL's documentation, for one micro-batch of ``gradient_accumulation_steps``."""
    accumulation = trainer.args.gradient_accumulation_steps
    if loss_type == "dr_grpo":
        return per_token.mul(mask).sum() / (len(mask) * COMPLETION) / accumulation
    if loss_type == "bnpo":
        return per_token.mul(mask).sum() / mask.sum() / accumulation
    if loss_type == "grpo":
        return (per_token.mul(mask).sum(1) / mask.sum(1).clamp(min=1)).mean() / accumulation
    tokens_per_update = batch["num_items_in_batch"] * accumulation / trainer.args.steps_per_generation
    return per_token.mul(mask).sum() / tokens_per_update


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_gradient_is_the_analytic_one(make_trainer, loss_type, accumulation):
    trainer = make_trainer(loss_type=loss_type, gradient_accumulation_steps=accumulation, temperature=0.8)
    batch = injected_batch(trainer.model)
    logps = full_logps(trainer.model, batch, temperature=0.8)
    keep = reference_mask(trainer, batch, logps.detach())
    mask = batch["completion_mask"]
    assert 0.1 < 1 - keep.sum() / mask.sum() < 0.9
    # -A rho M / N, with the gradient of log pi alone: rho and M are constants
    coefficient = -batch["advantages"][:, None] * (logps - batch["old_per_token_logps"]).exp().detach() * keep
    trainer.model.zero_grad()
    normalized(loss_type, coefficient * logps, mask, batch, trainer).backward()
    expected = {n: p.grad.clone() for n, p in trainer.model.named_parameters()}
    loss, found = gradients(trainer, batch)
    torch.testing.assert_close(loss, normalized(loss_type, coefficient, mask, batch, trainer), rtol=1e-5, atol=1e-7)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_dppo_and_the_ratio_cap_in_the_gradient(make_trainer):
    trainer = make_trainer(trust_region="dppo", cppo_delta=0.1, cppo_ratio_cap=1.2)
    batch = injected_batch(trainer.model)
    logps, mu, mask = full_logps(trainer.model, batch), batch["old_per_token_logps"], batch["completion_mask"]
    advantages, ratio = batch["advantages"][:, None], (logps - mu).exp().detach()
    keep = (advantages * (ratio - 1) <= 0) | ((logps.exp() - mu.exp()).abs() <= 0.1)
    assert ((ratio > 1.2) & keep & mask.bool()).any()
    trainer.model.zero_grad()
    (-(advantages * ratio.clamp(max=1.2) * keep * logps) * mask).sum().div(mask.numel()).backward()
    expected = {n: p.grad.clone() for n, p in trainer.model.named_parameters()}
    _, found = gradients(trainer, batch)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_without_limits_training_is_trl_s_grpo_without_clipping(make_trainer, tmp_path, loss_type, peft, beta):
    tiny_model().save_pretrained(tmp_path / "model")
    fields = {"loss_type": loss_type, "beta": beta, "scale_rewards": "none", "per_device_train_batch_size": 4}
    fields |= {
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
        "num_iterations": 2,
        "disable_dropout": True,
    }
    extra = {"model": str(tmp_path / "model"), "trainer": {"peft_config": LORA} if peft else None}
    ours = make_trainer(cppo_delta=math.inf, cppo_delta_b=math.inf, **fields, **extra)
    ours.train()
    theirs = make_trainer(GRPOTrainer, GRPOConfig, epsilon=1e6, **fields, **extra)  # seeds everything anew
    theirs.train()
    for name, parameter in theirs.model.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], parameter, rtol=1e-5, atol=1e-6)
    losses = [[h["loss"] for h in t.state.log_history if "loss" in h] for t in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=1e-7)
    assert len(losses[0]) == 4


def test_moe_auxiliary_loss_entropy_bonus_and_completions_table_stay(make_trainer, tmp_path):
    torch.manual_seed(0)
    shape = {"vocab_size": 23, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 4, "moe_intermediate_size": 16}
    shape |= {"num_experts_per_tok": 2}
    moe = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**shape, output_router_logits=True, initializer_range=0.4, pad_token_id=0)
    )
    fields = {"entropy_coef": 0.01, "scale_rewards": "none", "loss_type": "dapo", "log_completions": True}
    ours = make_trainer(model=copy.deepcopy(moe), cppo_delta=math.inf, steps_per_generation=2, **fields)
    ours.train()
    theirs = make_trainer(GRPOTrainer, GRPOConfig, model=moe, epsilon=1e6, steps_per_generation=2, **fields)
    theirs.train()
    for name, parameter in theirs.model.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], parameter, rtol=1e-5, atol=1e-6)
    assert ours.state.log_history[0]["aux_loss"] == pytest.approx(theirs.state.log_history[0]["aux_loss"])
    assert list((tmp_path / "completions").glob("*.parquet"))


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_masked_tokens_bring_no_nan_whatever_their_ratio(make_trainer, tmp_path, beta):
    tiny_model().save_pretrained(tmp_path / "model")
    trainer = make_trainer(model=str(tmp_path / "model"), beta=beta)
    batch = injected_batch(trainer.model)
    batch["ref_per_token_logps"] = batch["old_per_token_logps"] - 0.1
    batch["advantages"] = batch["advantages"].abs() + 0.1
    _, clean = gradients(trainer, batch)
    hostile = dict(batch, old_per_token_logps=batch["old_per_token_logps"].clone())
    hostile["old_per_token_logps"][0, 0] = -500.0  # ratio e^500, moving away: masked
    hostile["old_per_token_logps"][3, 2] = -torch.inf
    hostile["old_per_token_logps"][4, 1] = torch.nan
    loss, found = gradients(trainer, hostile)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in found.values())
    assert torch.nn.utils.get_total_norm(found.values()).isfinite()
    assert any(not torch.equal(clean[n], found[n]) for n in clean)
    assert torch.equal(
        hostile["old_per_token_logps"].isnan(), (torch.arange(96) == 4 * 12 + 1).view(8, 12)
    )  # batch untouched


def test_missing_rollout_logps_count_as_on_policy(make_trainer):
    trainer = make_trainer()
    batch = injected_batch(trainer.model)
    logps = full_logps(trainer.model, batch).detach()
    unknown = torch.zeros(8, COMPLETION, dtype=torch.bool)
    unknown[3, 4], unknown[5, 0] = True, True
    _, expected = gradients(
        trainer, dict(batch, old_per_token_logps=batch["old_per_token_logps"].where(~unknown, logps))
    )
    _, found = gradients(
        trainer, dict(batch, old_per_token_logps=batch["old_per_token_logps"].masked_fill(unknown, torch.nan))
    )
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


def test_tool_tokens_carry_no_weight_no_divergence_and_no_position(make_trainer):
    trainer = make_trainer()
    batch = injected_batch(trainer.model)
    tool_mask = torch.ones(8, COMPLETION, dtype=torch.long)
    tool_mask[3, 2:5], tool_mask[0, :1] = 0, 0
    batch["tool_mask"] = tool_mask
    batch["old_per_token_logps"] = batch["old_per_token_logps"].where(tool_mask.bool(), 0.0)  # as TRL pads them
    logps = full_logps(trainer.model, batch)
    keep, mask = reference_mask(trainer, batch, logps.detach()), batch["completion_mask"] * tool_mask
    trainer.model.zero_grad()
    ratio = (logps - batch["old_per_token_logps"]).exp().detach()
    (-(batch["advantages"][:, None] * ratio * keep * logps) * mask).sum().div(mask.numel()).backward()
    expected = {n: p.grad.clone() for n, p in trainer.model.named_parameters()}
    _, found = gradients(trainer, batch)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_the_ratio_is_taken_against_the_engine(make_trainer):
    """A rollout_func's log-probs are the anchor, also where TRL recomputed its own."""
    engine_logp, seen = -1.25, []

    def rollout_func(prompts, trainer):
        ids = [trainer.processing_class(p)["input_ids"] for p in prompts]
        answers = [[5, 6, 7 + i % 3] for i in range(len(prompts))]
        return {"prompt_ids": ids, "completion_ids": answers, "logprobs": [[engine_logp] * 3 for _ in answers]}

    class Spy(CPPOTrainer):
        def get_off_policy_mask(self, **kwargs):
            seen.append(kwargs["sampling_per_token_logps"].clone())
            return super().get_off_policy_mask(**kwargs)

    trainer = make_trainer(Spy, trainer={"rollout_func": rollout_func}, max_steps=2)
    trainer.train()
    assert len(seen) == 2
    assert all((anchor == engine_logp).all() for anchor in seen)
    assert "cppo/divergence/mean" in trainer.state.log_history[0]


def test_vllm_with_a_rollout_func_that_gives_no_logprobs_scores_the_rollout_itself(make_trainer, monkeypatch):
    class Engine:
        def __init__(self, **kwargs):
            pass

        def sync_weights(self):
            pass

    def rollout_func(prompts, trainer):
        ids = [trainer.processing_class(p)["input_ids"] for p in prompts]
        return {
            "prompt_ids": ids,
            "completion_ids": [[5, 6, 7 + i % 3 * 3] for i in range(len(ids))],
            "logprobs": None,
        }

    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", Engine)
    fields = {"use_vllm": True, "steps_per_generation": 4, "learning_rate": 5e-3}
    trainer = make_trainer(trainer={"rollout_func": rollout_func}, **fields)
    trainer.train()
    means = [h["cppo/divergence/mean"] for h in trainer.state.log_history if "loss" in h]
    assert means[0] == 0.0
    assert min(means[1:]) > 1e-4


def test_metrics_in_training_and_evaluation(make_trainer):
    names = {"masked", "masked_by_threshold", "masked_by_budget", "toward_rollout", "delta_b", "masked_positive"}
    names |= {"masked_negative", "divergence/mean", "divergence/p90", "divergence/max", "ratio/mean", "ratio/max"}
    names |= {"theorem/prefixes", "theorem/responses", "theorem/deduction", "theorem/bound_ratio"}
    trainer = make_trainer(
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
        steps_per_generation=8,
        learning_rate=5e-3,
        eval_strategy="steps",
        eval_steps=2,
        max_steps=8,
        trainer={"eval_dataset": tiny_data(8)},
    )
    trainer.train()
    history = trainer.state.log_history
    train = [h for h in history if "loss" in h]
    evaluation = [h for h in history if "eval_loss" in h]
    assert len(train) == 8
    assert len(evaluation) == 4
    assert names <= {n.removeprefix("cppo/") for h in train for n in h}
    assert "eval_cppo/divergence/mean" in evaluation[0]
    assert not any("clip_ratio" in n for h in history for n in h)
    on_policy, off_policy = train[0], train[3]
    assert on_policy["cppo/masked"] == on_policy["cppo/divergence/max"] == 0.0
    assert off_policy["cppo/divergence/mean"] > 1e-4
    assert any(h["cppo/masked"] > 0 for h in train)
    for h in train:
        assert h["cppo/masked"] == pytest.approx(h["cppo/masked_by_threshold"] + h["cppo/masked_by_budget"])
    assert all(0.02 - 1e-6 <= h["cppo/delta_b"] <= 0.04 + 1e-6 for h in train)
    trainer.accelerator.gradient_state._set_sync_gradients(False)  # as within an update
    assert "eval_cppo/divergence/mean" in trainer.evaluate()


def test_a_pass_outside_rollout_and_loss_is_trl_s(make_trainer):
    trainer = make_trainer(max_steps=2, cppo_divergence="topk_tv", cppo_topk=3)
    ids, attended = torch.randint(2, 20, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    assert trainer._get_per_token_logps_and_entropies(trainer.model, ids, attended, 4)[0].shape == (3, 4)
    trainer.train()
    with torch.no_grad():
        found = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attended, 4, compute_entropy=True)
        expected = GRPOTrainer._get_per_token_logps_and_entropies(
            trainer, trainer.model, ids, attended, 4, compute_entropy=True
        )
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_rollout_mismatch_is_of_unmoved_weights_only(make_trainer):
    """Also where an evaluation makes a rollout of its own in between."""
    fields = {"learning_rate": 5e-3, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 6}
    trainer = make_trainer(steps_per_generation=3, trainer={"eval_dataset": tiny_data(8)}, **fields)
    trainer.train()
    logged = {h["step"]: h.get("cppo/rollout_mismatch") for h in trainer.state.log_history if "loss" in h}
    assert logged == {1: 0.0, 2: None, 3: None, 4: 0.0, 5: None, 6: None}
    # two updates of two micro-batches in three: the second begins on the old rollout and ends on a new one
    spanning = make_trainer(
        steps_per_generation=3,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
        **fields,
        trainer={"eval_dataset": tiny_data(8)},
    )
    spanning.train()
    logged = {h["step"]: h.get("cppo/rollout_mismatch") for h in spanning.state.log_history if "loss" in h}
    assert logged == {1: 0.0, 2: 0.0, 3: None, 4: 0.0, 5: 0.0, 6: None}
    evaluations = [h for h in trainer.state.log_history if "eval_loss" in h]
    assert all(h["eval_cppo/rollout_mismatch"] == 0.0 for h in evaluations)


def test_metrics_cost_one_collective_and_one_wait_per_update(make_trainer, monkeypatch):
    """Against TRL's own GRPO on the same schedule; waits are counted where the package's own code asks for them."""
    waits, gathers = [], []
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero"):
        original = getattr(torch.Tensor, name)

        @functools.wraps(original)
        def counted(self, *args, original=original, name=name, **kwargs):
            caller = sys._getframe(1).f_globals["__name__"]
            on_the_host = {("cppo_trl.seam.state", "__bool__"), ("cppo_trl.trust_region", "__int__")}
            if caller.startswith("cppo_trl") and (caller, name) not in on_the_host:  # sampled_at, a quantile's rank
                waits.append((caller, name))
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    gather = Accelerator.gather
    monkeypatch.setattr(Accelerator, "gather", lambda self, x: gathers.append(1) or gather(self, x))
    fields = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 4}
    make_trainer(GRPOTrainer, GRPOConfig, max_steps=4, scale_rewards="none", **fields).train()
    theirs = len(gathers)
    gathers.clear()
    make_trainer(max_steps=4, **fields).train()
    assert waits == [("cppo_trl.metrics", "tolist")] * 4
    # TRL gathers its clip ratios for each of the 8 micro-batches as well as we do; ours come once per update
    assert len(gathers) == theirs + 4


def test_the_policy_s_log_probs_must_be_fp32(make_trainer, monkeypatch):
    trainer = make_trainer()
    host = GRPOTrainer._get_per_token_logps_and_entropies

    def rounded(self, *args, **kwargs):
        logps, *others = host(self, *args, **kwargs)
        return logps.bfloat16(), *others

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", rounded)
    with pytest.raises(RuntimeError, match=r"log-probs of the policy are torch\.bfloat16, not fp32"):
        trainer._compute_loss(trainer.model, injected_batch(trainer.model))


def test_a_rule_in_a_file_of_one_s_own_trains(make_trainer, tmp_path, monkeypatch, capsys):
    (tmp_path / "late_rule.py").write_text(
        "def late(divergence, advantages, log_ratio, mask, *, start):\n"
        "    position = mask.float().cumsum(-1)\n"
        "    return (position > start) & mask.bool()\n"
    )
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer(trust_region="late_rule.late", trust_region_parameters={"start": 3}, cppo_ratio_cap=5.0)
    assert "late_rule.late, binary_tv, start 3, ratio capped at 5" in capsys.readouterr().out
    batch = injected_batch(trainer.model)
    _, found = gradients(trainer, batch)
    later = dict(batch, advantages=batch["advantages"][:, None] * (torch.arange(COMPLETION) >= 3))
    _, expected = gradients(make_trainer(trust_region="none", model=trainer.model, cppo_ratio_cap=5.0), later)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)
    trainer.create_model_card(model_name="tiny")
    assert "late_rule.late, binary_tv, start 3" in (tmp_path / "README.md").read_text()


def test_training_raises_the_reward_with_lora_checkpointing_and_resume(make_trainer, tmp_path):
    fields = {"learning_rate": 3e-2, "gradient_checkpointing": True, "save_strategy": "steps", "save_steps": 20}
    fields |= {"per_device_train_batch_size": 16, "cppo_delta": 0.3, "cppo_delta_b": 0.1}
    lora = {"trainer": {"peft_config": LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")}}
    first = make_trainer(max_steps=40, **fields, **lora)
    first.train()
    resumed = make_trainer(max_steps=60, **fields, **lora)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-40"))
    rewards = [h["reward"] for h in resumed.state.log_history if "reward" in h]
    assert len(rewards) == 30  # one per rollout of two updates: the history went on
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2


def test_start_up_table(make_trainer, capsys):
    make_trainer(steps_per_generation=4)
    table = capsys.readouterr().out
    assert "8 prompts x 4 responses = 32" in table
    assert "off-policy from      update 2" in table
    assert "cppo, binary_tv, delta 0.15, w_min 0.8, delta_b 0.02 to 0.04" in table


def test_drift_of_trl_is_loud(make_trainer, monkeypatch):
    # the hook is not called
    def bypass(self, model, inputs):
        return torch.zeros((), requires_grad=True)

    with monkeypatch.context() as patch:
        patch.setattr(GRPOTrainer, "_compute_loss", bypass)
        trainer = make_trainer()
        with pytest.raises(RuntimeError, match="applied 0 times"):
            trainer._compute_loss(trainer.model, injected_batch(trainer.model))
    # its signature changed
    with monkeypatch.context() as patch:
        patch.setattr(GRPOTrainer, "get_off_policy_mask", staticmethod(lambda advantages, logps: None))
        with pytest.raises(RuntimeError, match="get_off_policy_mask"):
            make_trainer()


def test_a_method_that_trl_no_longer_has_and_an_older_trl_are_loud(monkeypatch):
    with pytest.raises(RuntimeError, match=r"GRPOTrainer.gone of the installed TRL takes None, expected \['self'\]"):
        check_hooks(GRPOTrainer, {"gone": ["self"]})
    for version, loud in {"1.15.9": True, "1.16.0": False, "1.17.0rc1": False, "2.0": False}.items():
        monkeypatch.setattr("cppo_trl.seam.checks.version", lambda name, version=version: version)
        with pytest.raises(RuntimeError, match=r"needs 1\.16") if loud else nullcontext():
            check_hooks(GRPOTrainer, {})


def test_arguments_may_stand_in_trl_s_order(tmp_path):
    config = CPPOConfig(str(tmp_path), num_generations=4, per_device_train_batch_size=8, **SMALL_RUN)
    data, held_out = tiny_data(16), tiny_data(4)
    trainer = CPPOTrainer(tiny_model(), digit_reward, config, data, held_out, arithmetic.tokenizer())
    assert (trainer.train_dataset, trainer.eval_dataset) == (data, held_out)


def test_other_configs_are_refused_with_the_mend(make_trainer):
    with pytest.raises(TypeError, match=r"cppo_trl\.CPPOConfig; got GRPOConfig"):
        make_trainer(config_cls=GRPOConfig)


def test_default_config_is_a_cppo_config(monkeypatch):
    seen = {}

    def stop(self, model, reward_funcs, args, *rest, **kwargs):
        seen["args"] = args
        raise KeyboardInterrupt

    monkeypatch.setattr(GRPOTrainer, "__init__", stop)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(
        CPPOConfig, "__post_init__", lambda self: vars(self).update(generation_batch_size=8, report_to=[])
    )
    loaded = tiny_model()
    loaded.config._name_or_path = "org/some-model"
    for model in ("org/some-model", "/data/models/some-model", loaded):
        with pytest.raises(KeyboardInterrupt):
            CPPOTrainer(model)
        args = seen.pop("args")
        assert isinstance(args, CPPOConfig)
        assert args.output_dir == "some-model-CPPO"
