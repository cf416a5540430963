"""The dry run: resolve a recipe for N processes, and name what cannot work, before a model is loaded."""

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import trl
from accelerate.commands.config.config_args import load_config_from_file
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from trl import DatasetMixtureConfig, ModelConfig, get_peft_config

from cppo_trl.config import CPPOConfig, in_columns
from cppo_trl.evaluation.command import require_model
from cppo_trl.evaluation.problems import check_benchmarks
from cppo_trl.launch import recipes
from cppo_trl.launch.training import CPPOScriptArguments, RunConfig, dataset_names, load_data, parse_arguments
from cppo_trl.output.checkpoints import checkpoint_to_resume
from cppo_trl.rules import import_object
from cppo_trl.seam.inputs import missing_packages

SHARDINGS = ("none", "ddp", "zero2", "zero3", "fsdp2")
"""Strategies whose memory the dry run knows."""

MOST_SERVER_TOPK = 32 * 2**30
"""Bytes of Python objects that a server's Top-K may take in each process: 256 GiB of main memory for eight of them."""


@dataclass(frozen=True)
class Layout:
    """How a model is distributed: the number of processes, one GPU each, and the strategy, mostly of `SHARDINGS`."""

    processes: int = 1
    sharding: str = "none"

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise ValueError(f"num_processes must be >= 1; got {self.processes}.")


@dataclass
class Plan:
    """What a run would do.

    Args:
        config: the checked configuration, as on ``layout.processes`` processes.
        layout: the processes.
        rows: the plan in words, row by row.
        notes: what is missing on this machine only, and what is unusual.
        problems: what cannot work.
    """

    config: RunConfig
    layout: Layout
    rows: dict[str, str]
    notes: list[str]
    problems: list[str]

    def __str__(self) -> str:
        """The plan as a table, with notes and problems below."""
        lines = [in_columns("CPPO plan: no model was loaded", self.rows), *(f"  note: {note}" for note in self.notes)]
        return "\n".join([*lines, *(f"  problem: {problem}" for problem in self.problems)])


def dry_run_parser() -> argparse.ArgumentParser:
    """The dry run's own flags; all others belong to the recipe."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--num_processes", type=int, help="Processes; default: the Accelerate file's, else one.")
    parser.add_argument("--accelerate_config", help="Accelerate file: processes and sharding strategy.")
    parser.add_argument("--gpu_memory_gb", type=float, help="Memory of a GPU, for a note where it is too small.")
    return parser


def dry_run(arguments: Sequence[str]) -> Plan:
    """The plan of a command line of ``cppo-trl plan``, with the flags of `dry_run_parser`.

    The configuration is checked on the CPU: what the GPUs that will train support is not known here.

    Raises:
        ValueError: for a field that no dataclass knows, or a value that `CPPOConfig` or TRL refuses.
    """
    own, rest = dry_run_parser().parse_known_args(arguments)
    layout = read_layout(own.accelerate_config, own.num_processes)
    script, config, model, mixture = parse_arguments([*rest, "--use_cpu", "true"], world_size=layout.processes)
    architecture = architecture_of(model.model_name_or_path)
    rows, notes = _rows(script, config, model, mixture, layout), _missing_here(config, mixture, script, layout)
    if architecture is None:
        notes.append(f"no config.json of {model.model_name_or_path!r} can be read: size and context are unknown")
    else:
        total, trained = count_parameters(architecture, model)
        rows["parameters"] = f"{total / 1e9:.2f} B, {trained / 1e9:.4g} B of them trained"
    if architecture is not None and layout.sharding in SHARDINGS:
        gib = state_bytes(total, trained, layout, 2 if model.dtype in ("bfloat16", "float16", "auto") else 4) / 2**30
        rows["GPU memory"] = f"{gib:.1f} GiB for weights, gradients and AdamW; activations and generation come on top"
        if own.gpu_memory_gb and gib > own.gpu_memory_gb:
            notes.append(f"weights, gradients and AdamW alone ({gib:.0f} GiB) exceed {own.gpu_memory_gb:g} GB")
    problems = [*_refusals(script, config, mixture), *_conflicts(config, model, layout, architecture)]
    return Plan(config, layout, rows, notes, list(dict.fromkeys(problems)))


def layout_file(name: str) -> str:
    """The path of an Accelerate file: a file, or the name of one of this package's or of TRL's.

    Raises:
        ValueError: if it is neither.
    """
    trl_files = {path.stem: path for path in Path(trl.__path__[0], "accelerate_configs").glob("*.yaml")}
    return recipes.find(name, trl_files | recipes.layouts(), "--accelerate_config")


def read_layout(accelerate_config: str | None, processes: int | None) -> Layout:
    """The layout of an Accelerate file, or of a number of processes under DDP.

    Raises:
        ValueError: for a file that is missing.
    """
    if accelerate_config is None:
        count = 1 if processes is None else processes
        return Layout(count, "none" if count == 1 else "ddp")
    cluster = load_config_from_file(layout_file(accelerate_config))
    sharding = {
        "NO": "none",
        "MULTI_GPU": "ddp",
        "DEEPSPEED": f"zero{cluster.deepspeed_config.get('zero_stage')}",
        "FSDP": f"fsdp{cluster.fsdp_config.get('fsdp_version', 1)}",
    }.get(cluster.distributed_type.value, cluster.distributed_type.value)
    in_file = 1 if sharding == "none" else cluster.num_processes
    count = in_file if processes is None else processes
    return Layout(count, "none" if sharding == "ddp" and count == 1 else sharding)


def architecture_of(name: str | None) -> PretrainedConfig | None:
    """The architecture in a model's ``config.json``, local or on the Hub; None where it cannot be read."""
    try:
        require_model(name or "")
        return AutoConfig.from_pretrained(name or "").get_text_config()
    except (OSError, ValueError):
        return None


