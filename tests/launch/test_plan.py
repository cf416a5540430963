"""The dry run: parameters and bytes by hand, what cannot work, and what this machine lacks."""

import importlib.util
import runpy
import sys

import pytest
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer, ModelConfig

from cppo_trl.launch.plan import Layout, count_parameters, dry_run, state_bytes
from tests.conftest import ROOT, tiny_data, tiny_model
from tests.launch.conftest import QWEN3, path_of, plan_of, qwen3

SMALL, LARGE, MOE = 1_720_574_976, 8_190_735_360, 30_532_122_624  # parameters of Qwen3-1.7B, 8B and 30B-A3B
PAPER = str(ROOT / "configs/qwen3-1.7b/paper-8k/cppo.yaml")
LORA = str(ROOT / "configs/qwen3-0.6b/gsm8k-lora/cppo.yaml")


@pytest.mark.parametrize("name", QWEN3)
def test_parameters_are_those_that_the_model_cards_give(name):
    total, trained = count_parameters(qwen3(name), ModelConfig())
    assert total / 1e9 == pytest.approx(QWEN3[name][-1], abs=0.051)
    assert trained == total


def test_with_lora_the_adapters_alone_are_trained():
    model = ModelConfig(use_peft=True, lora_r=16, lora_target_modules="all-linear")
    # 28 x 16 x (4096 + 3072 + 3072 + 4096 + 3 x 8192): in and out of the seven matrices of a layer
    assert count_parameters(qwen3("Qwen/Qwen3-1.7B"), model) == (SMALL + 17_432_576, 17_432_576)


@pytest.mark.parametrize(
    ("total", "trained", "sharding", "processes", "weight_bytes", "expected"),
    [
        (SMALL, SMALL, "none", 1, 4, 27.53e9),  # 16 P
        (SMALL, SMALL, "ddp", 8, 4, 34.41e9),  # 20 P, with DDP's buckets
        (SMALL + 17_432_576, 17_432_576, "none", 1, 2, 3.720e9),  # 2 P + 16 adapters
        (LARGE, LARGE, "fsdp2", 8, 4, 16.38e9),  # 16 P / 8
        (MOE, MOE, "fsdp2", 16, 4, 30.53e9),  # 16 P / 16
        (LARGE, LARGE, "zero2", 8, 4, 30.71e9),  # 2 P + 14 P / 8
        (LARGE, LARGE, "zero3", 8, 4, 16.38e9),  # 16 P / 8
    ],
)
def test_bytes_of_known_models_by_hand(total, trained, sharding, processes, weight_bytes, expected):
    assert state_bytes(total, trained, Layout(processes, sharding), weight_bytes) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", PAPER, "--cppo_detla", "1"], "cppo_detla"),
        (["--config", PAPER, "--num_processes", "3"], "must be divisible by the global batch size"),
        (["--config", PAPER, "--num_generations", "3"], "must be divisible by num_generations"),
        (["--config", PAPER, "--num_processes", "0"], "num_processes must be >= 1"),
        (["--config", PAPER, "--cppo_topk", "21"], "cppo_topk must be <= 20"),
        (["--config", PAPER, "--top_p", "0.9"], "top_p=0.9 contradicts"),
    ],
)
def test_what_cannot_work_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        dry_run(arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_processes", "8", "--vllm_tensor_parallel_size", "3"], "does not divide 8 processes"),
        (["--num_processes", "8", "--vllm_tensor_parallel_size", "32"], "does not divide 16 attention heads"),
        (["--max_completion_length", "9216"], "leaves no room for a prompt"),
        (["--max_completion_length", "40960", "--vllm_max_model_length", "41000"], "exceed the model's context"),
        (["--reward_funcs", "nowhere.reward"], "cannot import 'nowhere.reward'"),
    ],
)
def test_problems_are_named(arguments, message):
    plan = dry_run(["--config", PAPER, *arguments])
    assert any(message in problem for problem in plan.problems), plan.problems


