"""The table of rules: what the field ``trust_region`` may name, and which fields of `CPPOConfig` each rule reads.

A rule is a function of the form that `cppo_trl.trust_region` describes. Its keyword-only arguments are its parameters:
the fields ``cppo_<name>`` for a rule of `RULES`, and ``trust_region_parameters`` for a user's own rule, which
``trust_region`` names by its dotted path.
"""

import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from torch import Tensor

from cppo_trl import trust_region as functions
from cppo_trl.divergence import ESTIMATORS
from cppo_trl.trust_region import Bound, Verdict, ratio_cap_weight


def _in_words(**parameters: Any) -> list[str]:
    """Each parameter with its value."""
    return [
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in parameters.items()
    ]


@dataclass(frozen=True)
class Rule:
    """One row of the table.

    Args:
        function: ``(divergence, advantages, log_ratio, mask, **parameters)``, which returns a ``(B, T)`` mask or
            weight, or a `Verdict`. One that takes ``response_ids`` gets ``(B,)`` int64, a number for each response
            that is its own and stays the same over the updates of a rollout.
        source: the paper of the rule and of its defaults.
        estimators: what D_t may be, the default first; empty for a rule that does not read D_t.
        tv_defaults: parameters whose default is the rule's own, where D_t is a total variation or unread.
        kl_defaults: the same where D_t is a KL divergence.
        limits_divergence: whether δ, where there is one, is a limit on D_t, so that above 1 it could not act on a
            total variation.
        bounds_ratio: whether the rule bounds the ratio itself, so that a cap on it has nothing to add.
        budget: the parameter that the average of D_t is held against, if there is one.
        bound: ``(budget, length, xi, **parameters)``, Theorem 1 for the rules that it covers.
        words: ``(**parameters)``, the parameters in words for the start-up table.
    """

    function: Callable[..., Tensor | Verdict]
    source: str
    estimators: tuple[str, ...] = ()
    tv_defaults: Mapping[str, float] = field(default_factory=dict)
    kl_defaults: Mapping[str, float] = field(default_factory=dict)
    limits_divergence: bool = True
    bounds_ratio: bool = False
    budget: str | None = None
    bound: Callable[..., Bound | None] | None = None
    words: Callable[..., list[str]] = _in_words

    @property
    def signature(self) -> dict[str, inspect.Parameter]:
        """Keyword-only arguments of the function, by name."""
        arguments = inspect.signature(self.function).parameters
        return {name: argument for name, argument in arguments.items() if argument.kind is argument.KEYWORD_ONLY}

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters."""
        return tuple(name for name in self.signature if name != "response_ids")

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
        response_ids: Tensor | None = None,
        ratio_cap: float | None = None,
        **parameters: Any,
    ) -> Verdict:
        """Weigh a batch; the verdict's weight is fp32.

        Args:
            divergence: ``(B, T)`` D_t >= 0.
            advantages: ``(B,)``, ``(B, 1)`` or ``(B, T)``.
            log_ratio: ``(B, T)`` log ρ_t.
            mask: ``(B, T)``, 1 on the responses' tokens.
            response_ids: ``(B,)`` int64, as described for ``function``.
            ratio_cap: C >= 1, or None.
            **parameters: values of ``self.parameters``.

        Raises:
            ValueError: if the function returns anything but one weight for each token.
        """
        if "response_ids" in self.signature:
            parameters["response_ids"] = response_ids
        verdict = self.function(divergence, advantages, log_ratio, mask, **parameters)
        if not isinstance(verdict, Verdict):
            verdict = Verdict(verdict)
        if verdict.weight.shape != divergence.shape:
            shapes = f"{tuple(verdict.weight.shape)}, expected {tuple(divergence.shape)}"
            raise ValueError(f"The trust region {self.source} returns a weight of shape {shapes}: one for each token.")
        weight = verdict.weight.float()
        if ratio_cap is not None:
            weight = weight * ratio_cap_weight(log_ratio, ratio_cap)
        return verdict._replace(weight=weight)


def _cppo_in_words(**given: Any) -> list[str]:
    delta, delta_b, quantile = given["delta"], given["delta_b"], given["delta_b_quantile"]
    ceiling = f"{delta_b:g} to {delta_b * given['delta_b_max_multiple']:g} (quantile {quantile} of each response)"
    budget = f"{delta_b:g} (fixed)" if quantile is None else ceiling
    words = _in_words(delta=delta, w_min=given["w_min"])
    words.append(f"delta_b {'off' if math.inf in (delta, delta_b) else budget}")
    return words + ["weights shuffled"] * given["shuffle_weights"]


def _cppo_bound(
    budget: float, length: float, xi: float, *, delta: float, w_min: float, shuffle_weights: bool, **others: Any
) -> Bound | None:
    """Theorem 1, which needs weights that fall along the response."""
    if shuffle_weights:
        return None
    return functions.improvement_bound(budget, length, xi, delta=delta, w_min=w_min)


_CPPO = Rule(
    functions.cppo,
    "CPPO, arXiv 2606.10968",
    tuple(ESTIMATORS),
    tv_defaults={"delta": 0.15, "delta_b": 0.02},
    kl_defaults={"delta": 0.1, "delta_b": 0.002},
    budget="delta_b",
    bound=_cppo_bound,
    words=_cppo_in_words,
)
_DPPO = Rule(
    functions.dppo_mask,
    "DPPO, arXiv 2602.04879",
    tuple(ESTIMATORS),
    tv_defaults={"delta": 0.15},
    kl_defaults={"delta": 0.05},
    budget="delta",
)
_TRM = Rule(
    functions.trm_max_mask,
    "TRM, arXiv 2512.23075",
    ("topk_kl", "binary_kl", "topk_tv", "binary_tv"),  # stated in the exact KL, to which Top-K is closest
    kl_defaults={"delta": 0.05},
    budget="delta",
)
_CISPO = Rule(
    functions.cispo_weight,
    "CISPO, arXiv 2506.13585",
    tv_defaults={"ratio_min": 0.0, "ratio_max": 1.2},
    bounds_ratio=True,
)
_MINPRO = Rule(
    functions.minpro_weight,
    "MinPRO, arXiv 2601.22718",
    tv_defaults={"ratio_min": 0.0, "ratio_max": 1.28},
    bounds_ratio=True,
)
_IPO = Rule(
    functions.ipo_mask,
    "prime-rl's IPO loss",
    tuple(ESTIMATORS),
    tv_defaults={"delta": 0.3},
    budget="delta",
)
_DRPO = Rule(
    functions.drpo_weight,
    "DRPO, arXiv 2606.09821",
    ("binary_tv",),  # its gradient holds for no other D_t
    tv_defaults={"delta": 12.5},
    limits_divergence=False,
)

RULES = {
    "cppo": _CPPO,
    "cppo_soft": replace(_CPPO, function=functions.cppo_soft, source="CPPO, arXiv 2606.10968, appendix C"),
    "dppo": _DPPO,
    "trm_max": _TRM,
    "trm_avg": replace(_TRM, function=functions.trm_avg_mask, kl_defaults={"delta": 0.001}),
    "minpro": _MINPRO,
    "cispo": _CISPO,
    "grpo": Rule(functions.grpo_mask, "GRPO with Clip-Higher", tv_defaults={"ratio_min": 0.8, "ratio_max": 1.28}),
    "drpo": _DRPO,
    "ipo": _IPO,
    "vaco": Rule(functions.vaco_mask, "VACO, arXiv 2603.01365, in open-instruct", limits_divergence=False),
    "none": Rule(functions.no_mask, "no trust region"),
}
"""Every named value of ``trust_region``: the paper's Table 1, its soft gate, later rules, and no trust region."""


