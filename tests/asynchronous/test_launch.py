"""An asynchronous recipe through ``cppo-trl train``, with rollouts from a stub."""

import json
import sys
from functools import partial

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from cppo_trl.asynchronous import trainer as module
from cppo_trl.launch.command import main
from tests.asynchronous.conftest import NoTransfer, Rollouts


@pytest.fixture
def recipe(task, monkeypatch):
    """The recipe of two updates on the task, whose samples a stub makes."""
    monkeypatch.setattr("cppo_trl.seam.inputs.find_spec", lambda name: name)
    monkeypatch.setattr(sys, "argv", ["cppo-trl"])
    data = task / "data/train.jsonl"
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    messages = [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    data.write_text("\n".join(map(json.dumps, messages)))
    rollouts = Rollouts(AutoModelForCausalLM.from_pretrained(task / "model"))
    stub = partial(module.AsyncCPPOTrainer, rollout_worker=rollouts, weight_transfer=NoTransfer())
    monkeypatch.setattr(module, "AsyncCPPOTrainer", stub)
    fields = {"asynchronous": True, "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}
    fields |= {"gradient_checkpointing": False, "max_steps": 2, "token_budget": -1, "max_staleness": 100}
    fields |= {"per_device_train_batch_size": 16, "num_generations": 4, "learning_rate": 3e-3, "save_steps": 2}
    fields |= {"model_name_or_path": str(task / "model"), "dataset_name": str(task / "data")}
    fields |= {"output_dir": str(task / "out"), "max_completion_length": 12}
    path = task / "async.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def test_a_recipe_trains_saves_and_resumes(recipe, capsys):
    main(["train", "--config", str(recipe), "--trust_region", "dppo"])
    out = recipe.parent / "out"
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (out.parent / "model", out))
    assert any(not torch.equal(weight, after[name]) for name, weight in before.items())
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert sum("cppo/masked" in row for row in history) == 2
    run = json.loads((out / "run.json").read_text())
    assert run["config"]["trust_region"] == "dppo"
    assert run["schedule"]["rollouts"].startswith("continuous")
    card = (out / "README.md").read_text()
    assert "This model was trained with DPPO" in card
    assert "2606.10968" not in card
    assert "continuous, from http://localhost:8000" in card
    with pytest.raises(SystemExit, match="holds checkpoint-2 of an earlier run"):
        main(["train", "--config", str(recipe)])
    main(["train", "--config", str(recipe), "--trust_region", "dppo", "--resume_from_checkpoint", "true"])


def test_the_command_line_wins_over_the_recipe(recipe):
    with pytest.raises(SystemExit, match="Unknown field: max_staleness, token_budget"):
        main(["train", "--config", str(recipe), "--asynchronous", "false"])
