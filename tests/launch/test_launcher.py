"""`cppo-trl train` in one process and in as many as Accelerate launches."""

from tests.conftest import launch, small_run


def test_accelerate_launches_as_many_processes_as_asked_for(task):
    done = launch("-m", "cppo_trl", "train", "--config", "quickstart", *small_run(task), "--num_processes", 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "processes            2" in done.stdout
    assert (task / "out/model.safetensors").exists()
    assert "were not passed to `accelerate launch`" not in done.stderr
