"""The dry run: what a recipe comes to on so many processes, and what cannot work, before anything is loaded."""

import argparse
import importlib.util
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from accelerate.commands.config.config_args import load_config_from_file
from transformers import AutoConfig
from trl import DatasetMixtureConfig, ModelConfig

from cppo_trl.config import CPPOConfig
from cppo_trl.launch.memory import (
    GIB,
    MODEL_SHAPES,
    OVERHEAD,
    SHARDINGS,
    Layout,
    Memory,
    ModelShape,
    Workload,
    estimate,
    vllm_minimum,
)
from cppo_trl.launch.training import CPPOScriptArguments, import_reward, parse_arguments

PROMPT_TOKENS = 1024
"""Longest prompt where ``vllm_max_model_length`` does not tell it: the authors' limit."""


@dataclass
class Plan:
    """What a run would do.

    Args:
        config: the checked configuration, as on ``layout.processes`` processes.
        layout: the processes.
        rows: the plan in words, row by row.
        memory: the estimate for one GPU, or None where it cannot be made.
        notes: what this machine lacks, and what is unusual.
        problems: what cannot work.
    """

    config: CPPOConfig
    layout: Layout
    rows: dict[str, str]
    memory: Memory | None = None
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def prompts_per_update(self) -> float:
        """Prompts of one optimizer step, the paper's minibatch."""
        return responses_per_update(self.config, self.layout) / self.config.num_generations

    def __str__(self) -> str:
        """The plan as a table, with notes and problems below."""
        rows = self.rows | (_memory_in_words(self.memory) if self.memory else {})
        width = max(map(len, rows))
        lines = ["CPPO plan: nothing was loaded", *(f"  {name:<{width}}  {text}" for name, text in rows.items())]
        lines += [f"  note: {note}" for note in self.notes]
        lines += [f"  problem: {problem}" for problem in self.problems]
        return "\n".join(lines)


