"""A run from a recipe, with what it refuses and where it reports."""

import copy
import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from cppo_trl.evaluation.command import EvaluationArguments, evaluate_command
from cppo_trl.launch.plan import dry_run
from cppo_trl.launch.training import parse_arguments, train
from tests.conftest import RECIPE, ROOT, launch, small_run, tiny_data


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
    assert json.loads((out / "run.json").read_text())["dataset"] == str(task / "data")
    AutoModelForCausalLM.from_pretrained(out)
    assert AutoTokenizer.from_pretrained(out).decode([2]) == "0"
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert any("cppo/divergence/mean" in row for row in history)
    evaluations = {row["step"]: row for row in history if "eval_avg@4" in row}
    assert list(evaluations) == [0, 3, 4]
    # however many processes share the problems, the numbers are those of scripts/evaluate.py
    sampling = {"samples": 4, "temperature": 0.9, "max_new_tokens": 6, "batch_size": 12, "backend": "transformers"}
    model, benchmarks, directory = str(task / "model"), [str(task / "data/train.jsonl")], str(task / "evaluation")
    evaluate_command(EvaluationArguments(model=model, benchmarks=benchmarks, output_dir=directory, **sampling))
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
        (["--dataset_name", "{task}/empty"], "cannot read '{task}/empty'"),
        (["--num_generations", "2", "--per_device_train_batch_size", "32"], "32 rows and a rollout takes 64 prompts"),
        (["--max_steps", "0"], "max_steps=0 makes no update"),
        (["--max_steps", "-1", "--num_train_epochs", "0"], "num_train_epochs=0 makes no update"),
    ],
)
def test_what_cannot_train_is_refused_before_a_model_is_loaded(task, arguments, message):
    (task / "empty").mkdir()
    (task / "empty/train.jsonl").touch()
    arguments = [argument.format(task=task) for argument in arguments]
    fields = ["--config", RECIPE, *small_run(task), "--model_name_or_path", "no/such-model", *arguments]
    with pytest.raises(ValueError, match=re.escape(message.format(task=task))):
        train(*parse_arguments(fields))
    plan = dry_run(fields)
    assert any(message.format(task=task) in problem for problem in plan.problems)
    assert not (task / "out/README.md").exists()


def test_a_trainer_with_too_few_rows_is_refused(make_trainer):
    fields = {"per_device_train_batch_size": 8, "steps_per_generation": 4, "num_generations": 4}  # 8 prompts
    with pytest.raises(ValueError, match="has 7 rows and a rollout takes 8 prompts"):
        make_trainer(data=tiny_data(7), **fields)
    with pytest.raises(ValueError, match="has 0 rows"):
        make_trainer(data=tiny_data(8).select([]), **fields)
    make_trainer(data=tiny_data(8), max_steps=1, **fields).train()
    make_trainer(data=tiny_data(8).to_iterable_dataset(), **fields)  # of no known length


def test_a_second_run_in_the_same_directory_is_refused(task):
    fields = ["--config", RECIPE, *small_run(task), "--model_name_or_path", "no/such-model"]
    hold = f"import fcntl; f = open({str(task / 'out/_lock')!r}, 'w'); f.write('process 1 on x'); f.flush(); "
    hold += "fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    (task / "out").mkdir()
    first = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    first.stdout.readline()
    with pytest.raises(ValueError, match=r"output_dir=.* is in use by process 1 on x\. Wait for it"):
        train(*parse_arguments(fields))
    first.communicate(b"\n")
    with pytest.raises(ValueError, match="no/such-model: this model is not in the Hub cache"):  # the lock is free
        train(*parse_arguments(fields))


def test_train_leaves_its_arguments_as_they_are(task):
    arguments = parse_arguments(["--config", RECIPE, *small_run(task), "--dtype", "float32"])
    before = [copy.deepcopy(asdict(argument)) for argument in arguments]
    trainer = train(*arguments)
    assert trainer.args.model_init_kwargs["dtype"] == "float32"
    for argument, as_it_was in zip(arguments, before, strict=True):
        assert [name for name, value in asdict(argument).items() if value != as_it_was[name]] == []


def test_a_script_ends_in_one_line(task):
    result = launch(ROOT / "scripts/train.py", "--config", RECIPE, *small_run(task), "--dataset_train_split", "nope")
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("train.py: The dataset has no split 'nope'")
    assert "Traceback" not in result.stderr


def test_a_run_reports_its_metrics_to_trackio(task):
    pytest.importorskip("trackio")
    fields = ["--report_to", "trackio", "--project", "cppo", "--run_name", "tiny", "--logging_steps", "1"]
    environment = {"TRACKIO_DIR": str(task / "trackio")}
    result = launch(ROOT / "scripts/train.py", "--config", RECIPE, *small_run(task), *fields, **environment)
    assert result.returncode == 0, result.stderr[-3000:]
    metric = ["--project", "cppo", "--run", "tiny", "--metric", "train/cppo/divergence/mean", "--json"]
    command = [Path(sys.executable).with_name("trackio"), "get", "metric", *metric]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    reported = {row["step"]: row["value"] for row in json.loads(printed)["values"]}
    history = json.loads((task / "out/trainer_state.json").read_text())["log_history"]
    assert reported == {row["step"]: row["cppo/divergence/mean"] for row in history if "loss" in row}
