"""One update of two injected micro-batches, on as many processes as it is launched on; writes what it saw.

Run by ``test_distributed.py`` through ``accelerate launch``, and in its own process for the comparison.
"""

import sys
from pathlib import Path

import torch

from cppo_trl import CPPOConfig, CPPOTrainer
from cppo_trl.data import arithmetic
from tests.conftest import COMPLETION, digit_reward, injected_batch, tiny_data, tiny_model
from tests.test_topk import with_topk

ROWS = 8  # of one micro-batch, over all processes


def rule_fields(case):
    loss_type, divergence, rule = case.split("-")
    fields = {"loss_type": loss_type, "cppo_divergence": divergence, "trust_region": rule, "cppo_delta": 0.05}
    return {**fields, "cppo_topk": 4} if divergence.startswith("topk") else fields


def run(case, output_dir):
    config = CPPOConfig(
        str(output_dir),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_generations=4,
        max_completion_length=COMPLETION,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        **rule_fields(case),
    )
    trainer = CPPOTrainer(
        tiny_model(), digit_reward, config, train_dataset=tiny_data(), processing_class=arithmetic.tokenizer()
    )
    accelerator = trainer.accelerator
    batches = [injected_batch(trainer.model, rows=ROWS, seed=seed) for seed in (1, 2)]
    if config.uses_topk:
        batches = [with_topk(trainer.model, batch, config.cppo_topk)[0] for batch in batches]
    tokens = sum(b["num_items_in_batch"] for b in batches)
    model = accelerator.prepare(trainer.model.train())
    trainer.current_gradient_accumulation_steps = 2
    share = ROWS // accelerator.num_processes
    rows = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    loss = torch.zeros(())
    for last, batch in enumerate(batches):
        local = {k: v[rows] if v.dim() else v for k, v in batch.items()}
        local["num_items_in_batch"] = tokens * config.steps_per_generation // 2  # of the whole rollout
        accelerator.gradient_state._set_sync_gradients(bool(last))
        with accelerator.no_sync(model) if not last else torch.enable_grad():
            micro = trainer._compute_loss(model, local)
            micro.backward()
        loss += accelerator.gather(micro.detach().reshape(1)).mean()
    gradients = {n: p.grad for n, p in accelerator.unwrap_model(model).named_parameters()}
    metrics = {k: v for k, v in trainer._metrics["train"].items() if k.startswith("cppo/")}
    return {"loss": loss, "gradients": gradients, "metrics": metrics, "type": str(accelerator.distributed_type)}


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    for name in sys.argv[2:]:
        result = run(name, directory)
        if torch.distributed.get_rank() == 0:
            torch.save(result, directory / f"{name}.pt")
    torch.distributed.destroy_process_group()
