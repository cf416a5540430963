"""Every recipe through the dry run, against the paper's numbers written here by hand; how they are listed."""

import os
import re
import subprocess

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from cppo_trl import AsyncCPPOConfig
from cppo_trl.launch import recipes
from cppo_trl.launch.command import main
from cppo_trl.launch.plan import read_layout
from cppo_trl.rules import RULES
from tests.conftest import ROOT
from tests.launch.conftest import path_of, plan_of

RECIPES = sorted(ROOT.glob("configs/*/*/*.yaml"))
LAYOUTS = sorted(ROOT.glob("configs/accelerate/*.yaml"))

# arXiv 2606.10968, Table 3: model; prompts, n, minibatch in prompts, updates, T_max, delta, delta_b min, w_min;
# then whether Eq. 22 is on, the last step of its curves (T_stop), the layout the recipe is meant for, its processes
TABLE_3 = [
    ("Qwen/Qwen3-1.7B", 64, 8, 32, 2, 8192, 0.15, 0.015, 0.8, False, 1120, "ddp", 8),
    ("Qwen/Qwen3-1.7B-Base", 64, 8, 32, 2, 8192, 0.15, 0.020, 0.8, True, 680, "ddp", 8),
    ("Qwen/Qwen3-8B-Base", 128, 8, 32, 4, 8192, 0.15, 0.020, 0.8, True, 490, "fsdp2", 8),
    ("Qwen/Qwen3-30B-A3B-Base", 256, 16, 32, 8, 16384, 0.20, 0.020, 0.8, True, 560, "fsdp2-two-nodes", 16),
]
SINGLE_GPU = {  # recipe: GB of its card
    "qwen3-0.6b/gsm8k-lora/cppo": 24,
    "qwen3-0.6b/gsm8k-lora/no-vllm": 24,
    "qwen3-1.7b/gsm8k-lora/cppo": 24,
    "qwen3-1.7b/gsm8k-lora/no-vllm": 24,
    "qwen3-1.7b/one-gpu/cppo": 80,
}
ASYNCHRONOUS = {  # recipe: the layout it is meant for, options of its server
    "qwen3-1.7b/async-two-gpus/cppo": (None, {"--max-loras": 6, "--max-lora-rank": 16}),
    "qwen3-8b-base/async-nodes/cppo": ("fsdp2-two-nodes", {"--tensor-parallel-size": 8}),
}
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def responses_per_update(plan):
    return int(plan.rows["an update"].split()[0])


def gib_of(plan):
    return float(plan.rows["GPU memory"].split()[0])


@pytest.mark.parametrize("row", TABLE_3, ids=lambda row: row[0])
@pytest.mark.filterwarnings("error")  # a doubtful setting would warn
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_paper_s_settings_number_for_number(row):
    model, prompts, n, minibatch, updates, length, delta, delta_b, w_min, dynamic, stop, layout, processes = row
    plan = plan_of(path_of(model), layout, "--gpu_memory_gb", 80)
    config = plan.config
    assert plan.problems == []
    assert (plan.layout.processes, plan.rows["model"].split(",")[0]) == (processes, model)
    assert config.generation_batch_size == prompts * n
    assert (config.num_generations, config.max_completion_length) == (n, length)
    assert responses_per_update(plan) == minibatch * n
    assert (config.updates_per_rollout, config.num_iterations) == (updates, 1)
    assert (config.trust_region, config.cppo_divergence, config.cppo_topk) == ("cppo", "topk_tv", 20)
    assert (config.cppo_delta, config.cppo_delta_b, config.cppo_w_min) == (delta, delta_b, w_min)
    assert config.cppo_topk_source == ("policy" if config.vllm_mode == "server" else "engine")
    assert config.cppo_delta_b_quantile == (0.9 if dynamic else None)
    assert config.cppo_delta_b_max_multiple == 2
    assert config.cppo_ratio_cap is None
    assert (config.temperature, config.top_p, config.top_k, config.min_p) == (1.0, 1.0, 0, None)
    assert (config.beta, config.entropy_coef, config.skip_zero_std_prompts) == (0.0, 0.0, True)
    assert (config.learning_rate, config.optim) == (1e-6, "adamw_torch")
    assert config.max_steps == stop * updates
    # the authors' codes where the paper is silent
    assert (config.loss_type, config.scale_rewards) == ("dr_grpo", "none")
    assert (config.lr_scheduler_type, config.warmup_steps, config.weight_decay) == ("constant", 0, 0.01)
    assert (config.adam_beta1, config.adam_beta2, config.adam_epsilon, config.max_grad_norm) == (0.9, 0.999, 1e-8, 1.0)
    assert config.bf16
    assert config.cast_lm_head_to_fp32
    assert config.logging_steps == updates


