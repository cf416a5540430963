"""vLLM against the trainer after each weight sync, with a stand-in for the engine; the real one is in tests/vllm."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from cppo_trl import CPPOConfig
from cppo_trl.seam.checks import (
    MAX_MISMATCH_NATS,
    EngineCheck,
    check_server,
    is_reference,
    keep_fp32_outputs,
)
from tests.conftest import FakeEngine, tiny_model


class Engine(FakeEngine):
    """Holds weights of its own, as vLLM does, and takes all of the trainer's at a sync but those in ``skipped``."""

    skipped = ()
    noise = 0.0  # nats

    def __init__(self, model, **kwargs):
        super().__init__(tiny_model(), None)  # a copy's forward would stay bound to the trainer's
        self.trained, self.rollouts = model, 0

    def sync_weights(self):
        state = {k: v for k, v in self.trained.state_dict().items() if k not in self.skipped}
        self.model.load_state_dict(state, strict=False)

    def generate(self, prompts, **kwargs):
        self.completions = [[2 + (7 * self.rollouts + 3 * i) % 20, 5 + i % 4, 1] for i in range(len(prompts))]
        self.rollouts += 1
        *answers, logps, ids = super().generate(prompts)
        return *answers, [[[p - self.noise for p in token] for token in row] for row in logps], ids


SCHEDULES = {  # fields, and the updates that the first rollout serves
    "one update": ({"steps_per_generation": 1}, 1),
    "two updates": ({"steps_per_generation": 2}, 2),
    "two passes": ({"steps_per_generation": 1, "num_iterations": 2}, 2),
    "two rollouts an update": ({"steps_per_generation": 1, "gradient_accumulation_steps": 2}, 1),
    "ends within an update": ({"steps_per_generation": 3, "gradient_accumulation_steps": 2}, 1),
    "topk": ({"cppo_divergence": "topk_tv"}, 2),
    "topk of the policy": ({"cppo_divergence": "topk_tv", "cppo_topk_source": "policy"}, 2),
}


@pytest.mark.parametrize(("fields", "first_stale"), SCHEDULES.values(), ids=SCHEDULES)
def test_stale_weights_stop_the_run_at_the_first_sync_that_left_them(make_trainer, monkeypatch, fields, first_stale):
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", Engine)
    fields = {"use_vllm": True, "learning_rate": 0.05, "max_steps": 3, **fields}
    trainer = make_trainer(**fields)
    trainer.train()
    assert all(h.get("cppo/rollout_mismatch_nats", 0.0) < 1e-5 for h in trainer.state.log_history)
    monkeypatch.setattr(Engine, "skipped", ("lm_head.weight",))
    stale = make_trainer(**fields)
    with pytest.raises(RuntimeError, match=r"After \d updates, .*Some weights were not updated by the sync"):
        stale.train()
    assert stale.state.global_step == first_stale


def test_noise_that_eats_the_budget_is_said_once(make_trainer, monkeypatch):
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", Engine)
    monkeypatch.setattr(Engine, "noise", 0.05)

    def said(**fields):
        trainer = make_trainer(use_vllm=True, learning_rate=1e-6, **fields)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
        logs = [h for h in trainer.state.log_history if "cppo/rollout_mismatch" in h]
        assert [h["cppo/rollout_mismatch_nats"] for h in logs] == pytest.approx([0.05, 0.05], rel=1e-3)
        messages = [str(w.message) for w in caught if "mismatch" in str(w.message)]
        return max(h["cppo/rollout_mismatch"] for h in logs), messages

    mismatch, messages = said(trust_region="none")
    assert messages == []  # no budget
    assert said(cppo_delta_b=10.5 * mismatch)[1] == []
    (message,) = said(cppo_delta_b=mismatch)[1]
    assert "% of cppo_delta_b=" in message
    assert "cppo_topk_source=policy" in message
    assert said(cppo_divergence="topk_tv", cppo_topk_source="policy", cppo_delta_b=1e-4) == (
        pytest.approx(0, abs=1e-6),
        [],
    )
    assert "of cppo_delta=" in said(trust_region="dppo", cppo_delta=9.5 * mismatch)[1][0]


