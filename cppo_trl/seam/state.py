"""What the trainer's hooks pass to one another, by lifetime: a rollout, one loss, one update."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from cppo_trl.config import CPPOConfig
from cppo_trl.divergence import ESTIMATORS, anchor_logps
from cppo_trl.metrics import add_records, count_nonfinite_loss, loss_record, total_over_processes
from cppo_trl.seam.topk import EngineTopK, HeadTap
from cppo_trl.trust_region import Verdict


class Rollout:
    """A rollout while TRL generates and scores it; what the updates need of it goes into TRL's batch.

    Args:
        config: the trainer's configuration.
        step: updates made so far.
        process: index of this process.
    """

    def __init__(self, config: CPPOConfig, step: int, process: int) -> None:
        self._config, self._step, self._process = config, step, process
        self._scored: tuple[Tensor, HeadTap] | None = None  # log μ, and the Top-K read off the same pass

    def score(self, compute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The rollout policy's pass over its responses, which also yields the likeliest tokens for Top-K."""
        if not self._config.uses_topk:
            return compute(*args, **kwargs)
        call = inspect.signature(compute).bind(*args, **kwargs).arguments
        with HeadTap(call, k=self._config.cppo_topk) as tap:
            result = compute(*args, **kwargs)
        self._scored = (result[0], tap)
        return result

    def complete(self, batch: dict[str, Any], engine_topk: EngineTopK | None) -> None:
        """Make the batch hold the anchor log μ, Top-K, and what identifies its responses.

        Adds ``sampled_at``, the updates made when the responses were sampled, and ``response_ids``, ``(B,)`` int64;
        where Top-K is the trained model's own, also ``topk_sampled``, its ``(B, T)`` log-probs of the sampled tokens.

        Raises:
            RuntimeError: if Top-K was read off another pass than the anchor.
        """
        scored = batch.get("old_per_token_logps")
        if "sampling_per_token_logps" in batch:
            batch["old_per_token_logps"] = batch.pop("sampling_per_token_logps")
        if engine_topk is not None:
            batch["topk_ids"], batch["topk_logps"] = engine_topk.take(batch["completion_ids"])
        elif self._scored is not None:
            logps, tap = self._scored
            if scored is not logps:
                raise RuntimeError("Top-K log-probs were read off another pass than the rollout policy's.")
            batch["topk_ids"], batch["topk_logps"], batch["topk_sampled"] = tap.ids, tap.logps, logps
        if "topk_ids" in batch:  # the sampled token is listed separately
            is_sampled = batch["topk_ids"] == batch["completion_ids"].unsqueeze(-1)
            batch["topk_logps"].masked_fill_(is_sampled, -math.inf)
        seed = hash((self._config.seed, self._step, self._process)) % 2**62  # the same after a resume
        rows = batch["completion_ids"]
        batch["response_ids"] = torch.arange(seed, seed + len(rows), device=rows.device)
        batch["sampled_at"] = torch.tensor(self._step)


def skip_zero_std_prompts(
    batch: dict[str, Any], accelerator: Accelerator, num_generations: int, loss_type: str
) -> None:
    """Take the responses to prompts whose responses all score alike out of the masks and of the loss's normalizer.

    Args:
        batch: a rollout of TRL's, changed in place.
        accelerator: the trainer's accelerator.
        num_generations: responses to each prompt.
        loss_type: the trainer's; advantages are scaled up for one that divides by the number of responses.
    """
    gather, own = accelerator.gather, batch["advantages"]
    groups = gather(own).view(-1, num_generations)
    alike = (groups == groups[:, :1]).all(-1, keepdim=True).expand_as(groups).flatten()
    skipped = alike.view(accelerator.num_processes, -1)[accelerator.process_index]
    batch["completion_mask"] = batch["completion_mask"] * ~skipped.unsqueeze(-1)
    batch["num_items_in_batch"] = gather((batch["completion_mask"] * batch.get("tool_mask", 1)).sum()).sum()
    if loss_type in ("grpo", "dr_grpo"):
        batch["advantages"] = own * (len(alike) / (~alike).sum().clamp(min=1))


