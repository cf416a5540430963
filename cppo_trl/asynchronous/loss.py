"""One call of TRL's asynchronous loss under a trust region."""

from typing import Any

import torch
from torch import Tensor

from cppo_trl.asynchronous.config import AsyncCPPOConfig
from cppo_trl.asynchronous.samples import Rows, by_staleness
from cppo_trl.divergence import ESTIMATORS, anchor_logps
from cppo_trl.metrics import count_nonfinite_loss, fates, loss_record

TOLERANCE = 1e-4
"""Largest difference between TRL's loss and the surrogate, relative to the sum of the absolute terms."""


class PackedLoss:
    """TRL computes -ρ_t Â_t over the packed tokens; here each term gets the weight of the rule, in value and gradient.

    With its clip range set to infinity, TRL's loss is Σ -exp(log π_t - log μ_t) Â_t, divided by a number of tokens.
    The model that TRL calls is replaced by `forward`, whose log-probs have the value of log π_t and the gradient of
    weight_t log π_t. `finish` then puts the weighted value in place of TRL's.

    Args:
        inputs: TRL's batch for this process, one packed row.
        config: the trainer's configuration.
        step: updates made so far.

    Attributes:
        inputs: the batch for TRL's loss.
    """

    def __init__(self, inputs: dict[str, Any], config: AsyncCPPOConfig, step: int) -> None:
        self._config = config
        selected = inputs["token_index"] >= 0
        self._position, anchor = inputs["token_index"][selected], inputs["old_log_probs"][selected]
        self._advantages = inputs["advantages"][selected]
        self._rows = Rows(inputs["segment_id"][selected])
        self._rollout_logps = anchor.float()
        renumbered = torch.full_like(inputs["token_index"], -1)  # `forward` hands TRL an entry for each loss term
        renumbered[selected] = torch.arange(len(anchor), device=anchor.device)
        old = inputs["old_log_probs"].nan_to_num(nan=0.0)
        self.inputs = {**inputs, "token_index": renumbered, "old_log_probs": old}
        mask = self._rows.pad(torch.ones_like(self._rollout_logps))
        self._mask, self._staleness = mask, step - inputs["sampled_at"][0, : len(mask)]
        self._outputs: Any = None

    def forward(self, model: Any, **kwargs: Any) -> Any:
        """The model's pass, its log-probs gathered by loss term.

        Raises:
            RuntimeError: if TRL calls the model twice in one loss, or log π is not fp32.
        """
        if self._outputs is not None:
            raise RuntimeError("TRL called the model twice in one loss. Install trl>=1.16,<1.17 unpatched.")
        self._outputs = outputs = model(**kwargs)
        logps = outputs.log_probs.flatten()[self._position]
        if logps.dtype != torch.float32:
            raise RuntimeError(f"The log-probs of the policy are {logps.dtype}, not fp32: rounding would be drift.")
        self._judge(logps.detach())
        value = self._log_ratio + self.inputs["old_log_probs"][self.inputs["token_index"] >= 0]
        outputs.log_probs = value + self._weight * (logps - logps.detach())
        outputs.entropy = outputs.entropy.flatten()[self._position]
        return outputs

    @torch.no_grad()
    def _judge(self, logps: Tensor) -> None:
        pad, config = self._rows.pad, self._config
        anchor = anchor_logps(logps, self._rollout_logps)
        self._log_ratio = logps - anchor
        divergence = pad(ESTIMATORS[str(config.cppo_divergence)](logps, anchor))
        self._judged = (divergence, pad(self._advantages), pad(self._log_ratio), self._mask)
        self._verdict = config.judge(*self._judged, response_ids=torch.arange(len(self._mask), device=logps.device))
        self._weight = self._rows.flat(self._verdict.weight)

    def finish(self, loss: Tensor, tokens: float | Tensor, aux_coefficient: float) -> tuple[Tensor, Tensor]:
        """The loss with the weighted value, and how far TRL's was from the surrogate.

        Args:
            loss: TRL's, scalar.
            tokens: what TRL divides the sum over the tokens by.
            aux_coefficient: coefficient of the auxiliary loss of a mixture of experts, 0 without one.

        Returns:
            The loss, and |difference| relative to the sum of the absolute terms; above `TOLERANCE` TRL computes
            something else.
        """
        terms = -self._log_ratio.exp() * self._advantages / tokens
        aux = aux_coefficient * self._outputs.aux_loss.detach() if aux_coefficient else 0.0
        off = (loss.detach() - aux - terms.sum()).abs() / terms.abs().sum().clamp(min=1e-12)
        value = (self._weight * terms).sum() + aux
        return loss - loss.detach() + value, off.nan_to_num(nan=0.0)  # of a loss that is not finite, counted elsewhere

    @torch.no_grad()
    def record(self, loss: Tensor, off: Tensor, bins: int) -> Tensor:
        """What the rule did: `by_staleness`, flattened, then ``off``, then `metrics.loss_record`."""
        divergence, advantages, log_ratio, mask = self._judged
        record = loss_record(*self._judged, self._verdict)
        count_nonfinite_loss(record, loss)
        fate = fates(advantages, log_ratio, mask, self._verdict)
        masked = fate.by_threshold + fate.by_budget
        table = by_staleness(self._staleness, bins, divergence, log_ratio, mask, fate.active, masked)
        return torch.cat([table.flatten(), off.view(1), record])
