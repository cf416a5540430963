import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from transformers import TrainerCallback

from cppo_trl.launch.training import parse_arguments, train
from cppo_trl.output.checkpoints import RunError, TrainingFinished, checkpoint_to_resume, last_checkpoint
from tests.conftest import RECIPE, ROOT, digit_reward, flags, small_run, tiny_data


class DeathError(Exception):
    """Stands for whatever ends a process."""


class DieAfter(TrainerCallback):
    def __init__(self, update):
        self.update = update

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.update:
            raise DeathError


def cut(path):
    os.truncate(path, path.stat().st_size - 10)


DAMAGES = {
    "trainer_state.json, which is written last, is missing": lambda c: (c / "trainer_state.json").unlink(),
    "trainer_state.json is cut short": lambda c: cut(c / "trainer_state.json"),
    "model.safetensors is cut short": lambda c: cut(c / "model.safetensors"),
    "optimizer.pt is cut short": lambda c: cut(c / "optimizer.pt"),
    "the weights are missing": lambda c: (c / "model.safetensors").unlink(),
}


def test_incomplete_checkpoints_are_skipped_by_name(make_trainer, tmp_path, capsys):
    make_trainer(max_steps=4, save_strategy="steps", save_steps=2).train()
    good, last = tmp_path / "checkpoint-2", tmp_path / "checkpoint-4"
    assert last_checkpoint(str(tmp_path)) == (last, [])
    shutil.copytree(last, tmp_path / "whole")
    for words, damage in DAMAGES.items():
        damage(last)
        assert last_checkpoint(str(tmp_path)) == (good, [f"{last} is incomplete ({words})"])
        shutil.rmtree(last)
        shutil.copytree(tmp_path / "whole", last)
    cut(last / "model.safetensors")
    assert checkpoint_to_resume(str(tmp_path), "true", True) == str(good)
    assert f"Resuming from {good}" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"resume_from_checkpoint=.* is incomplete: model\.safetensors is cut short"):
        checkpoint_to_resume(str(tmp_path), str(last), True)
    with pytest.raises(ValueError, match="resume_from_checkpoint='nowhere' does not exist"):
        checkpoint_to_resume(str(tmp_path), "nowhere", True)
    with pytest.raises(ValueError, match="holds checkpoint-2 of an earlier run"):
        checkpoint_to_resume(str(tmp_path), None, True)


@pytest.mark.parametrize("died", [6, 11])  # in the first epoch and in the second
def test_a_resumed_run_is_the_uninterrupted_one(make_trainer, tmp_path, died):
    def run(directory, resume=None, callbacks=()):
        seen = []

        def reward(prompts, completions, **kwargs):
            seen.append(prompts)
            return digit_reward(completions)

        trainer = make_trainer(
            reward=reward,
            data=tiny_data(16),  # two rollouts of four updates in an epoch
            output_dir=str(tmp_path / directory),
            steps_per_generation=4,
            num_generations=4,
            learning_rate=1e-2,
            max_steps=16,
            save_strategy="steps",
            save_steps=4,
            trainer={"callbacks": list(callbacks)},
        )
        trainer.train(resume_from_checkpoint=resume)
        timings = {"step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second"}
        curve = [{k: v for k, v in row.items() if k not in timings} for row in trainer.state.log_history[:-1]]
        return seen, curve

    prompts, curve = run("whole")
    with pytest.raises(DeathError):
        run("broken", callbacks=[DieAfter(died)])
    resumed_prompts, resumed_curve = run("broken", resume=str(last_checkpoint(str(tmp_path / "broken"))[0]))
    assert resumed_prompts == prompts[-len(resumed_prompts) :]
    assert resumed_curve == curve
    assert len({str(p) for p in prompts}) == len(prompts) == 4
    with pytest.raises(TrainingFinished):  # no update beyond the last
        run("whole", resume=str(tmp_path / "whole/checkpoint-16"))


def test_kill_9_and_the_same_command_again(task):
    def arguments(out, *more):
        fields = {"output_dir": task / out, "max_steps": 16, "save_strategy": "steps", "save_steps": 4}
        fields |= {"num_iterations": 1, "steps_per_generation": 2}  # two updates of each rollout
        fields |= {"save_total_limit": 2, "logging_steps": 1, "learning_rate": 1e-2, "warmup_steps": 0}
        fields |= {"reward_funcs": "tests.conftest.digit_reward"}
        return ["--config", RECIPE, *small_run(task), *flags(fields), *more]

    command = [sys.executable, ROOT / "scripts/train.py", *arguments("out", "--resume_from_checkpoint", "true")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while not (task / "out/checkpoint-8").exists():  # being written, or just written
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert "No complete checkpoint" in process.communicate()[0]
    resumed = train(*parse_arguments(arguments("out", "--resume_from_checkpoint", "true")))
    whole = train(*parse_arguments(arguments("whole")))
    assert resumed.state.global_step == 16
    for name in ("loss", "reward", "grad_norm", "cppo/divergence/mean"):
        expected = [row.get(name) for row in whole.state.log_history if "loss" in row]
        assert [row.get(name) for row in resumed.state.log_history if "loss" in row] == expected
        assert any(expected)
    again = train(*parse_arguments(arguments("out", "--resume_from_checkpoint", "true")))  # nothing is left to do
    assert again.state.global_step == 16
    assert not (task / "out/checkpoint-17").exists()


def test_a_full_disk_ends_the_run_with_the_last_checkpoint_intact(make_trainer, tmp_path):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    class FillDisk(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))

    trainer = make_trainer(
        max_steps=6, save_strategy="steps", save_steps=2, save_total_limit=1, trainer={"callbacks": [FillDisk()]}
    )
    try:
        with pytest.raises(RunError) as stopped:
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = str(stopped.value)
    assert "checkpoint-4 failed" in message
    assert "File too large" in message
    assert f"The last complete checkpoint is {tmp_path / 'checkpoint-2'}" in message
    assert not (tmp_path / "checkpoint-4").exists()  # its remains would fill the disk
    make_trainer(max_steps=6).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_an_output_directory_that_cannot_be_written_is_refused_before_the_model_is_loaded(tmp_path):
    (tmp_path / "file").write_text("in the way")
    fields = ["--output_dir", str(tmp_path / "file/out"), "--model_name_or_path", "no/such-model"]
    with pytest.raises(ValueError, match=r"output_dir=.* cannot be written to .*Not a directory"):
        train(*parse_arguments(["--config", RECIPE, *fields]))
