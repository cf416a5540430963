"""Mistakes that users make: each ends in one line that names the field and the fix, before a model is loaded."""

import json
import sys

import pytest

from cppo_trl.launch.command import main
from tests.conftest import flags, small_run

RECIPE = "quickstart"
REWARDS = """
number = 3
def short(completions, **kwargs): return [1.0]
def nothing(completions, **kwargs): return None
def words(completions, **kwargs): return ["good"] * len(completions)
def nan(completions, **kwargs): return [float("nan")] + [0.0] * (len(completions) - 1)
def target(completions, target, **kwargs): return [0.0] * len(completions)
"""


def rows(task, change):
    """Rewrite the task's rows."""
    path = task / "data/train.jsonl"
    lines = [json.dumps(change(json.loads(line))) for line in path.read_text().splitlines()]
    path.write_text("\n".join(lines))


@pytest.fixture
def run(task, monkeypatch, capsys):
    """Runs a training without weights, so that loading a model would fail; returns the line that ended it."""
    (task / "model/model.safetensors").unlink()
    (task / "my_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(task)
    monkeypatch.setattr(sys, "argv", ["cppo-trl"])

    def ended(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main(["train", "--config", RECIPE, *small_run(task), *arguments])
        assert "usage" not in capsys.readouterr().err
        (line,) = str(stopped.value.code).strip().splitlines()
        return line

    yield ended
    sys.modules.pop("my_rewards", None)


FIELDS = [  # arguments, message
    ("--cppo_detla 0.1", "Unknown field: cppo_detla. Did you mean cppo_delta?"),
    ("--num_proceses 2", "Unknown field: num_proceses. Did you mean num_processes?"),
    ("mine.yaml", "'mine.yaml' belongs to no field: a recipe is given with --config."),
    ("--num_processes many", "argument --num_processes/--num-processes: invalid int value: 'many'"),
    ("--accelerate_config fsdp3", "--accelerate_config: cannot read fsdp3 (No such file, and no recipe's name)"),
    ("--num_generations 3", "must be divisible by num_generations (3)"),
    ("--top_p 0.9", "top_p=0.9 contradicts the trust region"),
    ("--temperature 0", "temperature must be > 0"),
    ("--cppo_w_min 2", "cppo_w_min must be in (0, 1]"),
    ("--loss_type sapo", "loss_type must be one of"),
    ("--cppo_ratio_min 0.5", "cppo_ratio_min must be left at None: trust_region='cppo' does not read it"),
    ("--use_cpu false --bf16 true", "Your setup doesn't support bf16/gpu."),
    ("--max_steps many", "argument --max_steps/--max-steps: invalid int value: 'many'"),
    ("--trust_region dpo", "trust_region must be one of"),
    ("--trust_region_parameters {delta:", "trust_region_parameters must be a JSON object, or null; got '{delta:'"),
    ("--max_completion_length 0", "max_completion_length must be >= 1"),
    ("--learning_rate=-1e-5", "learning_rate must be >= 0"),
    ("--max_steps 0", "max_steps=0 makes no update"),
    ("--cppo_topk 20.0", "argument --cppo_topk/--cppo-topk: invalid int value: '20.0'"),
    ("--cppo_delta 15", "cppo_delta must be at most 1, the largest total variation"),
    ("--use_vllm true", "vllm is not installed here: pip install 'cppo-trl[vllm]', or set use_vllm to false."),
    ("--report_to mlflow", "mlflow is not installed here: pip install 'mlflow', or set report_to to none."),
    ("--use_peft true --lora_target_modules q_prj", "lora_target_modules='q_prj': Target modules q_prj not found"),
    ("--push_to_hub true", "push_to_hub: the repository"),
    ("--output_dir /proc/out", "output_dir='/proc/out' cannot be written to"),
    ("--resume_from_checkpoint nowhere", "resume_from_checkpoint='nowhere' does not exist. Set it to true"),
    ("--model_name_or_path no/such", "no/such: this model is not in the Hub cache and cannot be downloaded"),
    ("--dataset_name no/such", "no/such: this dataset is not in the Hub cache and cannot be downloaded"),
    ("--dataset_train_split all", "The dataset has no split 'all'; it has ['train']. Set dataset_train_split."),
    ("--eval_benchmarks gone.jsonl", "benchmarks: there is no file 'gone.jsonl'."),
    ("--reward_funcs my_rewards.gone", "reward_funcs: cannot import 'my_rewards.gone'"),
    ("--reward_funcs my_rewards.number", "reward_funcs: 3 is not callable"),
    ("--reward_funcs my_rewards.target", "reward_funcs: target reads the column 'target'; the dataset has"),
]


ASYNCHRONOUS = [
    ("--max_stalenes 4", "Unknown field: max_stalenes. Did you mean max_staleness?"),
    ("--cppo_divergence topk_tv", "cppo_divergence='topk_tv': TRL's rollout worker asks for the sampled token's"),
    ("--use_vllm true", "Unknown field: use_vllm."),
    ("--eval_benchmarks aime24", "eval_benchmarks does not go with asynchronous: true: evaluate its checkpoints"),
    ("--load_in_4bit true", "load_in_4bit does not go with asynchronous: true: the server would sample from"),
    ("--attn_implementation sdpa", "attn_implementation does not go with asynchronous: true: leave it out"),
    ("--max_steps 0", "max_steps=0 makes no update"),
    ("--max_completion_length 99999", "max_completion_length=99999 exceeds the model's context of"),
    ("", "The column 'prompt' holds texts: with asynchronous: true it must hold messages."),
]


@pytest.mark.parametrize(
    ("arguments", "message"), ASYNCHRONOUS, ids=[" ".join(a.split()[:1]) for a, _ in ASYNCHRONOUS]
)
def test_a_wrong_field_of_an_asynchronous_run(arguments, message, run, task, monkeypatch):
    monkeypatch.setattr("cppo_trl.seam.inputs.find_spec", lambda name: name)
    if arguments:
        rows(task, lambda row: row | {"prompt": [{"role": "user", "content": row["prompt"]}]})
    recipe = task / "async.yaml"
    recipe.write_text("asynchronous: true\nuse_cpu: true\nbf16: false\nmax_completion_length: 8\n")
    fields = {"model_name_or_path": task / "model", "dataset_name": task / "data", "output_dir": "out", "max_steps": 4}
    with pytest.raises(SystemExit) as stopped:  # the fixture has removed the weights
        main(["train", "--config", str(recipe), *flags(fields), *arguments.split()])
    (line,) = str(stopped.value.code).strip().splitlines()
    assert message in line


@pytest.mark.parametrize(("arguments", "message"), FIELDS, ids=[arguments for arguments, _ in FIELDS])
def test_a_wrong_field(arguments, message, run):
    line = run(*arguments.split())
    assert line.startswith("cppo-trl: ")
    assert message in line


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            "qwen3-1.7b/gsm8k",
            "--config: cannot read qwen3-1.7b/gsm8k (No such file, and no recipe's name). Did you mean",
        ),
        ("gone.yaml", "--config: cannot read gone.yaml (No such file"),
        ("bad.yaml", "--config: not valid YAML: "),
        ("typo.yaml", "Unknown field: cppo_detla. Did you mean cppo_delta?"),
    ],
)
def test_a_wrong_recipe(recipe, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text("max_steps: [1")
    (tmp_path / "typo.yaml").write_text("cppo_detla: 1\nuse_cpu: true\nbf16: false")
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--config", recipe])
    (line,) = str(stopped.value.code).strip().splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: {"question": row["prompt"]}, "Split 'train' has no column 'prompt'; it has ['question']. Rename"),
        (lambda row: {"prompt": row["prompt"]}, "reads the column 'solution'; the dataset has ['prompt']. Rename"),
        (lambda row: {**row, "prompt": [row["prompt"]]}, "The column 'prompt' must hold a text, or messages"),
    ],
)
def test_wrong_data(change, message, run, task):
    rows(task, change)
    assert message in run()


def test_data_without_enough_rows(run, task):
    (task / "data/train.jsonl").write_text("")
    assert "dataset_name: cannot read" in run()


def test_checkpoints_of_an_earlier_run(run, task):
    checkpoint = task / "out/checkpoint-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    (checkpoint / "pytorch_model.bin").write_bytes(b"PK\x05\x06" + bytes(18))  # an empty zip
    assert "holds checkpoint-2 of an earlier run. Set resume_from_checkpoint to true" in run()


@pytest.mark.parametrize(
    ("name", "got"),
    [("short", "[1.0]"), ("nothing", "None"), ("words", "['good', "), ("nan", "[nan, 0.0, ")],
)
def test_a_reward_that_returns_something_else_stops_in_its_first_rollout(name, got, task, monkeypatch):
    (task / "my_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(task)
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--config", RECIPE, *small_run(task), "--reward_funcs", f"my_rewards.{name}"])
    sys.modules.pop("my_rewards")
    expected = f"reward_funcs: {name} must return 32 numbers, one for each completion (None to abstain); got {got}"
    assert expected in str(stopped.value.code)