def count_parameters(architecture: PretrainedConfig, model: ModelConfig) -> tuple[int, int]:
    """Parameters in all and those that are trained, counted on a model without storage."""
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(architecture)
        if not model.use_peft:
            return made.num_parameters(), made.num_parameters()
        try:
            trained, total = get_peft_model(made, get_peft_config(model)).get_nb_trainable_parameters()
        except ValueError as error:
            raise ValueError(f"lora_target_modules={model.lora_target_modules!r}: {error}") from error
    return total, trained


def state_bytes(total: int, trained: int, layout: Layout, weight_bytes: int) -> float:
    """Bytes of weights, gradients and AdamW's moments in one process.

    One process holds the frozen weights as they are stored and 16 bytes for each trained parameter (fp32 weight,
    gradient and two moments); DDP's buckets are a further fp32 copy of the gradients; FSDP2 shards all of it.
    DeepSpeed computes with bf16 weights, which only ZeRO-3 shards, and shards 14 bytes for each trained parameter.
    """
    if layout.sharding.startswith("zero"):
        weights = 2.0 * total / (layout.processes if layout.sharding == "zero3" else 1)
        return weights + 14.0 * trained / layout.processes
    held = weight_bytes * (total - trained) + (20.0 if layout.sharding == "ddp" else 16.0) * trained
    return held / layout.processes if layout.sharding == "fsdp2" else held


def server_topk_bytes(config: CPPOConfig) -> int:
    """Bytes of Python objects that TRL holds in every process for the longest rollout of a vLLM server with Top-K.

    Measured with TRL 1.16 (docs/vllm.md): 291 bytes a token, and 72 for each of the K.
    """
    if not (config.use_vllm and config.vllm_mode == "server" and config.uses_topk) or config.topk_of_policy:
        return 0
    return config.generation_batch_size * config.max_completion_length * (291 + 72 * config.cppo_topk)


def _rows(
    script: CPPOScriptArguments, config: RunConfig, model: ModelConfig, mixture: DatasetMixtureConfig, layout: Layout
) -> dict[str, str]:
    batch, accumulated = config.per_device_train_batch_size, config.gradient_accumulation_steps
    updates, temperature = f"{config.max_steps} updates", f"temperature {config.temperature:g}"
    update = f"({batch} x {layout.processes} processes x {accumulated} accumulated)"
    if isinstance(config, CPPOConfig):
        updates += f" = {config.max_steps / config.updates_per_rollout:g} rollouts"
        engine = f"vLLM ({config.vllm_mode})" if config.use_vllm else "transformers generation"
        most = config.generation_batch_size * config.max_completion_length
        rollouts = f"{engine}, at most {most:,} tokens, {temperature}"
        update = f"{batch * layout.processes * accumulated} responses, shuffled over the rollout's prompts {update}"
    else:
        rollouts = f"a vLLM server, {config.num_generations} responses a prompt, {temperature}"
        budget = config.token_budget or "the server's max-model-len in"
        filled = f"{batch} responses" if str(budget).startswith("-") else f"at most {budget} tokens"
        update = f"{layout.processes} processes x {accumulated} accumulated rows of {filled}"
    return {
        "model": f"{model.model_name_or_path}, {model.dtype or 'float32'} weights, "
        + (f"LoRA of rank {model.lora_r}" if model.use_peft else "all of them trained"),
        "data": f"{', '.join(dataset_names(script, mixture))}, split {script.dataset_train_split}",
        "processes": f"{layout.processes} ({layout.sharding})",
        **config.schedule(),
        "an update": update,
        "run": updates if config.max_steps > 0 else f"{config.num_train_epochs:g} epochs",
        "rollouts by": rollouts,
        "learning rate": f"{config.learning_rate:g} ({config.lr_scheduler_type.value}), {config.optim.value}",
    }


