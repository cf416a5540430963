"""A few responses of an update, token by token: what the trust region saw and what it decided."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cppo_trl.metrics import fates
from cppo_trl.output.run_files import FATES
from cppo_trl.trust_region import Verdict

RESPONSES, RESPONSE_TOKENS, PROMPT_TOKENS = 4, 1024, 256
"""At most so many responses of a batch are kept, so many first tokens of each, and so many last ones of its prompt."""


class TokenTable(NamedTuple):
    """The kept responses on the host."""

    prompts: Any
    """``(R, P)`` token ids, -1 for padding"""
    columns: dict[str, Any]
    """by name, ``(R, T)`` fp32"""
    lengths: list[int]
    """of the whole responses"""


@torch.no_grad()
def token_table(
    batch: dict[str, Any],
    divergence: Tensor,
    advantages: Tensor,
    log_ratio: Tensor,
    mask: Tensor,
    verdict: Verdict,
) -> TokenTable:
    """Bring the responses with the most masked tokens to the host, in one copy.

    Args:
        batch: the loss's inputs, with ``prompt_ids``, ``prompt_mask`` and ``completion_ids``.
        divergence: ``(B, T)`` D_t.
        advantages: ``(B, 1)`` or ``(B, T)``.
        log_ratio: ``(B, T)`` log ρ_t.
        mask: ``(B, T)``, 1 on the responses' tokens.
        verdict: the rule's.

    Returns:
        The columns ``id``, ``advantage``, ``fate``, ``divergence``, ``ratio`` and ``weight`` (of the surrogate); for a
        rule with position weights also ``position_weight`` w_t, ``threshold`` c_t, ``spent`` S_t, ``weight_sum`` W_t
        and, where there is a budget, ``delta_b``.
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
    by_name = dict(zip(columns, values.unflatten(-1, (len(columns), width)).unbind(1), strict=True))
    return TokenTable(prompts.int(), by_name, lengths.int().flatten().tolist())


def token_records(table: TokenTable, decode: Callable[[list[list[int]]], list[str]]) -> list[dict[str, Any]]:
    """One record for each kept response that has tokens, for `run_files.append_tokens`.

    Args:
        table: as from `token_table`.
        decode: texts of lists of token ids, as a tokenizer's ``batch_decode``.

    Returns:
        ``response`` (counted from 0), ``prompt`` and ``text`` (of each token), ``length`` of the whole response,
        ``advantage``, ``fate`` (place in `FATES` of each token) and the other columns, exact to the last bit of fp32.
    """
    records = []
    for row, length in enumerate(table.lengths):
        columns = {name: _shortest(values[row, :length]) for name, values in table.columns.items()}
        if not length:
            continue
        ids, prompt = ([int(i) for i in x] for x in (columns.pop("id"), table.prompts[row]))
        texts = decode([[i] for i in ids] + [[i for i in prompt if i >= 0]])
        record = {"response": row, "prompt": texts.pop(), "text": texts, "length": length}
        for name in ("advantage", "delta_b"):  # one value for the whole response
            if name in columns:
                record[name] = columns.pop(name)[0]
        records.append(record | {"fate": [int(i) for i in columns.pop("fate")]} | columns)
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
