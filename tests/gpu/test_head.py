"""Top-K read off TRL's fused head against full logits, on the device and by Triton's interpreter."""

import pytest
import torch
from trl.trainer.utils import add_fused_lm_head

from cppo_trl.seam.topk import HeadTap
from tests.conftest import tiny_model
from tests.gpu.conftest import DEVICE, INTERPRETED

VOCABULARY = 2_500 if INTERPRETED else 40_000  # more than a block of the kernel; more than a tile of the head
ROWS, PROMPT, LENGTH, K = 3, 4, 6, 20
PRECISIONS = {  # bf16 body, fp32 head; largest error of a log-prob in nats, per nat of the largest logit
    "fp32": (False, False, 2e-6),
    "bf16": (True, False, 2**-7),
    "bf16-fp32-head": (True, True, 2e-6),
}


@pytest.fixture(scope="module")
def text():
    torch.manual_seed(0)
    ids = torch.randint(2, VOCABULARY, (ROWS, PROMPT + LENGTH))
    attention = torch.ones_like(ids)
    attention[0, -2:], attention[1, :1] = 0, 0
    labels = ids.masked_fill(attention == 0, -100)
    labels[:, :PROMPT] = -100
    return ids.to(DEVICE), attention.to(DEVICE), labels.to(DEVICE)


@pytest.mark.parametrize("side", ["rollout", "training"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_topk_is_that_of_full_logits(precision, side, text):
    bf16, fp32_head, tolerance = PRECISIONS[precision]
    ids, attention, labels = text
    model = tiny_model(vocab_size=VOCABULARY).to(DEVICE)
    states = []
    model.model.norm.register_forward_hook(lambda norm, args, output: states.append(output.detach()))
    add_fused_lm_head(model, temperature=0.7, cast_lm_head_to_fp32=fp32_head, outputs=("log_probs", "entropy"))
    call = {"attention_mask": attention, "logits_to_keep": LENGTH}
    listed = torch.randint(0, VOCABULARY, (ROWS, LENGTH, K), dtype=torch.int32, device=DEVICE)
    tap = HeadTap(call, k=K) if side == "rollout" else HeadTap(call, ids=listed)
    with torch.set_grad_enabled(side == "training"), torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16), tap:
        output = model(ids, attention_mask=attention, labels=labels, fused_lm_head=True)
    logits = states[0][:, -LENGTH - 1 : -1].double() @ model.lm_head.weight.detach().double().T / 0.7
    full, valid = logits.log_softmax(-1), attention[:, -LENGTH:].bool()
    tolerance *= logits.abs().max().item()
    read, chosen = tap.logps.double()[valid], full.gather(-1, tap.ids.long())[valid]
    torch.testing.assert_close(read, chosen, rtol=0, atol=tolerance)
    assert (tap.logps[~valid] == -torch.inf).all()
    if side == "rollout":
        best = full.topk(K).values[valid]
        torch.testing.assert_close(read.sort(descending=True).values, best, rtol=0, atol=tolerance)
    sampled = full.gather(-1, ids[:, -LENGTH:, None])[..., 0][valid]
    torch.testing.assert_close(output.log_probs[:, -LENGTH:][valid].double(), sampled, rtol=0, atol=tolerance)
    assert output.log_probs.dtype == torch.float32
    assert full.exp().max() > 100 / VOCABULARY  # peaked, so that a wrong token would show
