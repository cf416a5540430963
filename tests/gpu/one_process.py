"""A short bf16 run under one layout, launched by ``test_runs.py``; writes its log and weights."""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from cppo_trl import CPPOConfig, CPPOTrainer
from cppo_trl.data import arithmetic
from tests.conftest import SMALL_RUN, digit_reward, tiny_data
from tests.gpu.conftest import DEVICE


def main(layout, model, directory):
    fields = {**SMALL_RUN, "use_cpu": DEVICE.type == "cpu", "bf16": True, "cast_lm_head_to_fp32": True}
    config = CPPOConfig(
        str(directory),
        cppo_divergence="topk_tv",
        cppo_topk=4,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=12,
        steps_per_generation=2,
        learning_rate=1e-3,
        max_steps=4,
        model_init_kwargs={"dtype": "float32"},
        **fields,
    )
    if layout == "fsdp2" and DEVICE.type == "cpu":  # Accelerate 1.15 shards on GPUs alone
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    trainer = CPPOTrainer(
        str(model), digit_reward, config, train_dataset=tiny_data(), processing_class=arithmetic.tokenizer()
    )
    assert trainer.accelerator.is_fsdp2 == (layout == "fsdp2")
    plugin = trainer.accelerator.state.deepspeed_plugin
    assert plugin is None or layout == f"zero{plugin.zero_stage}"
    trainer.train()
    assert {isinstance(parameter, DTensor) for parameter in trainer.model.parameters()} == {layout == "fsdp2"}
    trainer.save_model()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    torch.save({"log": log, "model": load_file(directory / "model.safetensors")}, directory / "results.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
