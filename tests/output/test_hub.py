import math
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cppo_trl.launch.training import parse_arguments, train
from cppo_trl.output.checkpoints import RunError
from tests.conftest import RECIPE, ROOT, launch, small_run
from tests.output.conftest import section
from tests.output.hub_server import running_hub


@pytest.fixture
def hub():
    with running_hub() as server:
        yield server


def test_the_quickstart_uploads_model_card_curves_and_evaluation(hub, tmp_path):
    command = [ROOT / "scripts/quickstart.py", "--config", RECIPE, "--output_dir", tmp_path / "run"]
    command += ["--task_dir", tmp_path / "task", "--terms", "3", "--train_problems", "64", "--test_problems", "8"]
    command += ["--max_steps", "16", "--warm_start_steps", "5", "--push_to_hub", "--hub_model_id", "user/tiny"]
    command += ["--hub_token", "hf_secret"]
    result = launch(*command, **hub.environment())
    assert result.returncode == 0, result.stderr[-3000:]
    assert hub.messages == ["End of training"]  # one upload of everything
    hub.write("user/tiny", tmp_path / "clone")
    uploaded, local = tmp_path / "clone", tmp_path / "run"
    assert {p.name for p in uploaded.iterdir()} == {p.name for p in local.iterdir()} - {"_lock"}
    AutoModelForCausalLM.from_pretrained(uploaded)
    assert AutoTokenizer.from_pretrained(uploaded).decode([2]) == "0"
    weights = load_file(uploaded / "model.safetensors")
    assert all(weights[name].equal(x) for name, x in load_file(local / "model.safetensors").items())

    card = ModelCard.load(uploaded / "README.md")
    assert {"cppo", "trl", "generated_from_trainer"} <= set(card.data.tags)
    assert card.data.datasets is None  # a local dataset is no dataset of the Hub's
    assert card.data.base_model is None
    assert "https://huggingface.co/papers/2606.10968" in card.text
    assert "cppo, binary_tv, delta 0.05, w_min 0.8, delta_b 0.005 to 0.01" in section(card, "Trust region")
    run = section(card, "Run")
    assert re.search(r"base model \| `.*warm_start` \(local\)", run)
    assert re.search(r"`.*data` \(local\)", section(card, "Training data"))
    (printed,) = re.findall(r"\| command \| `(.*)` \|", run)
    assert shlex.split(printed)[1:] == [str(word).replace("hf_secret", "***") for word in command]
    assert "hf_secret" not in (uploaded / "README.md").read_text()
    (picture,) = re.findall(r"!\[.*\]\((.*)\)", section(card, "Training curves"))
    assert (uploaded / picture).read_bytes().startswith(b"\x89PNG")
    row = section(card, "Evaluation").split("avg@16")[1].splitlines()[0]
    before, error, after, *_ = map(float, re.findall(r"\d\.\d{3}", row))
    assert 0 <= before <= 1
    assert 0 <= after <= 1
    assert 0 <= error < 1 / math.sqrt(8)
    versions = dict(re.findall(r"(\S+) ([\d.]+\S*?)(?:,| \|)", re.search(r"\| versions \| (.*)", run)[0]))
    for package in ("cppo-trl", "trl", "transformers", "accelerate", "math-verify"):
        assert versions[package] == version(package)


def test_a_failed_upload_loses_nothing_and_says_how_to_repeat_it(hub, task):
    hub.refused = "POST .*/commit/main"
    fields = ["--push_to_hub", "--hub_model_id", "user/tiny", "--save_strategy", "steps", "--save_steps", "2"]
    command = [ROOT / "scripts/train.py", "--config", RECIPE, *small_run(task), *fields]
    result = launch(*command, "--hub_strategy", "all_checkpoints", **hub.environment())
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert f"Training is finished and saved in {task / 'out'}" in result.stderr
    assert "the upload to the Hub failed: HfHubHTTPError: 403 Forbidden" in result.stderr
    assert not hub.repos["user/tiny"]
    for name in ("model.safetensors", "trainer_state.json", "README.md", "checkpoint-4/trainer_state.json"):
        assert (task / "out" / name).exists()

    hub.refused = None
    repeat = shlex.split(result.stderr.strip().splitlines()[-1])
    subprocess.run([Path(sys.executable).with_name(repeat[0]), *repeat[1:]], check=True, env=hub.environment())
    here = {p.name for p in (task / "out").iterdir() if not p.name.startswith(("checkpoint-", "_"))}
    assert set(hub.repos["user/tiny"]) == here
    hub.write("user/tiny", task / "clone")
    AutoModelForCausalLM.from_pretrained(task / "clone")


def test_a_hub_out_of_reach_is_found_out_before_the_model_is_loaded(task):
    arguments = ["--config", RECIPE, *small_run(task), "--model_name_or_path", "no/such-model", "--push_to_hub"]
    with pytest.raises(RunError, match=r"push_to_hub: the repository 'out' cannot be created or found .Offline"):
        train(*parse_arguments(arguments))
