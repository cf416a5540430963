"""The table of rules: what the field ``trust_region`` may name, and which fields of `CPPOConfig` each rule reads.

A rule is a function of D_t, the advantages, log ρ_t and the mask (`trust_region`) that returns the weight of each
token. A new rule is such a function and a row of `RULES`; its keyword arguments are the fields ``cppo_<name>``.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from cppo_trl.trust_region import (
    Prefix,
    cispo_weight,
    cppo_mask,
    cppo_soft_weight,
    dppo_mask,
    grpo_mask,
    minpro_weight,
    no_mask,
    prefix_budget,
    prefix_sums,
    ratio_cap_weight,
    trm_avg_mask,
    trm_max_mask,
)

ESTIMATORS = ("binary_tv", "binary_kl", "topk_tv", "topk_kl")


class Verdict(NamedTuple):
    """What a rule decides over a batch."""

    weight: Tensor
    """``(B, T)`` fp32, the detached weight of each token's -ρ_t Â_t; 0 outside the mask"""
    within_threshold: Tensor | None
    """``(B, T)`` bool, w_t D_t <= δ: a token of weight 0 there is rejected by the budget. None: there is no budget"""
    delta_b: Tensor | None
    """``(B, 1)`` fp32, the prefix budget in force, or None where there is none"""
    prefix: Prefix | None
    """Position weights and prefix sums of a rule that has them, unless its δ is inf"""


@dataclass(frozen=True)
class Rule:
    """One row of the table.

    Args:
        weigh: ``(divergence, advantages, log_ratio, mask, **parameters) -> (B, T)`` weight or mask.
        source: the paper of the rule and of its defaults.
        parameters: fields of `CPPOConfig` that it reads, without their prefix ``cppo_``.
        estimators: what D_t may be, the default first; empty for a rule that does not read D_t.
        tv_defaults: parameters whose default is the rule's own, where D_t is a total variation or unread.
        kl_defaults: the same where D_t is a KL divergence.
    """

    weigh: Callable[..., Tensor]
    source: str
    parameters: tuple[str, ...]
    estimators: tuple[str, ...] = ()
    tv_defaults: Mapping[str, float] = field(default_factory=dict)
    kl_defaults: Mapping[str, float] = field(default_factory=dict)

    def defaults(self, estimator: str) -> Mapping[str, float]:
        """The rule's own defaults, by parameter, for an estimator of D_t."""
        return self.kl_defaults if estimator.endswith("kl") else self.tv_defaults

    def judge(
        self,
        divergence: Tensor,
        advantages: Tensor,
        log_ratio: Tensor,
        mask: Tensor,
        *,
        ratio_cap: float | None = None,
        **parameters: Any,
    ) -> Verdict:
        """Weigh a batch, with the budget of each response (Eq. 22) and the cap on the ratio.

        Args:
            divergence: ``(B, T)`` D_t >= 0.
            advantages: ``(B,)``, ``(B, 1)`` or ``(B, T)``.
            log_ratio: ``(B, T)`` log ρ_t.
            mask: ``(B, T)``, 1 on the responses' tokens.
            ratio_cap: C >= 1, or None.
            **parameters: values of ``self.parameters``.
        """
        within_threshold = budget = prefix = None
        if "delta_b" in parameters:
            quantile, multiple = (parameters.pop(f"delta_b_{name}") for name in ("quantile", "max_multiple"))
            if parameters["delta"] < math.inf:  # delta is the budget's slack
                if parameters["delta_b"] < math.inf:
                    budget = prefix_budget(divergence, mask, parameters["delta_b"], quantile, multiple)
                    parameters["delta_b"] = budget
                prefix = parameters["prefix"] = prefix_sums(divergence, mask, **parameters)
                within_threshold = None if budget is None else prefix.weighted <= parameters["delta"]
        weight = self.weigh(divergence, advantages, log_ratio, mask, **parameters).float()
        if ratio_cap is not None:
            weight = weight * ratio_cap_weight(log_ratio, ratio_cap)
        return Verdict(weight, within_threshold, budget, prefix)


_CPPO = "CPPO, arXiv 2606.10968"
_TRM = "TRM, arXiv 2512.23075"
_CPPO_PARAMETERS = "delta w_min delta_b delta_b_quantile delta_b_max_multiple shuffle_weights ratio_cap".split()
_CPPO_DEFAULTS = {"tv_defaults": {"delta": 0.15, "delta_b": 0.02}, "kl_defaults": {"delta": 0.1, "delta_b": 0.002}}
_KL_FIRST = ("topk_kl", "binary_kl", "topk_tv", "binary_tv")  # TRM is stated in the exact KL: Top-K is closest to it
_CLIP = ("ratio_min", "ratio_max")

RULES = {
    "cppo": Rule(cppo_mask, _CPPO, tuple(_CPPO_PARAMETERS), ESTIMATORS, **_CPPO_DEFAULTS),
    "cppo_soft": Rule(cppo_soft_weight, _CPPO + ", appendix C", tuple(_CPPO_PARAMETERS), ESTIMATORS, **_CPPO_DEFAULTS),
    "dppo": Rule(
        dppo_mask, "DPPO, arXiv 2602.04879", ("delta", "ratio_cap"), ESTIMATORS, {"delta": 0.15}, {"delta": 0.05}
    ),
    "trm_max": Rule(trm_max_mask, _TRM, ("delta", "ratio_cap"), _KL_FIRST, kl_defaults={"delta": 0.05}),
    "trm_avg": Rule(trm_avg_mask, _TRM, ("delta", "ratio_cap"), _KL_FIRST, kl_defaults={"delta": 0.001}),
    "minpro": Rule(minpro_weight, "MinPRO, arXiv 2601.22718", _CLIP, (), {"ratio_min": 0.8, "ratio_max": 1.28}),
    "cispo": Rule(cispo_weight, "CISPO, arXiv 2506.13585", _CLIP, (), {"ratio_min": 0.0, "ratio_max": 1.2}),
    "grpo": Rule(grpo_mask, "GRPO with Clip-Higher", (*_CLIP, "ratio_cap"), (), {"ratio_min": 0.8, "ratio_max": 1.28}),
    "none": Rule(no_mask, "no trust region", ("ratio_cap",)),
}
"""Every value of ``trust_region``: the methods of the paper's Table 1, the soft gate, and no trust region at all."""
