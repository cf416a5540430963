"""The recipe of `make quickstart-llm` with rollouts by a vLLM server: `make test-llm-vllm`, after that command."""

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from cppo_trl.launch.training import parse_arguments, train
from tests.conftest import flags
from tests.vllm.conftest import Server, running

TASK = Path("outputs/quickstart-llm-task/seed-0")
ROLLOUTS = 20


@pytest.mark.skipif("CPPO_TEST_LLM" not in os.environ, reason="make test-llm-vllm runs it")
@pytest.mark.timeout(2 * 3600)
def test_twenty_rollouts_by_a_server_raise_the_reward(tmp_path, weights_by_file):
    server = Server(tmp_path, "--max-model-len 256 --max-logprobs 20", model=TASK / "warm_start")
    with running(server):
        fields = {"max_steps": 4 * ROLLOUTS, "output_dir": "outputs/quickstart-llm-server", "save_strategy": "no"}
        fields |= {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": server.address}
        recipe = ["--config", "configs/smollm2-135m/word-problems/cppo.yaml"]
        trainer = train(*parse_arguments([*recipe, *flags(fields)]))
    history = [row for row in trainer.state.log_history if "reward" in row]
    wanted = ["reward", "cppo/masked", "cppo/divergence/mean", "cppo/rollout_mismatch", "cppo/topk_mass"]
    for row in history:
        print(json.dumps({name.split("/")[-1]: round(row[name], 7) for name in wanted if name in row}))
    assert len(history) == ROLLOUTS
    rewards = [row["reward"] for row in history]
    assert sum(rewards[-5:]) > sum(rewards[:5])
    mismatches = [row["cppo/rollout_mismatch"] for row in history if "cppo/rollout_mismatch" in row]
    assert len(mismatches) > ROLLOUTS // 2  # missing where the first update had no advantage
    assert max(mismatches) < 1e-4  # fp32 on both sides
