"""Two processes over gloo against one, on the same injected rollouts and minibatches (`distributed_training`)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trl.trainer import grpo_trainer as host

from tests.conftest import tiny_model
from tests.distributed_training import CASES, EMPTY, ROWS, run

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
LAYOUTS = {"MULTI_CPU": "ddp.yaml", "FSDP": "fsdp2.yaml"}  # what must run, and the recipes' file that asks for it
UNCOMPARED = {"step_time", "entropy"}  # a time, and TRL's mean over processes of each one's mean


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=LAYOUTS)
def two_processes(request, model, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    launch = ["--config_file", f"configs/accelerate/{LAYOUTS[request.param]}", "--num_processes=2"]
    launch += ["--mixed_precision=no", "--main_process_port=0", "-m", "tests.distributed_training"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch, request.param, str(model), str(directory)]
    subprocess.run(command, check=True, cwd=ROOT, env=ENVIRONMENT, timeout=240)
    return torch.load(directory / "results.pt")


@pytest.fixture(scope="module")
def one_process(model, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "shuffle_sequence_dict", host.shuffle_sequence_dict)  # run() replaces it
        return {case: run(case, model, tmp_path_factory.mktemp(case), "NO") for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one_does(case, two_processes, one_process):
    two, one = two_processes[case], one_process[case]
    assert [entry.keys() for entry in two["log"]] == [entry.keys() for entry in one["log"]]
    assert len(one["log"]) == 4
    for name in set().union(*one["log"]) - UNCOMPARED:
        values = [[entry.get(name) for entry in result["log"]] for result in (two, one)]
        assert values[0] == pytest.approx(values[1], rel=1e-4, abs=1e-6), name
