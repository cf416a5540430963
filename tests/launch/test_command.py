"""The command `cppo-trl`: what it lists, how fast, and how its errors end."""

import os
import runpy
import subprocess
import sys

import pytest

from cppo_trl.config import CPPOConfig
from cppo_trl.launch.command import COMMANDS, main, one_line_errors
from cppo_trl.launch.parsing import parse
from cppo_trl.output.checkpoints import checkpoint_to_resume, saving
from tests.conftest import RECIPE, ROOT, SMALL_RUN, launch

FIRST_UPDATE = f"""
from transformers import Qwen3Config, Qwen3ForCausalLM
from cppo_trl import CPPOConfig, CPPOTrainer
from cppo_trl.data import arithmetic
size = dict(vocab_size=23, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
model = Qwen3ForCausalLM(Qwen3Config(**size, num_key_value_heads=1, pad_token_id=0, eos_token_id=1))
fields = {{**{SMALL_RUN!r}, "gradient_checkpointing": True, "max_completion_length": 4, "max_steps": 1}}
CPPOTrainer(
    model, lambda completions, **_: [float(len(text)) for text in completions],
    CPPOConfig("out", **fields),
    train_dataset=arithmetic.problems(8, 3, 0), processing_class=arithmetic.tokenizer(),
).train()
"""


@pytest.mark.parametrize("arguments", [["--help"], ["recipes"], ["recipes", "fsdp2"]])
def test_help_and_recipes_answer_without_torch(arguments):
    program = f"import sys; from cppo_trl.launch.command import main; main({arguments!r}); "
    done = launch("-c", program + "assert not {'torch', 'trl', 'transformers'} & set(sys.modules)")
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_every_command_is_listed(capsys):
    main(["--help"])
    listed = capsys.readouterr().out
    assert all(f"\n  {name} " in listed for name in COMMANDS)
    with pytest.raises(SystemExit, match=r"there is no command 'tarin'\. Did you mean train"):
        main(["tarin"])


def test_no_warning_before_the_first_update(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "always::FutureWarning", "-c", FIRST_UPDATE],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning" not in done.stderr


def test_an_older_trl_is_refused():
    program = (
        "import importlib.metadata as m; old = m.version; m.version = lambda n: '1.15.0' if n == 'trl' else old(n)"
    )
    program += "; from cppo_trl import CPPOTrainer; CPPOTrainer('no/such')"
    done = launch("-c", program)
    assert "RuntimeError: TRL 1.15.0 is installed; cppo_trl needs 1.16: pip install" in done.stderr


def fail_to_save():
    with saving("."):
        raise OSError("disk full")


@pytest.mark.parametrize(
    ("refuse", "message"),
    [
        (lambda: CPPOConfig("x", cppo_w_min=2), "cppo_w_min must be"),
        (lambda: checkpoint_to_resume("x", "nowhere", True), "'nowhere' does not exist"),
        (fail_to_save, "disk full"),
    ],
)
def test_errors_on_purpose_end_a_script_in_one_line(refuse, message):
    with pytest.raises(SystemExit, match=message), one_line_errors(""):
        refuse()


def reward_with_a_bug():
    raise ValueError("of a user's reward")


@pytest.mark.parametrize(
    ("bug", "kind"),
    [
        (reward_with_a_bug, ValueError),
        (lambda: checkpoint_to_resume(None, None, True), TypeError),  # a call within the package goes wrong
        (lambda: parse((int,), []), TypeError),
    ],
)
def test_unexpected_errors_keep_their_traceback(bug, kind):
    with pytest.raises(kind), one_line_errors(""):
        bug()


def test_an_interruption_says_how_to_go_on(capsys):
    with pytest.raises(SystemExit) as ended, one_line_errors("Repeat the command."):
        raise KeyboardInterrupt
    assert ended.value.code == 130
    assert capsys.readouterr().err.endswith("interrupted. Repeat the command.\n")


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("train.py", ["--config", "nowhere.yaml"], "cannot read nowhere.yaml"),
        ("train.py", ["--config", RECIPE, "--trust_region", "ppo"], "Did you mean 'dppo'"),
        ("train.py", ["--config", RECIPE, "--max_steps", "many"], "invalid int value: 'many'"),
        ("train.py", ["--config", RECIPE, "--reward_funcs", "nowhere.reward"], "cannot import 'nowhere.reward'"),
        ("train.py", ["--config", RECIPE, "--resume_from_checkpoint", "nowhere"], "'nowhere' does not exist"),
        ("evaluate.py", ["--samples", "many"], "invalid int value: 'many'"),
        ("evaluate.py", [], "model must name a model"),
        ("prepare_data.py", ["--sources", "nowhere", "--output_dir", "x"], "nowhere"),
        ("quickstart.py", ["--config", "nowhere.yaml"], "cannot read nowhere.yaml"),
    ],
)
def test_scripts_report_mistakes_in_one_line(script, arguments, message, tmp_path, monkeypatch):
    if script == "train.py":
        arguments = [*arguments, "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr("datasets.disable_progress_bars", lambda: None)
    monkeypatch.setattr("transformers.utils.logging.disable_progress_bar", lambda: None)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
    (line,) = str(ended.value.code).strip().splitlines()
    assert line.startswith(f"{script}: ")
    assert message in line