def _missing_here(
    config: RunConfig, mixture: DatasetMixtureConfig, script: CPPOScriptArguments, layout: Layout
) -> list[str]:
    """What the run needs and is missing on this machine only."""
    notes = missing_packages(config, layout.sharding)
    if config.bf16 and not (torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)):
        notes.append("bf16=true: no GPU on this machine supports it; the training machine must")
    for name in dataset_names(script, mixture):
        if not os.path.exists(name):
            notes.append(f"dataset {name!r} is not on this machine: on the Hub, or made by cppo-trl prepare-data")
    return notes


def _refusals(script: CPPOScriptArguments, config: RunConfig, mixture: DatasetMixtureConfig) -> Iterator[str]:
    """What `train` would refuse, as far as it is known without the Hub."""
    checks: list[partial[Any]] = [partial(import_object, path, "reward_funcs") for path in script.reward_funcs]
    if script.eval_benchmarks:
        checks.append(partial(check_benchmarks, script.eval_benchmarks))
    checks.append(partial(checkpoint_to_resume, config.output_dir, config.resume_from_checkpoint, False))
    if all(map(os.path.exists, dataset_names(script, mixture))):
        checks.append(partial(load_data, script, config, mixture))
    for check in checks:
        try:
            check()
        except ValueError as error:
            yield str(error)


def _conflicts(
    config: RunConfig, model: ModelConfig, layout: Layout, architecture: PretrainedConfig | None
) -> Iterator[str]:
    """Settings that exclude each other, the model, or the layout."""
    if not model.model_name_or_path:
        yield "model_name_or_path must name a model on the Hub or a local directory"
    if not isinstance(config, CPPOConfig):
        context, longest = getattr(architecture, "max_position_embeddings", None), config.max_completion_length
        if context is not None and longest >= context:
            yield f"max_completion_length={longest} exceeds the model's context of {context}: lower it"
        if layout.sharding.startswith("zero"):
            yield f"TRL's async trainer knows DDP and FSDP2, not {layout.sharding}: use --accelerate_config fsdp2"
        return
    length, completion = config.vllm_max_model_length, config.max_completion_length
    if config.use_vllm and length is not None and completion >= length:
        yield f"vllm_max_model_length={length} leaves no room for a prompt beside max_completion_length={completion}"
    if (held := server_topk_bytes(config)) > MOST_SERVER_TOPK:
        tokens = config.generation_batch_size * completion
        yield (
            f"Top-K of a vLLM server: {held / tokens:,.0f} bytes of Python objects a token (measured) are up to "
            f"{held / 2**30:.0f} GiB in each process for {tokens:,} tokens: set cppo_topk_source to policy"
        )
    if config.use_vllm and layout.sharding == "zero3" and not config.ds3_gather_for_generation:
        yield "ds3_gather_for_generation=false cannot be combined with vLLM: set it to true"
    parallel = config.vllm_tensor_parallel_size if config.use_vllm and config.vllm_mode == "colocate" else 1
    if layout.processes % parallel:
        yield f"vllm_tensor_parallel_size={parallel} does not divide {layout.processes} processes"
    if architecture is None:
        return
    context, heads = architecture.max_position_embeddings, architecture.num_attention_heads
    if (needed := max(length or 0, completion + 1)) > context:
        yield f"{needed} tokens exceed the model's context of {context}: lower max_completion_length"
    if heads % parallel:
        yield f"vllm_tensor_parallel_size={parallel} does not divide {heads} attention heads"
    if model.use_peft and config.cast_lm_head_to_fp32 and architecture.tie_word_embeddings:
        yield "cast_lm_head_to_fp32=true: TRL 1.16 fails on it with LoRA and tied word embeddings; set it to false"