def find_rule(name: str, given: Mapping[str, Any]) -> Rule:
    """The rule of a name in `RULES`, or of a user's own function at a dotted path.

    Args:
        name: value of ``trust_region``.
        given: ``trust_region_parameters``, for a user's own rule.

    Raises:
        ValueError: if there is no such rule, or its function does not take ``given``.
    """
    if name in RULES:
        if given:
            raise ValueError(f"trust_region_parameters are for a rule of your own: {name!r} reads the fields cppo_*.")
        return RULES[name]
    if "." not in name:
        close = get_close_matches(name, RULES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"trust_region must be one of {tuple(RULES)} or the dotted path of a function; got {name!r}.{hint}"
        )
    rule = Rule(import_object(name, "trust_region"), name, tuple(ESTIMATORS))
    unknown = sorted(set(given) - set(rule.parameters))
    missing = [n for n in rule.parameters if rule.signature[n].default is inspect.Parameter.empty and n not in given]
    if unknown or missing:
        raise ValueError(
            f"trust_region_parameters: {name} takes {rule.parameters}; unknown: {unknown}, missing: {missing}."
        )
    return rule


def import_object(path: str, named_by: str) -> Any:
    """What a dotted path names; the module may be a file in the working directory.

    Args:
        path: ``module.name``.
        named_by: the field that gives the path, for the message.

    Raises:
        ValueError: if there is no such object.
    """
    module, _, name = path.rpartition(".")
    sys.path.insert(0, os.getcwd())  # as `trl grpo` finds reward functions
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{named_by}: cannot import {path!r} ({error}). Give a dotted path, module.name.") from error
    finally:
        sys.path.pop(0)
