"""Top-K off a head that torch's FSDP2 shards over two gloo processes, against the whole model; run by torchrun."""

import os

import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from trl.trainer.utils import add_fused_lm_head

from cppo_trl.seam.topk import HeadTap
from tests.conftest import injected_batch, tiny_model, with_topk


def score(model, batch, **tap_arguments):
    """What `GRPOTrainer._get_per_token_logps_and_entropies` does with one batch."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    length = batch["completion_ids"].size(1)
    labels = ids.masked_fill(attention == 0, -100)
    labels[:, :-length] = -100
    call = {"input_ids": ids, "attention_mask": attention, "logits_to_keep": length}
    with HeadTap(call, **tap_arguments) as tap:
        output = model(input_ids=ids, attention_mask=attention, labels=labels, fused_lm_head=True)
    return output.log_probs[:, -length:], tap


def main():
    torch.distributed.init_process_group("gloo")
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    for tied in (False, True):
        whole, sharded = tiny_model(tie_word_embeddings=tied), tiny_model(tie_word_embeddings=tied)
        batch, _ = with_topk(whole, injected_batch(whole), k=4)
        for model in (whole, sharded):
            add_fused_lm_head(model, outputs=("log_probs", "entropy"))
        for layer in sharded.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        assert isinstance(sharded.lm_head.weight, DTensor)
        assert sharded.lm_head.weight.to_local().numel() < whole.lm_head.weight.numel()
        for arguments in ({"ids": batch["topk_ids"]}, {"k": 3}):
            expected_logps, expected = score(whole, batch, **arguments)
            logps, found = score(sharded, batch, **arguments)
            torch.testing.assert_close(logps, expected_logps)
            assert torch.equal(found.ids, expected.ids)
            torch.testing.assert_close(found.logps, expected.logps)
        logps.sum().backward()
        expected_logps.sum().backward()
        gradient = sharded.lm_head.weight.grad.full_tensor()
        torch.testing.assert_close(gradient, whole.lm_head.weight.grad, rtol=1e-4, atol=1e-5)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
    os._exit(0)  # torch's threads now and then abort the end of a process that has done its work
