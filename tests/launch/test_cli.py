"""The command `cppo-trl`: what it lists, how fast, and how it launches."""

import json
import os
import subprocess
import sys

import pytest

from cppo_trl.launch import recipes
from cppo_trl.launch.command import COMMANDS, main
from tests.conftest import ROOT, SMALL_RUN, launch, small_run, tiny_data

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


def test_recipes_are_listed_with_hardware_and_what_was_run_and_printed(capsys):
    main(["recipes"])
    listed = capsys.readouterr().out
    for name, path in recipes.recipes().items():
        assert f"\n  {name}\n" in listed
        head = path.read_text().split("\n\n")[0]
        assert "GPU" in head
        if name.startswith("qwen"):
            assert "Not run." in head
        main(["recipes", name])
        assert capsys.readouterr().out == path.read_text()
    assert set(recipes.layouts()) == {"ddp", "fsdp2", "fsdp2-two-nodes", "zero2", "zero3", "train-with-server"}


def test_help_shows_our_fields_and_those_of_trl_behind_a_flag(capsys):
    shown = {}
    for flag in ("--help", "--help_all"):
        with pytest.raises(SystemExit):
            main(["train", flag])
        shown[flag] = capsys.readouterr().out
    assert "--cppo_delta_b" in shown["--help"]
    assert "--log_tokens_steps" in shown["--help"]
    assert "--vllm_mode" not in shown["--help"]
    assert shown["--help_all"].index("--cppo_delta") < shown["--help_all"].index("--vllm_mode")


def test_every_command_is_listed(capsys):
    main(["--help"])
    listed = capsys.readouterr().out
    assert all(f"\n  {name} " in listed for name in COMMANDS)
    with pytest.raises(SystemExit, match=r"there is no command 'tarin'\. Did you mean train"):
        main(["tarin"])


def test_accelerate_launches_as_many_processes_as_asked_for(task):
    done = launch("-m", "cppo_trl", "train", "--config", "quickstart", *small_run(task), "--num_processes", 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "processes            2" in done.stdout
    assert (task / "out/model.safetensors").exists()
    assert "were not passed to `accelerate launch`" not in done.stderr


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


@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_a_dozen_metrics_on_the_console_and_all_in_the_log(disable_tqdm, make_trainer, capsys):
    trainer = make_trainer(max_steps=1, disable_tqdm=disable_tqdm, data=tiny_data(16))
    trainer.train()
    (line,) = (x for x in capsys.readouterr().out.replace("\r", "\n").splitlines() if "'loss'" in x)
    printed = json.loads(line[line.index("{") :].replace("'", '"'))
    assert 8 <= len(printed) <= 12
    assert len(trainer.state.log_history[0]) > 30
    assert set(printed) <= set(trainer.state.log_history[0])
