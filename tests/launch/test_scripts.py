import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from cppo_trl.data import arithmetic
from cppo_trl.evaluation.command import EvaluationArguments, evaluate_command
from cppo_trl.launch.training import parse_arguments, train
from tests.conftest import tiny_model

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "configs/quickstart/cppo.yaml")


def launch(*command, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def task(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    arithmetic.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    arithmetic.problems(32, 3, 0).to_json(tmp_path / "data/train.jsonl")
    return tmp_path


def small_run(task):
    fields = {"model_name_or_path": task / "model", "dataset_name": task / "data", "output_dir": task / "out"}
    fields |= {"max_steps": 4, "per_device_train_batch_size": 8, "max_completion_length": 8}
    return [str(x) for name, value in fields.items() for x in (f"--{name}", value)]


@pytest.mark.parametrize("processes", [1, 2])
def test_train_from_a_recipe(task, processes):
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0"]
    launcher += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    command = [*(launcher if processes == 2 else []), ROOT / "scripts/train.py", "--config", RECIPE, *small_run(task)]
    command += ["--eval_benchmarks", task / "data/train.jsonl", "--eval_every", 3, "--eval_samples", 4]
    command += ["--eval_temperature", 0.9, "--eval_max_new_tokens", 6, "--per_device_eval_batch_size", 12]
    result = launch(*command, ACCELERATE_USE_CPU="true")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "CPPO schedule" in result.stdout
    out = task / "out"
    AutoModelForCausalLM.from_pretrained(out)
    assert AutoTokenizer.from_pretrained(out).decode([2]) == "0"
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert any("cppo/divergence/mean" in row for row in history)
    evaluations = {row["step"]: row for row in history if "eval_avg@4" in row}
    assert list(evaluations) == [0, 3, 4]
    # however many processes share the problems, the numbers are those of scripts/evaluate.py
    sampling = {"samples": 4, "temperature": 0.9, "max_new_tokens": 6, "batch_size": 12, "backend": "transformers"}
    model, benchmarks, directory = str(task / "model"), [str(task / "data/train.jsonl")], str(task / "evaluation")
    evaluate_command(EvaluationArguments(model, benchmarks, directory, **sampling))
    expected = json.loads((task / "evaluation/results.json").read_text())["benchmarks"]["train"]
    assert {name: evaluations[0][f"eval_{name}"] for name in expected} == pytest.approx(expected)
    assert 0 < expected["truncated"] < 1
    card = (out / "README.md").read_text()
    assert "2606.10968" in card
    assert "| update 0 | train |" in card
    assert "| update 4 | train |" in card


def test_typos_and_contradictions_are_refused_before_anything_is_loaded(tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text("model_name_or_path: nowhere\noutput_dir: out\nuse_cpu: true\nbf16: false\ncppo_detla: 0.1\n")
    with pytest.raises(ValueError, match="cppo_detla"):
        parse_arguments(["--config", str(bad)])
    with pytest.raises(ValueError, match="cppo_w_min must be"):
        parse_arguments(["--config", RECIPE, "--cppo_w_min", "2"])
    with pytest.raises((ValueError, SystemExit)):
        parse_arguments(["--config", RECIPE, "--no_such_flag", "2"])
    for option, value, message in (
        ("--eval_benchmarks", "aime23", "'aime23' is none of aime24"),
        ("--eval_every", "0", "eval_every must be >= 1"),
        ("--eval_top_p", "0", "top_p must be"),
    ):
        with pytest.raises(ValueError, match=message):
            train(*parse_arguments(["--config", RECIPE, "--eval_benchmarks", "aime24", option, value]))


def test_yaml_null_and_inf_reach_the_rule(tmp_path):
    recipe = tmp_path / "x.yaml"
    recipe.write_text(
        "output_dir: out\nuse_cpu: true\nbf16: false\n"
        "cppo_delta: null\ncppo_delta_b: .inf\ncppo_delta_b_quantile: null\nlearning_rate: 1e-6\n"
    )
    _, config, _, _ = parse_arguments(["--config", str(recipe)])
    assert (config.cppo_delta, config.cppo_delta_b, config.cppo_delta_b_quantile) == (0.15, float("inf"), None)
    assert config.learning_rate == 1e-6
    _, config, _, _ = parse_arguments(["--config", str(recipe), "--cppo_delta_b", "0.01"])  # the command line wins
    assert config.cppo_delta_b == 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reward_funcs", "cppo_trl.rewards.no_such_reward"], "reward_funcs: cannot import"),
        (["--dataset_train_split", "nope"], "no split 'nope'"),
    ],
)
def test_mistakes_in_a_run_are_named(task, arguments, message):
    result = launch(ROOT / "scripts/train.py", "--config", RECIPE, *small_run(task), *arguments)
    assert result.returncode != 0
    assert message in result.stderr


def quickstart(directory, *options):
    fields = {"config": RECIPE, "output_dir": directory / "run", "task_dir": directory / "task", "terms": 3}
    fields |= {"max_steps": 32, "train_problems": 64, "test_problems": 8, "warm_start_steps": 5}
    return [
        ROOT / "scripts/quickstart.py",
        *(x for name, value in fields.items() for x in (f"--{name}", value)),
        *options,
    ]


def test_quickstart_end_to_end_keeps_an_earlier_run(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "precious.txt").write_text("an earlier run")
    command = quickstart(tmp_path, "--cppo_delta", "0.04")
    first = launch(*command)
    assert first.returncode == 0, first.stderr[-3000:]
    assert "holds an earlier run: it is kept as" in first.stdout
    assert [p.name for p in tmp_path.glob("run-2*/*")] == ["precious.txt"]
    for name in (
        "model.safetensors",
        "tokenizer.json",
        "README.md",
        "trainer_state.json",
        "curves.png",
        "results.json",
    ):
        assert (out / name).stat().st_size > 100
    last_lines = first.stdout.strip().splitlines()[-6:]
    assert last_lines[0].startswith("| ")
    assert "\n".join(last_lines) in (out / "README.md").read_text()
    results = json.loads((out / "results.json").read_text())
    accuracy = {"greedy", "avg_at_16", "avg_at_16_stderr"}
    assert results["before"].keys() == results["after"].keys() == results["without"]["after"].keys() == accuracy
    assert results["rollouts"] == 2
    # the two runs differ in the trust region alone
    configs = [json.loads((tmp_path / name / "run.json").read_text())["config"] for name in ("run", "run-without")]
    differing = {name for name in configs[0] if configs[0][name] != configs[1].get(name)}
    assert [config["trust_region"] for config in configs] == ["cppo", "none"]
    assert configs[0]["cppo_delta"] == 0.04
    assert all(name.startswith("cppo_") for name in differing - {"trust_region", "output_dir"})
    # the same seed gives the same numbers
    second = launch(*command)
    assert second.returncode == 0, second.stderr[-3000:]
    again = json.loads((out / "results.json").read_text())
    del results["train_seconds"], again["train_seconds"]
    assert again == results


@pytest.mark.parametrize(
    ("victim", "message"),
    [("first", "Interrupted: everything is stopped."), ("second", "The run without a trust region failed")],
)
def test_quickstart_stops_both_runs_with_one_line(tmp_path, victim, message):
    command = [sys.executable, *map(str, quickstart(tmp_path, "--max_steps", "100000"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        profile = tmp_path / "run/trust_region.jsonl"  # written once training has begun
        while process.poll() is None and not profile.exists():
            time.sleep(0.2)
        (second,) = (p for p in psutil.Process(process.pid).children() if "train.py" in " ".join(p.cmdline()))
        if victim == "first":
            process.send_signal(signal.SIGINT)
        else:
            second.kill()
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Traceback" not in output
    assert output.strip().splitlines()[-1].startswith(message)
    assert not second.is_running()