def dry_run_parser() -> argparse.ArgumentParser:
    """The dry run's own flags; what else there is belongs to the recipe."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--dry_run", action="store_true", help="Say what the recipe comes to, and load nothing.")
    parser.add_argument("--num_processes", type=int, help="Processes; default: the Accelerate file's, else one.")
    parser.add_argument("--accelerate_config", help="Accelerate file: processes, and how the model lies over them.")
    parser.add_argument("--gpu_memory_gb", type=float, help="Refuse what does not fit such a card.")
    return parser


def dry_run(arguments: Sequence[str]) -> Plan:
    """The plan of a command line of ``scripts/train.py``, with the flags of `dry_run_parser`.

    Raises:
        ValueError: for a field that no dataclass knows, or a value that `CPPOConfig` or TRL refuses.
    """
    own, rest = dry_run_parser().parse_known_args(arguments)
    layout = read_layout(own.accelerate_config, own.num_processes)
    script, config, model, mixture = parse_arguments(rest, config_type=config_elsewhere(layout.processes))
    return make_plan(script, config, model, mixture, layout, own.gpu_memory_gb)


def config_elsewhere(processes: int) -> type[CPPOConfig]:
    """A `CPPOConfig` that checks itself as it would on another machine: so many processes, GPUs that know bf16.

    On this machine it takes the CPU, so no GPU is touched.
    """

    class ConfigElsewhere(CPPOConfig):
        world_size = processes

        def __post_init__(self) -> None:
            meant = {name: getattr(self, name) for name in ("use_cpu", "tf32")}
            self.use_cpu, self.tf32 = True, None
            super().__post_init__()
            for name, value in meant.items():
                setattr(self, name, value)

    return ConfigElsewhere


def read_layout(accelerate_config: str | None, processes: int | None) -> Layout:
    """The layout of an Accelerate file, or of a number of processes under DDP.

    Raises:
        ValueError: for a layout that the estimate does not know.
    """
    if accelerate_config is None:
        count = 1 if processes is None else processes
        return Layout(count, "none" if count == 1 else "ddp")
    cluster = load_config_from_file(accelerate_config)
    kind = cluster.distributed_type.value
    if kind == "DEEPSPEED":
        sharding = f"zero{cluster.deepspeed_config.get('zero_stage')}"
    elif kind == "FSDP":
        sharding = f"fsdp{cluster.fsdp_config.get('fsdp_version', 1)}"
    else:
        sharding = {"NO": "none", "MULTI_GPU": "ddp"}.get(kind, kind)
    if sharding not in SHARDINGS:
        raise ValueError(
            f"{accelerate_config}: {sharding} is not known to the dry run. Use DDP, ZeRO-2, ZeRO-3 or FSDP2."
        )
    in_file = 1 if sharding == "none" else cluster.num_processes
    count = in_file if processes is None else processes
    return Layout(count, "none" if sharding == "ddp" and count == 1 else sharding)


def make_plan(
    script: CPPOScriptArguments,
    config: CPPOConfig,
    model: ModelConfig,
    mixture: DatasetMixtureConfig,
    layout: Layout,
    gpu_memory_gb: float | None = None,
) -> Plan:
    """Check a parsed recipe against a layout and, where given, the memory of a GPU (a card's GB are GiB)."""
    shape = known_shape(model.model_name_or_path)
    plan = Plan(config, layout, _rows(script, config, model, layout, shape))
    plan.notes += _missing_here(script, config, mixture, layout)
    plan.problems += _problems(script, config, model, layout, shape)
    if shape is None:
        plan.notes.append(
            f"memory is not estimated: the shape of {model.model_name_or_path!r} is neither in "
            "cppo_trl.launch.memory nor in a local directory"
        )
    elif model.load_in_4bit or model.load_in_8bit:
        plan.notes.append("memory is not estimated: the weights are quantised")
    elif model.use_peft and shape.experts:
        plan.notes.append("memory is not estimated: adapters on a mixture of experts")
    else:
        plan.memory = _estimate(config, model, layout, shape, gpu_memory_gb)
        plan.problems += _memory_problems(plan.memory, config, shape, gpu_memory_gb)
    return plan


def known_shape(name: str | None) -> ModelShape | None:
    """The shape of a model of the table, or of a local directory with a ``config.json``; else None."""
    if name in MODEL_SHAPES:
        return MODEL_SHAPES[name]
    if name is None or not os.path.exists(os.path.join(name, "config.json")):
        return None
    config = AutoConfig.from_pretrained(name).get_text_config()
    experts = getattr(config, "num_experts", 0)
    return ModelShape(
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        feed_forward=config.moe_intermediate_size if experts else config.intermediate_size,
        vocabulary=config.vocab_size,
        context=config.max_position_embeddings,
        tied=config.tie_word_embeddings,
        experts=experts,
        active_experts=config.num_experts_per_tok if experts else 0,
    )


def responses_per_update(config: CPPOConfig, layout: Layout) -> int:
    """Responses of one optimizer step, over all processes."""
    return config.per_device_train_batch_size * layout.processes * config.gradient_accumulation_steps


def prompt_tokens(config: CPPOConfig) -> int:
    """Tokens that are left for the prompt."""
    length = config.vllm_max_model_length if config.use_vllm else None
    return length - config.max_completion_length if length else PROMPT_TOKENS


def _rows(
    script: CPPOScriptArguments, config: CPPOConfig, model: ModelConfig, layout: Layout, shape: ModelShape | None
) -> dict[str, str]:
    responses, per_update = config.generation_batch_size, responses_per_update(config, layout)
    size = f", {shape.parameters / 1e9:.2f} B parameters, context {shape.context}" if shape else ""
    method = f"LoRA, rank {model.lora_r}" if model.use_peft else "all weights trained"
    engine = "transformers generation"
    if config.use_vllm and config.vllm_mode == "server":
        engine = f"vLLM server at {config.vllm_server_base_url or config.vllm_server_host}"
    elif config.use_vllm:
        engine = (
            f"vLLM colocated, {config.vllm_gpu_memory_utilization:g} of each GPU, tensor parallel over "
            f"{config.vllm_tensor_parallel_size}, sleep mode {'on' if config.vllm_enable_sleep_mode else 'off'}"
        )
    rate = f"learning rate {config.learning_rate:g} ({config.lr_scheduler_type.value})"
    updates = f"{config.max_steps} updates = {config.max_steps / config.updates_per_rollout:g} rollouts"
    return {
        "model": f"{model.model_name_or_path}{size}; {method}, {model.dtype or 'float32'} weights",
        "data": f"{script.dataset_name}, split {script.dataset_train_split}",
        "processes": f"{layout.processes} ({layout.sharding})",
        **config.schedule(),
        "an update": f"{per_update / config.num_generations:g} prompts x {config.num_generations} responses = "
        f"{per_update} ({config.per_device_train_batch_size} x {layout.processes} processes x "
        f"{config.gradient_accumulation_steps} accumulated)",
        "run": updates if config.max_steps > 0 else f"{config.num_train_epochs:g} epochs",
        "tokens per rollout": f"at most {responses * config.max_completion_length:,} sampled, "
        f"{config.max_completion_length:,} a response at temperature {config.temperature:g}",
        "rollouts by": engine,
        "optimizer": f"{config.optim.value}, {rate}, weight decay {config.weight_decay:g}, "
        f"gradient norm {config.max_grad_norm:g}",
    }


def _missing_here(
    script: CPPOScriptArguments, config: CPPOConfig, mixture: DatasetMixtureConfig, layout: Layout
) -> list[str]:
    """What the run needs and this machine lacks: no fault of the recipe."""
    bf16_here = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    wanted = {"vllm": config.use_vllm, "deepspeed": layout.sharding.startswith("zero")}
    wanted |= dict.fromkeys(config.report_to, True)
    notes = [f"{name} is not installed here" for name, needed in wanted.items() if needed and not _installed(name)]
    if config.bf16 and not config.use_cpu and not bf16_here:
        notes.append("bf16=true, which no GPU here supports: the machine that trains must")
    if not mixture.datasets and not os.path.exists(script.dataset_name or ""):
        notes.append(
            f"dataset_name={script.dataset_name!r} is no directory here: sought on the Hub, or made by prepare_data.py"
        )
    if not config.updates_per_rollout.is_integer():
        notes.append(f"{config.updates_per_rollout:g} updates per rollout: some updates span two rollouts")
    return notes


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _problems(
    script: CPPOScriptArguments, config: CPPOConfig, model: ModelConfig, layout: Layout, shape: ModelShape | None
) -> list[str]:
    problems = []
    for path in script.reward_funcs:
        try:
            import_reward(path)
        except ValueError as error:
            problems.append(str(error))
    length = config.vllm_max_model_length
    if config.use_vllm and length is not None and config.max_completion_length >= length:
        problems.append(
            f"vllm_max_model_length={length} leaves no room for a prompt beside max_completion_length="
            f"{config.max_completion_length}"
        )
    if shape and (needed := max(length or 0, config.max_completion_length + 1)) > shape.context:
        problems.append(f"{needed} tokens exceed the model's context of {shape.context}: lower max_completion_length")
    if config.use_vllm and config.vllm_mode == "colocate":
        parallel = config.vllm_tensor_parallel_size
        if layout.processes % parallel:
            problems.append(f"vllm_tensor_parallel_size={parallel} does not divide {layout.processes} processes")
        if shape and shape.heads % parallel:
            problems.append(f"vllm_tensor_parallel_size={parallel} does not divide {shape.heads} attention heads")
    if config.use_vllm and layout.sharding == "zero3" and not config.ds3_gather_for_generation:
        problems.append("ds3_gather_for_generation=false cannot be combined with vLLM: set it to true")
    if not model.model_name_or_path:
        problems.append("model_name_or_path must name a model on the Hub or a local directory")
    if model.use_peft and config.cast_lm_head_to_fp32 and shape and shape.tied:
        problems.append(
            "cast_lm_head_to_fp32=true: TRL 1.16 fails on it with LoRA where the LM head is the embedding; set it to "
            "false"
        )
    return problems


def _estimate(
    config: CPPOConfig, model: ModelConfig, layout: Layout, shape: ModelShape, gpu_memory_gb: float | None
) -> Memory:
    adapters = shape.lora_parameters(model.lora_r, model.lora_target_modules) if model.use_peft else 0
    work = Workload(
        rows=config.per_device_train_batch_size,
        rollout_rows=math.ceil(config.generation_batch_size / layout.processes),
        prompt_tokens=prompt_tokens(config),
        completion_tokens=config.max_completion_length,
        weight_bytes=2 if model.dtype in ("bfloat16", "float16", "auto") else 4,
        lora_parameters=adapters,
        checkpointing=config.gradient_checkpointing,
        fp32_head=config.cast_lm_head_to_fp32,
        topk=config.cppo_topk if config.uses_topk else 0,
    )
    engine = None
    if config.use_vllm and config.vllm_mode == "server":
        engine = 0.0
    elif config.use_vllm:
        engine = vllm_minimum(shape, config.vllm_tensor_parallel_size, work.tokens)
        if gpu_memory_gb:
            engine = config.vllm_gpu_memory_utilization * gpu_memory_gb * GIB
    return estimate(
        shape, layout, work, engine=engine, engine_stays=config.use_vllm and not config.vllm_enable_sleep_mode
    )


def _memory_in_words(memory: Memory) -> dict[str, str]:
    def parts(sizes: dict[str, float]) -> str:
        return ", ".join(f"{name} {size / GIB:.1f}" for name, size in sizes.items())

    return {
        "GiB of a GPU, estimated": f"{memory.peak / GIB:.0f} ({memory.update_peak / GIB:.0f} in an update, "
        f"{memory.rollout_peak / GIB:.0f} in a rollout)",
        "  states": parts(memory.states),
        "  update": parts({**memory.update, "kept rollout": memory.rollout}),
        "  other": parts({"generation": memory.engine, "CUDA context and workspaces": OVERHEAD}),
    }


def _memory_problems(memory: Memory, config: CPPOConfig, shape: ModelShape, gpu_memory_gb: float | None) -> list[str]:
    if gpu_memory_gb is None:
        return []
    problems = []
    generating = "vllm_gpu_memory_utilization" if config.use_vllm else "generation_batch_size (or use vLLM)"
    for what, peak, mend in (
        ("an update", memory.update_peak, "per_device_train_batch_size, or turn vllm_enable_sleep_mode on"),
        ("a rollout", memory.rollout_peak, generating),
    ):
        if peak > gpu_memory_gb * GIB:
            problems.append(
                f"{what} needs about {peak / GIB:.0f} GiB of {gpu_memory_gb:g}: shard over more GPUs, use LoRA, or "
                f"lower {mend}"
            )
    if config.use_vllm and config.vllm_mode == "colocate":
        parallel, tokens = config.vllm_tensor_parallel_size, prompt_tokens(config) + config.max_completion_length
        needed = vllm_minimum(shape, parallel, tokens)
        if memory.engine < needed:
            problems.append(
                f"vLLM needs at least {needed / GIB:.1f} GiB of each GPU: raise vllm_gpu_memory_utilization above "
                f"{needed / GIB / gpu_memory_gb:.2f}"
            )
    return problems