class Loss:
    """One call of TRL's loss: D_t as soon as log π is known, then the rule's verdict.

    Args:
        inputs: TRL's batch; it is copied, as the anchor is rewritten.
        config: the trainer's configuration.

    Attributes:
        batch: the batch for TRL's loss.
        divergence: ``(B, T)`` D_t, once `measure` has run.
        log_ratio: ``(B, T)`` log ρ_t, likewise.
        verdict: the rule's, once `judge` has run.
    """

    divergence: Tensor
    log_ratio: Tensor
    advantages: Tensor
    mask: Tensor

    def __init__(self, inputs: dict[str, Any], config: CPPOConfig) -> None:
        self.batch, self._config = dict(inputs), config
        self.verdict: Verdict | None = None
        self._topk_mass: Tensor | None = None

    def measure(self, compute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The pass that computes log π, and the divergence from μ.

        Raises:
            RuntimeError: if log π is not fp32: its rounding would count as divergence.
        """
        rollout_logps, ids = self.batch.get("old_per_token_logps"), self.batch.get("topk_ids")
        tap = None
        if ids is None:
            result = compute(*args, **kwargs)
        else:
            with HeadTap(inspect.signature(compute).bind(*args, **kwargs).arguments, ids=ids) as tap:
                result = compute(*args, **kwargs)
        logps = result[0].detach()
        if logps.dtype != torch.float32:
            raise RuntimeError(
                f"The log-probs of the policy are {logps.dtype}, not fp32: leave out mixed_precision_policy."
            )
        anchor = self.batch["old_per_token_logps"] = anchor_logps(logps, rollout_logps)
        self.log_ratio = logps - anchor
        estimator = ESTIMATORS[str(self._config.cppo_divergence)]
        if not self._config.uses_topk:
            self.divergence = estimator(logps, anchor)
        elif tap is None:  # TRL skips the rollout policy's pass where π = μ
            self.divergence = torch.zeros_like(anchor)
        else:
            sampled = self.batch.get("topk_sampled", rollout_logps)  # log μ by those who list the others
            assert sampled is not None  # Top-K comes with it
            sampled = sampled.unsqueeze(-1)
            others = self.batch["topk_logps"].masked_fill(sampled.isnan(), math.nan)
            listed = torch.cat([logps.unsqueeze(-1), tap.logps], -1)
            rollout_listed = torch.cat([sampled, others], -1)
            self.divergence = estimator(listed, rollout_listed)
            self._topk_mass = rollout_listed.exp().sum(-1).nan_to_num(nan=0.0)
        return result

    def judge(self, advantages: Tensor, mask: Tensor) -> Tensor:
        """The weight of each token's -ρ_t Â_t under the trust region, ``(B, T)`` fp32.

        Raises:
            RuntimeError: if the loss was judged before.
        """
        if self.verdict is not None:
            raise RuntimeError("The trust region was applied twice in one loss. Install trl>=1.16,<1.17 unpatched.")
        self.advantages, self.mask = advantages, mask
        ids = self.batch.get("response_ids")
        self.verdict = self._config.judge(self.divergence, advantages, self.log_ratio, mask, response_ids=ids)
        return self.verdict.weight

    @property
    def judged(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Verdict]:
        """D_t, advantages, log ρ_t, mask and verdict.

        Raises:
            RuntimeError: if TRL's loss did not apply the rule.
        """
        if self.verdict is None:
            raise RuntimeError(
                "The trust region was applied 0 times in one loss, expected once. Install trl>=1.16,<1.17 unpatched."
            )
        return self.divergence, self.advantages, self.log_ratio, self.mask, self.verdict

    def record(self, value: Tensor, step: int) -> Tensor:
        """What the rule did, as from `metrics.loss_record`.

        Args:
            value: value of the loss.
            step: updates made so far.
        """
        unmoved = bool(self.batch.get("sampled_at") == step)  # on the host
        record = loss_record(*self.judged, self._topk_mass, unmoved)
        count_nonfinite_loss(record, value)
        return record


class UpdateLedger:
    """The records of an update's micro-batches, summed on the device."""

    def __init__(self) -> None:
        self._record: Tensor | None = None

    def add(self, record: Tensor) -> None:
        """Add the record of a micro-batch."""
        self._record = add_records(self._record, record)

    def total(self, gather: Callable[[Tensor], Tensor]) -> list[float]:
        """The records of all processes: one collective and one wait for the device."""
        assert self._record is not None
        return total_over_processes(self._record, gather)
