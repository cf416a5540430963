"""Top-K log-probs of a policy without logits, read off TRL's fused LM head while a forward pass runs.

TRL scores the sampled tokens with a kernel that takes hidden states and the whole LM head (gathered, where FSDP2 or
ZeRO-3 shard it) and never holds a (B, T, V) tensor. `HeadTap` stands in for that kernel during one pass, runs it, and
takes its log-normalizer log Z from the autograd graph. What is left costs little:

* log π at K' given tokens is h·W_a - log Z for K' rows of the head (`ids` given: the training side);
* the K likeliest tokens take one more product with the head, in tiles as TRL's own, without a gradient (`k` given: the
  rollout side, where transformers generates).

Logits are rounded to the pass's compute dtype as TRL's own are, and scaled, soft-capped and divided by the
temperature by the same numbers, which TRL hands to the kernel.
"""

import inspect
from itertools import chain
from types import TracebackType
from typing import Any

import numpy as np
import torch
import trl.trainer.utils as host
from torch import Tensor

_TOKENS, _VOCABULARY = 4096, 32_768  # of a tile of logits, as TRL's own
_ELEMENTS = 2**24  # of the rows of the head that are gathered at once
_KERNEL = "hidden weight bias targets temperature chunk_size final_logit_softcapping logit_scale outputs".split()
_LOG_Z = 4  # place of log Z among the kernel's saved tensors


