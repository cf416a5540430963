import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed_loss import run

ROOT = Path(__file__).parent.parent
CASES = ["dr_grpo-binary_tv-cppo", "dapo-binary_tv-cppo", "grpo-binary_kl-cppo", "dr_grpo-binary_tv-dppo"]
CASES += ["dr_grpo-topk_tv-cppo"]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two")
    # with --cpu, accelerate would start one process; its torchrun launcher plus use_cpu gives two over gloo
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
    launch += ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0", "-m", "tests.distributed_loss"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    subprocess.run(
        [sys.executable, "-m", *launch, str(directory), *CASES], check=True, cwd=ROOT, env=environment, timeout=120
    )
    return directory


@pytest.mark.parametrize("case", CASES)
def test_two_processes_compute_what_one_does(case, two_processes, tmp_path):
    two, one = torch.load(two_processes / f"{case}.pt"), run(case, tmp_path)
    assert two["type"].endswith("MULTI_CPU")
    assert one["type"].endswith("NO")
    torch.testing.assert_close(two["loss"], one["loss"], rtol=1e-5, atol=1e-8)
    assert one["gradients"].keys() == two["gradients"].keys()
    for name, gradient in one["gradients"].items():
        torch.testing.assert_close(two["gradients"][name], gradient, rtol=1e-4, atol=1e-7)
    assert one["metrics"].keys() == two["metrics"].keys()
    for name, values in one["metrics"].items():
        assert len(values) == 1  # once per update, not per micro-batch
        assert two["metrics"][name] == pytest.approx(values, rel=1e-5), name
    assert 0.1 < one["metrics"]["cppo/masked"][0] < 0.9


def test_topk_sees_the_whole_of_a_sharded_head():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run([*command, "-m", "tests.sharded_head"], check=True, cwd=ROOT, env=environment, timeout=120)