def test_a_server_s_top_k_that_no_machine_holds_is_refused():
    recipe = path_of("Qwen/Qwen3-30B-A3B-Base")
    (problem,) = plan_of(recipe, None, "--cppo_topk_source", "engine").problems
    # 4096 x 16384 tokens x (291 + 72 x 20) bytes
    assert "1,731 bytes of Python objects a token (measured) are up to 108 GiB in each process" in problem
    assert "67,108,864 tokens: set cppo_topk_source to policy" in problem
    for fields in (["--generation_batch_size", "1024"], ["--cppo_divergence", "binary_tv"], ["--use_vllm", "false"]):
        assert plan_of(recipe, None, "--cppo_topk_source", "engine", *fields).problems == []


def test_a_cast_head_that_trl_cannot_make_is_refused(make_trainer):
    plan = dry_run(["--config", LORA, "--cast_lm_head_to_fp32", "true"])
    assert any("TRL 1.16 fails on it with LoRA" in problem for problem in plan.problems)
    assert plan_of(path_of("Qwen/Qwen3-8B-Base"), None, "--use_peft", "true").problems == []  # untied
    lora = {"peft_config": LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")}
    fields = {"model": tiny_model(tie_word_embeddings=True), "cast_lm_head_to_fp32": True, "trainer": lora}
    with pytest.raises(ValueError, match="cast_lm_head_to_fp32 to false"):
        make_trainer(**fields)
    with pytest.raises(AttributeError, match="embed_tokens"):  # once this passes, TRL has fixed it: drop the refusals
        make_trainer(GRPOTrainer, GRPOConfig, **fields)


def test_what_this_machine_lacks_is_a_note_and_no_problem():
    plan = plan_of(PAPER, "zero3")
    text = str(plan)
    for name in ("vllm", "deepspeed", "trackio"):
        assert (f"note: {name} is not installed here" in text) == (importlib.util.find_spec(name) is None)
    assert "data/dapo-math-17k" in text
    assert plan.config.bf16
    assert plan.problems == []


def test_memory_informs_and_never_refuses():
    plan = plan_of(PAPER, "ddp", "--gpu_memory_gb", 24)
    assert plan.problems == []
    assert "weights, gradients and AdamW alone (32 GiB) exceed 24 GB" in plan.notes


def test_models_of_a_directory_and_models_out_of_reach(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    here = dry_run(["--config", LORA, "--model_name_or_path", str(tmp_path)])
    parameters = sum(p.numel() for p in tiny_model().parameters())
    assert here.rows["parameters"].startswith(f"{parameters / 1e9:.2f} B")
    elsewhere = dry_run(["--config", LORA, "--model_name_or_path", "somebody/model"])
    assert "GPU memory" not in elsewhere.rows
    assert any("size and context are unknown" in note for note in elsewhere.notes)


def test_data_of_this_machine_are_checked(tmp_path):
    def problems(rows, *arguments):
        rows.to_json(tmp_path / "data/train.jsonl")
        return dry_run(["--config", LORA, "--dataset_name", str(tmp_path / "data"), *arguments]).problems

    (tmp_path / "data").mkdir()
    assert problems(tiny_data(32)) == []
    (few,) = problems(tiny_data(31))
    assert "31 rows and a rollout takes 32 prompts: add data" in few
    (unnamed,) = problems(tiny_data(32).rename_column("prompt", "question"))
    assert "no column 'prompt'; it has ['question', 'solution']" in unnamed
    (zero,) = problems(tiny_data(32), "--max_steps", "0")
    assert "max_steps=0 makes no update" in zero


def test_a_config_for_many_processes_is_the_one_made_there():
    there = plan_of(PAPER, None, "--num_processes", 8).config
    here = plan_of(PAPER, None, "--per_device_train_batch_size", 16).config
    assert there.world_size == 8
    assert there.steps_per_generation == here.steps_per_generation == 32
    assert there.updates_per_rollout == here.updates_per_rollout == 2


def test_the_script_prints_the_plan_and_its_exit_status_says_whether_it_can_work(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["train.py", "--dry_run", "--config", PAPER, *arguments])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(ROOT / "scripts/train.py"), run_name="__main__")
        return stopped.value.code

    assert run("--num_processes", "8") == 0
    assert "64 prompts x 8 responses = 512" in capsys.readouterr().out
    assert run("--num_processes", "8", "--vllm_tensor_parallel_size", "3") == 1
    assert "problem: vllm_tensor_parallel_size=3 does not divide" in capsys.readouterr().out
    assert "train.py: cppo_w_min must be" in run("--cppo_w_min", "2")
