"""A few responses of an update, token by token: what the trust region saw and what it decided."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cppo_trl.metrics import fates
from cppo_trl.output.run_files import FATES
from cppo_trl.trust_region import Verdict

RESPONSES, RESPONSE_TOKENS, PROMPT_TOKENS = 4, 1024, 256
"""At most so many responses of a batch are kept, so many first tokens of each, and so many last ones of its prompt."""


@torch.no_grad()
def token_records(
    batch: dict[str, Any],
    divergence: Tensor,
    advantages: Tensor,
    log_ratio: Tensor,
    mask: Tensor,
    verdict: Verdict,
    decode: Callable[[list[list[int]]], list[str]],
) -> list[dict[str, Any]]:
    """Records for `run_files.append_tokens` of the responses with the most masked tokens, by one copy to the host.

    Args:
        batch: the loss's inputs, with ``prompt_ids``, ``prompt_mask`` and ``completion_ids``.
        divergence: ``(B, T)`` D_t.
        advantages: ``(B, 1)`` or ``(B, T)``.
        log_ratio: ``(B, T)`` log ρ_t.
        mask: ``(B, T)``, 1 on the responses' tokens.
        verdict: verdict of the rule.
        decode: texts of lists of token ids, as a tokenizer's ``batch_decode``.

    Returns:
        ``response`` (counted from 0), ``prompt`` and ``text`` (of each token), ``length`` of the whole response,
        ``advantage``, ``fate`` (place in `FATES` of each token), and, exact to the last bit of fp32, ``divergence``,
        ``ratio`` and ``weight`` (of the surrogate); for a rule with position weights also ``position_weight`` w_t,
        ``threshold`` c_t, ``spent`` S_t, ``weight_sum`` W_t and, where there is a budget, ``delta_b``.
    """
    fate = _fate_codes(advantages, log_ratio, mask, verdict)
    columns = {"id": batch["completion_ids"], "advantage": advantages, "fate": fate, "divergence": divergence}
    columns |= {"ratio": log_ratio.float().exp(), "weight": verdict.weight}
    if verdict.prefix is not None:
        prefix = verdict.prefix
        columns |= {"position_weight": prefix.weights, "threshold": prefix.threshold}
        columns |= {"spent": prefix.spent(), "weight_sum": prefix.weight_sum()}
    if verdict.delta_b is not None:
        columns["delta_b"] = verdict.delta_b
    masked = (fate == FATES.index("threshold")) | (fate == FATES.index("budget"))
    # one masked token outweighs any length; among equals the longer response
    rows = (masked.sum(-1) * mask.size(-1) + mask.sum(-1)).topk(min(RESPONSES, len(mask))).indices
    width = min(mask.size(-1), RESPONSE_TOKENS)
    last = (mask.bool() * torch.arange(1, mask.size(-1) + 1, device=mask.device)).amax(-1, keepdim=True)
    prompts = batch["prompt_ids"].masked_fill(batch["prompt_mask"] == 0, -1)[:, -PROMPT_TOKENS:]
    parts = [last, prompts, *(column.expand_as(mask)[:, :width] for column in columns.values())]
    packed = torch.cat([part.float()[rows] for part in parts], -1).cpu()  # ids are exact in fp32 below 2^24
    lengths, prompts, values = packed.split([1, prompts.size(-1), width * len(columns)], -1)
    records = []
    for row, length in enumerate(lengths.int().flatten().tolist()):
        if not length:
            continue
        table = dict(zip(columns, map(_shortest, values[row].unflatten(-1, (-1, width))[:, :length]), strict=True))
        texts = decode([[int(i)] for i in table.pop("id")] + [[int(i) for i in prompts[row] if i >= 0]])
        record = {"response": row, "prompt": texts.pop(), "text": texts, "length": length}
        record |= {name: table.pop(name)[0] for name in ("advantage", "delta_b") if name in table}  # of the response
        records.append(record | {"fate": [int(i) for i in table.pop("fate")]} | table)
    return records


def _shortest(values: Tensor) -> list[float]:
    """The shortest decimals that read back as the same fp32."""
    return values.numpy().astype(str).astype(float).tolist()


def _fate_codes(advantages: Tensor, log_ratio: Tensor, mask: Tensor, verdict: Verdict) -> Tensor:
    """Places in `FATES`, ``(B, T)``."""
    active, away, by_threshold, by_budget = (flags.bool() for flags in fates(advantages, log_ratio, mask, verdict))
    code = {name: at for at, name in enumerate(FATES)}
    codes = torch.where(away, code["within"], code["toward"])
    codes = codes.masked_fill(verdict.weight != 1, code["reweighted"])
    codes = codes.masked_fill(by_threshold, code["threshold"]).masked_fill(by_budget, code["budget"])
    return codes.masked_fill(~active, code["idle"]).masked_fill(~mask.bool(), code["foreign"])