class HeadTap:
    """Context manager around one `_get_per_token_logps_and_entropies`: fills ``ids`` and ``logps``.

    Args:
        call: the arguments of that call by name (``input_ids``, ``attention_mask``, ``logits_to_keep`` = T,
            ``batch_size``).
        ids: ``(B, T, K')`` token ids to score; or
        k: how many of the likeliest tokens to find.

    Attributes:
        ids: ``(B, T, K')`` int32.
        logps: ``(B, T, K')`` fp32 log-probs; -inf where the completion is padded.

    Raises:
        RuntimeError: on leaving, if the pass did not go through TRL's kernel.
    """

    def __init__(self, call: dict[str, Any], *, ids: Tensor | None = None, k: int = 0) -> None:
        length = call["logits_to_keep"]
        self._valid = call["attention_mask"][:, -length:].bool()
        rows, self._k = len(self._valid), k
        self._batch_size, self._next_row = call.get("batch_size") or rows, 0
        self.ids = self._valid.new_zeros((rows, length, k), dtype=torch.int32) if ids is None else ids
        self.logps = torch.full(self.ids.shape, -torch.inf, device=self.ids.device)

    def __enter__(self) -> "HeadTap":
        self._kernel = host._ChunkedLogProbFunction
        host._ChunkedLogProbFunction = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        host._ChunkedLogProbFunction = self._kernel
        if kind is None and self._next_row != len(self._valid):
            raise RuntimeError(
                f"Top-K log-probs were read for {self._next_row} of {len(self._valid)} responses: the model does not "
                "use TRL's fused LM head. Use cppo_divergence='binary_tv', or an unpatched trl 1.16."
            )

    def apply(self, hidden: Tensor, *args: Any) -> Any:
        """Run TRL's kernel for the next rows of the batch, and read off the Top-K."""
        if torch.is_grad_enabled():
            outputs = self._kernel.apply(hidden, *args)
            log_z = outputs[0].grad_fn.saved_tensors[_LOG_Z]
        else:  # the same numbers, with a graph that is dropped at once
            with torch.enable_grad():
                recorded = self._kernel.apply(hidden.detach().requires_grad_(), *args)
            log_z = recorded[0].grad_fn.saved_tensors[_LOG_Z]
            outputs = tuple(None if x is None else x.detach() for x in recorded)
        with torch.no_grad():
            self._read(hidden, log_z, *args)
        return outputs

    def _read(
        self,
        hidden: Tensor,
        log_z: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        scale: float,
        outputs: Any,
    ) -> None:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        rows = slice(self._next_row, self._next_row + self._batch_size)
        valid = self._valid[rows]
        count, length = valid.shape
        self._next_row += count
        if host._use_triton(hidden.device):  # only valid tokens were scored: their places, in order and without a sync
            place = valid.logical_not().flatten().to(torch.uint8).argsort(stable=True)[: len(hidden)]
        else:  # every position was scored, prompts included
            hidden = hidden.view(count, -1, hidden.size(-1))[:, -length:].flatten(0, 1)
            log_z = log_z.view(count, -1)[:, -length:].flatten()
            place = torch.arange(len(hidden), device=hidden.device)
        ids, logps = self.ids[rows].flatten(0, 1), self.logps[rows].flatten(0, 1)  # views
        step = _TOKENS if self._k else max(1, _ELEMENTS // (ids.size(-1) * weight.size(-1)))
        for start in range(0, len(hidden), step):
            tile = slice(start, start + step)
            with torch.autocast(device, enabled=False):
                if self._k:
                    logits, ids[place[tile]] = likeliest(hidden[tile].to(dtype), weight, bias, self._k)
                else:
                    logits = self.chosen(hidden[tile].to(dtype), weight, bias, ids[place[tile]])
            logits = logits.float() * scale
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            logps[place[tile]] = logits / temperature - log_z[tile].unsqueeze(-1)
        self.logps[rows].masked_fill_(~valid.unsqueeze(-1), -torch.inf)

    @staticmethod
    def chosen(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
        """Logits of ``ids`` ``(N, K')``, from K' rows of the head for each hidden state ``(N, H)``."""
        logits = torch.einsum("nh,nkh->nk", hidden, weight[ids].to(hidden.dtype))
        return logits if bias is None else logits + bias[ids].to(hidden.dtype)


def likeliest(hidden: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits ``(N, k)`` of hidden states ``(N, H)`` and their int32 ids, by tiles of the vocabulary."""
    values, ids = [], []
    for start in range(0, len(weight), _VOCABULARY):
        tile = slice(start, start + _VOCABULARY)
        logits = hidden @ weight[tile].to(hidden.dtype).t()
        if bias is not None:
            logits += bias[tile].to(hidden.dtype)
        top = logits.topk(min(k, logits.size(-1)))
        values.append(top.values)
        ids.append(top.indices + start)
    best = torch.cat(values, -1).topk(k)
    return best.values, torch.cat(ids, -1).gather(-1, best.indices).int()


def check_kernel() -> None:
    """Run TRL's fused head on two tokens and compare log Z with its definition: a change of TRL's is loud.

    Raises:
        RuntimeError: if the kernel takes other arguments, or keeps log Z elsewhere.
    """
    kernel = host._ChunkedLogProbFunction
    found = list(inspect.signature(kernel.forward).parameters)[1:]
    hidden, weight = torch.eye(2, requires_grad=True), torch.tensor([[1.0, 2.0], [0.0, -1.0], [0.5, 0.0]])
    if found == _KERNEL:
        logps = kernel.apply(hidden, weight, None, torch.tensor([0, 1]), 0.5, 2, None, 1.0, ("entropy",))[0]
        saved = logps.grad_fn.saved_tensors
        if len(saved) > _LOG_Z and torch.allclose(saved[_LOG_Z], (weight.t() / 0.5).logsumexp(-1)):
            return
    raise RuntimeError(
        f"The fused LM head of the installed TRL takes {found}, expected {_KERNEL} and log Z among what it saves. "
        "Use cppo_divergence='binary_tv', or install trl>=1.16,<1.17."
    )


class EngineTopK:
    """Top-K log-probs of the rollout policy as vLLM returns them, kept beside TRL's rollout.

    TRL asks its engine for the sampled token's log-prob only, and takes the first of several for it. This wraps the
    engine's ``generate``: it asks for the ``k`` likeliest, keeps them, and hands TRL the sampled token's alone.

    Args:
        engine: TRL's ``VLLMGeneration``.
        k: how many of the likeliest tokens.
    """

    def __init__(self, engine: Any, k: int) -> None:
        self._generate, self._width = engine.generate, k + 1  # the sampled token comes on top where it is not likely
        self._ids: list[Tensor] = []
        self._logps: list[Tensor] = []
        engine.logprobs, engine.generate = k, self._record

    def _record(self, *args: Any, **kwargs: Any) -> Any:
        prompts, completions, logps, ids = self._generate(*args, **kwargs)
        sampled = []
        for tokens, token_ids, token_logps in zip(completions, ids, logps, strict=True):
            listed = np.arange(self._width) < np.fromiter(map(len, token_ids), int)[:, None]
            row_ids, row_logps = np.zeros(listed.shape, np.int32), np.full(listed.shape, -np.inf, np.float32)
            row_ids[listed] = np.fromiter(chain.from_iterable(token_ids), np.int32)
            row_logps[listed] = np.array(list(chain.from_iterable(token_logps)), np.float32)  # None is NaN
            is_sampled = row_ids == np.array(tokens, np.int32)[:, None]
            sampled.append(np.where(is_sampled, row_logps, -np.inf).max(-1, keepdims=True).tolist())
            self._ids.append(torch.from_numpy(row_ids))
            self._logps.append(torch.from_numpy(row_logps))
        return prompts, completions, sampled, None

    def take(self, completion_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Ids (int32) and log-probs (fp32) of the last rollout, ``(B, T, k + 1)``, right-padded with -inf.

        Raises:
            RuntimeError: if the engine was not asked once for each response.
        """
        if len(self._ids) != len(completion_ids):
            raise RuntimeError(f"vLLM's Top-K came for {len(self._ids)} of {len(completion_ids)} responses.")
        shape = (*completion_ids.shape, self._width)
        ids, logps = torch.zeros(shape, dtype=torch.int32), torch.full(shape, -torch.inf)
        for b, (row_ids, row_logps) in enumerate(zip(self._ids, self._logps, strict=True)):
            ids[b, : len(row_ids)], logps[b, : len(row_logps)] = row_ids, row_logps
        self._ids, self._logps = [], []
        return ids.to(completion_ids.device), logps.to(completion_ids.device)