def test_a_rollout_func_may_sample_from_older_weights(make_trainer, monkeypatch):
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", Engine)

    def rollout(prompts, trainer):
        answers = {"prompt_ids": [[4, 12, 5]] * len(prompts), "completion_ids": [[5, 6, 1]] * len(prompts)}
        return {**answers, "logprobs": [[-9.0, -9.0, -9.0]] * len(prompts)}

    trainer = make_trainer(use_vllm=True, trainer={"rollout_func": rollout}, max_steps=2)
    trainer.train()
    assert trainer.state.log_history[0]["cppo/rollout_mismatch_nats"] > 1
    assert torch.isfinite(next(trainer.model.parameters())).all()


@pytest.mark.parametrize(("fsdp2", "precision"), [(True, "bf16"), (True, "no"), (False, "bf16")])
def test_fsdp2_under_bf16_alone_hands_fp32_outputs_back(fsdp2, precision):
    plugin = SimpleNamespace(mixed_precision_policy=None)
    state = SimpleNamespace(fsdp_plugin=plugin)
    keep_fp32_outputs(SimpleNamespace(is_fsdp2=fsdp2, mixed_precision=precision, state=state))
    policy = plugin.mixed_precision_policy
    if not (fsdp2 and precision == "bf16"):
        assert policy is None
    else:
        types = (policy.param_dtype, policy.reduce_dtype, policy.output_dtype)
        assert types == (torch.bfloat16, torch.float32, None)


def test_server_with_raw_logprobs_is_refused():
    with pytest.raises(ValueError, match="processed_logprobs"):
        check_server({"model_config": {"logprobs_mode": "raw_logprobs", "max_logprobs": 20}}, topk=0)
    for most, topk in ((20, 20), (-1, 50)):
        check_server({"model_config": {"logprobs_mode": "processed_logprobs", "max_logprobs": most}}, topk=topk)
    with pytest.raises(ValueError, match="--max-logprobs 21"):
        check_server({"model_config": {"logprobs_mode": "processed_logprobs", "max_logprobs": 20}}, topk=21)


def test_the_server_is_asked_when_the_trainer_is_made(make_trainer, monkeypatch):
    class Served(Engine):
        vllm_client = SimpleNamespace(
            get_server_info=lambda: {"model_config": {"logprobs_mode": "processed_logprobs", "max_logprobs": 4}}
        )

    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", Served)
    served = {"use_vllm": True, "vllm_mode": "server", "cppo_divergence": "topk_tv"}
    with pytest.raises(ValueError, match="--max-logprobs 5"):
        make_trainer(**served, cppo_topk=5)
    make_trainer(**served, cppo_topk=4)
    make_trainer(**served, cppo_topk=5, cppo_topk_source="policy")


def test_which_pass_scores_the_reference():
    trained, other = tiny_model(), tiny_model()
    assert [is_reference(model, trained) for model in (trained, other)] == [False, True]
    adapted = get_peft_model(trained, LoraConfig(target_modules=["q_proj"]))
    adapted.add_adapter("ref", LoraConfig(target_modules=["q_proj"]))
    assert not is_reference(adapted, adapted)
    with adapted.disable_adapter():
        assert is_reference(adapted, adapted)
    adapted.set_adapter("ref")
    assert is_reference(adapted, adapted)


def test_a_mismatch_of_just_the_limit_is_rounding(tmp_path):
    check = EngineCheck(CPPOConfig(str(tmp_path), use_cpu=True, bf16=False), warns=False)
    check(0, {"cppo/rollout_mismatch_nats": MAX_MISMATCH_NATS})
    with pytest.raises(RuntimeError, match="After 3 updates"):
        check(3, {"cppo/rollout_mismatch_nats": 1.01 * MAX_MISMATCH_NATS})
