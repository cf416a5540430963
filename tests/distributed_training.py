"""Training runs on injected rollouts, on as many processes as it is launched on; writes what it saw.

Run by ``test_distributed.py`` through ``accelerate launch``, and in its own process for the comparison.
"""

import math
import os
import sys
from contextlib import suppress
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, gather_object
from peft import LoraConfig
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from trl.trainer import grpo_trainer as host

from cppo_trl import CPPOConfig, CPPOTrainer
from cppo_trl.data import arithmetic
from cppo_trl.output.checkpoints import RunError
from cppo_trl.output.nonfinite import _own_share, require_finite
from cppo_trl.rewards import AccuracyReward, checker
from tests.conftest import COMPLETION, SMALL_RUN, digit_reward, full_logps, injected_batch, tiny_data, tiny_model
from tests.rewards.conftest import HANGING

with suppress(ImportError):
    import deepspeed

PROCESSES, MICRO_BATCH, ACCUMULATION, MICRO_BATCHES = 2, 3, 2, 4  # rows of a process, per update, per rollout
ROWS = PROCESSES * MICRO_BATCH * MICRO_BATCHES  # of a rollout: three groups of 8, the middle one on both processes
EMPTY = [1, *range(15, 18)]  # one response of process 0, a whole micro-batch of process 1
TYPES = {"one": "NO", "ddp": "MULTI_CPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}  # by layout
CASES = {
    "dr_grpo-binary_tv": {},
    "dapo-binary_kl-beta-skip": {
        "loss_type": "dapo",
        "cppo_divergence": "binary_kl",
        "beta": 0.1,
        "skip_zero_std_prompts": True,
    },
    "dapo-topk_tv": {"loss_type": "dapo", "cppo_divergence": "topk_tv", "cppo_topk": 4, "save_strategy": "steps"},
    "grpo-soft-capped-lora": {"loss_type": "grpo", "trust_region": "cppo_soft", "cppo_ratio_cap": 1.2, "beta": 0.1},
    "grpo-trm_max-topk_kl-policy-skip": {
        "loss_type": "grpo",
        "trust_region": "trm_max",
        "cppo_delta": 0.2,
        "cppo_topk": 4,
        "cppo_topk_source": "policy",
        "skip_zero_std_prompts": True,
    },
}
BF16 = {"loss_type": "dapo", "bf16": True, "cast_lm_head_to_fp32": True}
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")


def rollout(number):
    """Prompts, responses and an engine's log-probs of all processes; the same on each."""
    batch = injected_batch(tiny_model(), rows=ROWS, seed=number)
    lengths = batch["completion_mask"].sum(1).clamp(min=1)
    batch["completion_ids"].masked_fill_(batch["completion_ids"] == 1, 2)
    batch["completion_ids"][torch.arange(ROWS), lengths - 1] = 1  # all end ...
    batch["completion_ids"][EMPTY, lengths[EMPTY] - 1] = 2  # ... but these, which are taken out as truncated
    if number:  # the middle group all scores alike
        batch["completion_ids"][8:16] = batch["completion_ids"][8]
        lengths[8:16] = lengths[8]
    noise = torch.randn(ROWS, COMPLETION, generator=torch.Generator().manual_seed(number)) * 0.1
    with torch.no_grad():
        logps = full_logps(tiny_model(), batch) + noise
    return [
        (prompt.tolist(), answer[:length].tolist(), logp[:length].tolist())
        for prompt, answer, length, logp in zip(
            batch["prompt_ids"], batch["completion_ids"], lengths, logps, strict=True
        )
    ]


def in_minibatches(rows):
    """Stand-in for TRL's shuffle: micro-batch i holds every process's rows of its own micro-batch i."""
    count = len(rows["completion_ids"])
    processes = count // (MICRO_BATCH * MICRO_BATCHES)
    order = torch.arange(count).view(processes, MICRO_BATCHES, MICRO_BATCH).transpose(0, 1).flatten()
    return {name: value[order] if value.dim() else value for name, value in rows.items()}


class Injected(CPPOTrainer):
    """Takes its share of the prepared rollouts, and keeps what the rule gives."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.weights = []

    def _tokenize_prompts(self, prompts):
        number, share = self.state.global_step * ACCUMULATION // MICRO_BATCHES, len(prompts)
        first = self.accelerator.process_index * share
        self.rows = rollout(number)[first : first + share]
        return [prompt for prompt, _, _ in self.rows], None, {}

    def _generate_single_turn(self, *args, **kwargs):
        answers, logps = [answer for _, answer, _ in self.rows], [logp for _, _, logp in self.rows]
        return answers, None if self.args.uses_topk and not self.args.topk_of_policy else logps

    def get_off_policy_mask(self, **inputs):
        weight = super().get_off_policy_mask(**inputs)
        both = self.accelerator.pad_across_processes(torch.stack([weight * inputs["mask"], inputs["mask"]], -1), dim=1)
        self.weights.append(self.accelerator.gather(both))
        return weight


def whole(weight):
    """A parameter that FSDP2 or ZeRO-3 may have sharded."""
    if isinstance(weight, DTensor):
        return weight.full_tensor()
    if hasattr(weight, "ds_tensor"):
        with deepspeed.zero.GatheredParameters(weight):
            return weight.detach().clone()
    return weight


class HeadErrors(Injected):
    """Keeps how far log π is from an fp32 head on the hidden states of its pass, and what bf16 would make of it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.errors, self.rounding, self.hidden = [], [], None
        module = self.accelerator.unwrap_model(self.model)
        module.model.norm.register_forward_hook(lambda norm, args, output: setattr(self, "hidden", output.detach()))
        self.head = module.lm_head

    def get_off_policy_mask(self, **inputs):
        logps, length = inputs["per_token_logps"].detach(), self.max_completion_length
        assert logps.dtype == torch.float32
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            logits = self.hidden.float()[:, -length - 1 : -1] @ whole(self.head.weight).float().T
            ids = self._loss.batch["completion_ids"].unsqueeze(-1)
            full = logits.log_softmax(-1).gather(-1, ids).squeeze(-1)
        own = inputs["mask"].bool()
        self.errors += (logps - full)[own].abs().tolist()
        self.rounding += (logps.bfloat16() - full)[own].abs().tolist()
        return super().get_off_policy_mask(**inputs)


def make(case, model, output_dir, layout):
    world = 1 if layout == "one" else PROCESSES
    fields = BF16 if case == "bf16" else CASES[case]
    fields = {"learning_rate": 1e-2, "loss_type": "dr_grpo", "cppo_delta": 0.05, **fields}
    config = CPPOConfig(
        str(output_dir),
        per_device_train_batch_size=MICRO_BATCH * PROCESSES // world,
        gradient_accumulation_steps=ACCUMULATION,
        steps_per_generation=MICRO_BATCHES,
        num_generations=8,
        max_completion_length=COMPLETION,
        mask_truncated_completions=True,
        max_grad_norm=0.1,
        max_steps=4,
        adam_epsilon=1e-5,  # Adam would blow the rounding of a vanishing gradient up to a whole step
        save_steps=2,
        model_init_kwargs={"dtype": "float32"},
        **{**SMALL_RUN, **fields},
    )
    if layout == "fsdp2":  # Accelerate 1.15 shards on GPUs alone: call this group one of GPUs until it has chosen
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    torch.manual_seed(0)  # of the adapters
    trainer = (HeadErrors if case == "bf16" else Injected)(
        str(model),
        digit_reward,
        config,
        train_dataset=tiny_data(),
        processing_class=arithmetic.tokenizer(),
        peft_config=LORA if case.endswith("lora") else None,
    )
    accelerator = trainer.accelerator
    assert accelerator.distributed_type == TYPES[layout]
    assert accelerator.num_processes == world
    assert accelerator.is_fsdp2 == (layout == "fsdp2")
    if TYPES[layout] == "DEEPSPEED":
        assert layout == f"zero{accelerator.state.deepspeed_plugin.zero_stage}"
    return trainer


def run(case, model, output_dir, layout, resume=None):
    host.shuffle_sequence_dict = in_minibatches
    trainer = make(case, model, output_dir, layout)
    trainer.train(resume_from_checkpoint=resume)
    sharded = [isinstance(parameter, DTensor) for parameter in trainer.model.parameters()]
    assert set(sharded) == {layout == "fsdp2"}
    trainer.save_model(output_dir)
    trainer.accelerator.wait_for_everyone()
    return {
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "weights": trainer.weights,
        "model": load_file(Path(output_dir) / f"{'adapter_' * case.endswith('lora')}model.safetensors"),
    }


def grade_beside_a_stuck_answer(model, directory):
    """The rewards of a rollout in which process 0 has an answer that runs into the time limit."""
    trainer = make("dr_grpo-binary_tv", model, directory, "ddp")
    checker._BOOT = HANGING
    rank, reward, other_was_first = trainer.accelerator.process_index, AccuracyReward(time_limit=3.0), []
    reward([r"\boxed{\frac{2}{4}}"], ["1/2"])  # the workers are up
    trainer.accelerator.wait_for_everyone()

    def watched(completions, solution, **kwargs):
        rewards = reward(completions, solution)
        other_was_first.append((directory / f"graded-{1 - rank}").exists())
        (directory / f"graded-{rank}").touch()
        return rewards

    trainer.reward_funcs = [watched]
    completions = [r"\boxed{hang}" if rank == 0 else r"\boxed{\frac{3}{6}}", r"\boxed{\frac{2}{4}}"]
    rewards = trainer._calculate_rewards([{"solution": "1/2"}] * 2, [""] * 2, completions, [[1]] * 2)
    workers = {child.process.pid for child in checker.shared_checker()._children}
    return {
        "rewards": rewards.flatten().tolist(),
        "other_was_first": gather_object(other_was_first),
        "workers": gather_object([workers]),
    }


def refuse_weights_of_one_process(model, output_dir, layout):
    """What each process says of weights that only the last one knows to be NaN."""
    trainer = make("dr_grpo-binary_tv", model, output_dir, layout)
    trainer.train()
    require_finite(trainer.accelerator, trainer.model, 4)
    if trainer.accelerator.process_index == PROCESSES - 1:
        with torch.no_grad():
            shares = [_own_share(parameter) for parameter in trainer.model.parameters()]
            next(share for share in shares if share.numel()).view(-1)[0] = math.nan
    try:
        require_finite(trainer.accelerator, trainer.model, 4)
        said = "nothing"
    except RunError as error:
        said = str(error)
    return gather_object([said])


def run_in_bf16(model, output_dir, layout):
    trainer = make("bf16", model, output_dir, layout)
    trainer.train()
    policy = getattr(trainer.accelerator.state, "fsdp_plugin", None) and trainer.accelerator.state.fsdp_plugin
    return {
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "errors": gather_object(trainer.errors),
        "rounding": gather_object(trainer.rounding),
        "reduced_in": str(policy.mixed_precision_policy.reduce_dtype) if policy else None,
    }


def main(layout, model, directory):
    results = {}
    if os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16":
        results["bf16"] = run_in_bf16(model, directory / "bf16", layout)
        finish(results, directory)
        return
    for case, fields in CASES.items():
        results[case] = run(case, model, directory / case, layout)
        if "save_strategy" in fields:
            last = directory / case / "checkpoint-2"
            results["resumed"] = run(case, model, directory / "resumed", layout, str(last))
    results["refused"] = refuse_weights_of_one_process(model, directory / "refused", layout)
    if layout == "ddp":
        results["rewards"] = grade_beside_a_stuck_answer(model, directory)
    finish(results, directory)


def finish(results, directory):
    if torch.distributed.get_rank() == 0:
        torch.save(results, directory / "results.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    os._exit(0)  # torch's threads now and then abort the end of a process that has done its work
