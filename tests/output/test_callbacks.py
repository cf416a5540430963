"""What a run prints, and how Ctrl-C ends it."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import RECIPE, ROOT, launch, small_run, tiny_data


@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_a_dozen_metrics_on_the_console_and_all_in_the_log(disable_tqdm, make_trainer, capsys):
    trainer = make_trainer(max_steps=1, disable_tqdm=disable_tqdm, data=tiny_data(16))
    trainer.train()
    (line,) = (x for x in capsys.readouterr().out.replace("\r", "\n").splitlines() if "'loss'" in x)
    printed = json.loads(line[line.index("{") :].replace("'", '"'))
    assert 8 <= len(printed) <= 12
    assert len(trainer.state.log_history[0]) > 30
    assert set(printed) <= set(trainer.state.log_history[0])


def test_ctrl_c_ends_a_run_with_the_command_to_resume(task):
    command = [sys.executable, ROOT / "scripts/train.py", "--config", RECIPE, *small_run(task)]
    command += ["--max_steps", "4000", "--save_strategy", "steps", "--save_steps", "4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)
    while not list((task / "out").glob("checkpoint-*")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in printed
    assert "train.py: interrupted. Repeat the command with --resume_from_checkpoint true" in printed


def test_ctrl_c_saves_a_checkpoint_that_resumes(task):
    fields = [*small_run(task), "--max_steps", "4000"]  # the recipe saves no checkpoints
    command = [sys.executable, "-m", "cppo_trl", "train", "--config", "quickstart"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [*command, *fields], cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )
    while not (task / "out/trust_region.jsonl").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the reward's workers as well
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in printed
    assert printed.strip().splitlines()[-1].startswith("cppo-trl: interrupted. Repeat the command with --resume_from")
    (checkpoint,) = (task / "out").glob("checkpoint-*")
    last = int(checkpoint.name.partition("-")[2]) + 2
    resumed = launch("-m", "cppo_trl", "train", "--config", "quickstart", *fields, "--max_steps", last,
                     "--resume_from_checkpoint", "true")  # fmt: skip
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert f"Resuming from {checkpoint}" in resumed.stdout
    assert json.loads((task / "out/trainer_state.json").read_text())["global_step"] == last
