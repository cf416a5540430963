"""Rollouts by a vLLM server of its own process, as the colocated ones against full logits in fp32."""

import pytest

pytest.importorskip("vllm")

from cppo_trl import CPPOTrainer
from cppo_trl.seam.checks import check_server
from tests.vllm.test_colocate import SCHEDULE, Spy, check_run, check_topk

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


KINDS = {
    "binary": {},
    "topk": {"cppo_divergence": "topk_tv"},
    "policy": {"cppo_divergence": "topk_tv", "cppo_topk_source": "policy", "cppo_topk": 40},
}


@pytest.mark.parametrize("fields", [{}, SCHEDULE], ids=["two updates", "two passes"])
@pytest.mark.parametrize("kind", KINDS)
def test_server(with_server, kind, fields):
    trainer = with_server(Spy, **KINDS[kind], **fields)
    check_run(trainer)
    if kind == "topk":
        assert sum(check_topk(batch, 20)[1] for batch in trainer.rollouts) > 10


def test_a_server_that_keeps_its_weights_stops_the_run(with_server, monkeypatch):
    trainer = with_server(CPPOTrainer, max_steps=20)
    trainer.vllm_generation.sync_weights()
    monkeypatch.setattr(trainer.vllm_generation, "sync_weights", lambda: None)
    with pytest.raises(RuntimeError, match="weights were not updated by the sync"):
        trainer.train()
    assert trainer.state.global_step == trainer.args.updates_per_rollout


def test_what_the_server_says_of_itself_is_checked(with_server):
    trainer = with_server(CPPOTrainer, cppo_divergence="topk_tv")
    info = trainer.vllm_generation.vllm_client.get_server_info()
    check_server(info, topk=20)
    with pytest.raises(ValueError, match="--max-logprobs 21"):
        check_server(info, topk=21)