@pytest.mark.parametrize("row", TABLE_3, ids=lambda row: row[0])
def test_on_another_number_of_processes_the_plan_says_what_changes(row):
    model, prompts, _, minibatch, updates, *_, processes = row
    half = plan_of(path_of(model), row[-2], "--num_processes", processes // 2)
    assert half.config.generation_batch_size == prompts * row[2]  # the rollout stays ...
    assert responses_per_update(half) == minibatch * row[2] / 2  # ... the updates do not
    assert half.config.updates_per_rollout == 2 * updates
    doubled = half.config.gradient_accumulation_steps * 2  # what docs/recipes.md says to change
    fixed = plan_of(
        path_of(model), row[-2], "--num_processes", processes // 2, "--gradient_accumulation_steps", doubled
    )
    assert (responses_per_update(fixed), fixed.config.updates_per_rollout) == (minibatch * row[2], updates)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in ("drpo", "ipo", "vaco")])  # the paper's own
@pytest.mark.parametrize("row", TABLE_3, ids=lambda row: row[0])
def test_every_baseline_is_the_recipe_with_one_other_line(row, rule, tmp_path):
    recipe = path_of(row[0]).read_text()
    (ours,) = (line for line in recipe.splitlines() if line.startswith("<<:"))
    (line,) = (line for line in recipe.splitlines() if re.match(rf"(# )?<<: {{ trust_region: {rule}[ ,]", line))
    path = tmp_path / "baseline.yaml"
    path.write_text(recipe.replace(ours, line.removeprefix("# ")))
    plan = plan_of(path, row[-2], "--gpu_memory_gb", 80)
    assert plan.problems == []
    assert plan.rows["trust region"].startswith(f"{rule}," if rule != "none" else "none")
    if rule in ("cppo", "cppo_soft", "dppo"):
        assert (plan.config.cppo_delta, plan.config.cppo_divergence) == (row[6], "topk_tv")


@pytest.mark.parametrize("recipe", SINGLE_GPU)
def test_single_gpu_recipes_fit_their_card_and_leave_the_policy_off_the_rollout(recipe):
    plan = plan_of(ROOT / f"configs/{recipe}.yaml", None, "--gpu_memory_gb", SINGLE_GPU[recipe])
    assert plan.problems == []
    assert plan.config.updates_per_rollout == 2
    assert not any("exceed" in note for note in plan.notes)
    assert gib_of(plan) < SINGLE_GPU[recipe] / 2


@pytest.mark.parametrize("recipe", ASYNCHRONOUS)
def test_asynchronous_recipes_fit_their_cards_and_their_server(recipe):
    layout, options = ASYNCHRONOUS[recipe]
    path = ROOT / f"configs/{recipe}.yaml"
    plan = plan_of(path, layout, "--gpu_memory_gb", 80)
    assert plan.problems == []
    assert isinstance(plan.config, AsyncCPPOConfig)
    assert not any("exceed" in note for note in plan.notes)
    header = path.read_text().partition("\nasynchronous: true\n")[0]
    assert "Not run." in header
    options |= {"--max-model-len": plan.config.token_budget, "--logprobs-mode": "processed_logprobs"}
    for text in (header, (path.parent / "README.md").read_text()):
        for option, value in options.items():
            assert f"{option} {value}" in text
    assert plan.config.token_budget >= plan.config.max_completion_length + 1024  # the longest prompt of its data
    if "--max-loras" in options:  # as TRL's select_adapter_sync asks for
        assert options["--max-loras"] == plan.config.max_staleness + 2


def test_no_recipe_is_left_out():
    listed = {path_of(row[0]) for row in TABLE_3} | {ROOT / f"configs/{name}.yaml" for name in SINGLE_GPU}
    listed |= {ROOT / f"configs/{name}.yaml" for name in ASYNCHRONOUS}
    listed |= {ROOT / "configs/smollm2-135m/word-problems/cppo.yaml"}  # tests/scripts/test_quickstart_llm.py
    assert listed == set(RECIPES)
    assert all((path.parent / "README.md").is_file() for path in RECIPES)


def test_the_documents_give_the_memory_of_the_dry_run():
    lines = (ROOT / "docs/recipes.md").read_text().splitlines()
    meant = {path_of(row[0]): row[-2] for row in TABLE_3}
    meant |= {ROOT / f"configs/{name}.yaml": None for name in SINGLE_GPU}
    meant |= {ROOT / f"configs/{name}.yaml": layout for name, (layout, _) in ASYNCHRONOUS.items()}
    for path, layout in meant.items():
        gib = f"{gib_of(plan_of(path, layout)):.1f}"
        (row,) = (line for line in lines if f"`{path.parent.relative_to(ROOT / 'configs')}`" in line)
        assert gib == row.split("|")[-2].strip()
        assert f"{gib} GiB" in " ".join((path.parent / "README.md").read_text().split())


@pytest.mark.parametrize("path", LAYOUTS, ids=lambda path: path.stem)
def test_accelerate_files_are_accelerate_s(path):
    cluster = load_config_from_file(str(path))
    layout = read_layout(str(path), None)
    kinds = {
        "ddp": "MULTI_GPU",
        "fsdp2": "FSDP",
        "fsdp2-two-nodes": "FSDP",
        "zero2": "DEEPSPEED",
        "zero3": "DEEPSPEED",
    }
    assert cluster.distributed_type == kinds[path.stem]
    assert (cluster.mixed_precision, layout.sharding) == ("bf16", path.stem.split("-")[0])
    assert layout.processes == cluster.num_processes == 8 * cluster.num_machines


def test_plugins_take_the_fields_of_the_files():
    from accelerate import FullyShardedDataParallelPlugin

    for path in LAYOUTS:
        cluster = load_config_from_file(str(path))
        if cluster.fsdp_config:
            fields = {name.removeprefix("fsdp_"): value for name, value in cluster.fsdp_config.items()}
            plugin = FullyShardedDataParallelPlugin(
                **{
                    {"version": "fsdp_version", "offload_params": "cpu_offload"}.get(k, k): v
                    for k, v in fields.items()
                }
            )
            assert plugin.fsdp_version == 2
            assert plugin.reshard_after_forward is True


def test_batch_script_starts_a_server_on_the_last_machine_and_trains_on_the_others(tmp_path):
    log = tmp_path / "log"
    stubs = {  # srun runs its command once for each task; the others write down how they were called
        "scontrol": "printf 'n1\\nn2\\nn3\\n'",
        "srun": 'while [ "$1" != bash ]; do export "${1#--}"; shift; done\n'
        '[ $ntasks = 1 ] && exec "$@"\nfor i in $(seq 0 $((ntasks - 1))); do SLURM_PROCID=$i "$@"; done',
        "vllm": f'echo "vllm@$nodelist dev=$VLLM_SERVER_DEV_MODE $*" >> {log}; exec sleep 60',
        "accelerate": f'until [ -s {log} ]; do sleep 0.05; done; echo "accelerate@$nodelist $*" >> {log}',
    }
    for name, text in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    recipe, layout = "configs/qwen3-30b-a3b-base/paper-16k/cppo.yaml", "configs/accelerate/fsdp2-two-nodes.yaml"
    done = subprocess.run(
        ["bash", "configs/slurm/train-with-server.sbatch", recipe, layout, "--seed", "1"],
        cwd=ROOT,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n[1-3]"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    server, *trainers = log.read_text().splitlines()
    assert server.startswith("vllm@n3 dev=1 serve Qwen/Qwen3-30B-A3B-Base ")
    for option in ('{"backend": "nccl"}', "processed_logprobs --max-logprobs 20", "--max-model-len 17408"):
        assert option in server
    assert len(trainers) == 2
    for rank, line in enumerate(trainers):
        assert line.startswith("accelerate@n1,n2 launch")
        assert f"--num_machines 2 --num_processes 16 --machine_rank {rank} --main_process_ip n1" in line
        assert line.endswith(f"--config {recipe} --vllm_server_host n3 --seed 1")


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
