"""`CPPOConfig`: the fields of the rule, what they refuse, and the schedule in words."""

import json
import math
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from trl import GRPOConfig

from cppo_trl.divergence import ESTIMATORS
from cppo_trl.fields import documented
from cppo_trl.rules import RULES, Rule, find_rule
from cppo_trl.trust_region import Bound, Verdict

RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "cppo_delta": (lambda x: x is not None and x > 0, "> 0 (.inf switches the rule off)"),
    "cppo_delta_b": (lambda x: x is not None and x > 0, "> 0 (.inf switches the budget off)"),
    "cppo_w_min": (lambda x: 0 < x <= 1, "in (0, 1] (1.0 switches it off)"),
    "cppo_delta_b_quantile": (lambda x: x is None or 0 <= x <= 1, "in [0, 1], or null for a fixed budget"),
    "cppo_delta_b_max_multiple": (lambda x: 1 <= x < math.inf, "finite and >= 1"),
    "cppo_ratio_min": (lambda x: x is not None and 0 <= x <= 1, "in [0, 1]: it is 1 - epsilon_low"),
    "cppo_ratio_max": (lambda x: x is not None and x >= 1, ">= 1: it is 1 + epsilon_high"),
    "cppo_ratio_cap": (lambda x: x is None or x >= 1, ">= 1, or null for no cap"),
}
"""What a field of the rule must hold, and the same in words."""

_AT_MOST_ONE = (lambda x: x <= 1 or x == math.inf, "at most 1, the largest total variation (.inf switches it off)")
TV_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {"cppo_delta": _AT_MOST_ONE, "cppo_delta_b": _AT_MOST_ONE}
"""The same where D_t is a total variation, besides `RANGES`."""

_SAMPLING_KEYS = frozenset(
    (
        "temperature do_sample num_beams n top_p top_k top_h min_p typical_p epsilon_cutoff eta_cutoff logprobs "
        "repetition_penalty presence_penalty frequency_penalty no_repeat_ngram_size bad_words bad_words_ids "
        "sequence_bias logit_bias allowed_token_ids structured_outputs suppress_tokens begin_suppress_tokens "
        "min_length min_new_tokens min_tokens forced_bos_token_id forced_eos_token_id guidance_scale "
        "encoder_repetition_penalty exponential_decay_length_penalty penalty_alpha top_n_sigma"
    ).split()
)
"""Keys of ``generation_kwargs`` that change what is sampled, or which log-probs the engine returns."""

_UNTOUCHED = (
    "the trust region replaces it, so leave it at {} (its default) and set cppo_delta, or cppo_ratio_min and "
    "cppo_ratio_max (grpo, minpro, cispo)"
)
_UNBIASED = "the log-probs would not be those of the policy that sampled, so leave it at {}"
_HOST_OPTIONS: tuple[tuple[str, Any, str], ...] = (
    ("epsilon", 0.2, _UNTOUCHED),
    ("epsilon_high", None, _UNTOUCHED),
    ("delta", None, "a ratio cap of TRL's own; leave it at {} and set cppo_ratio_cap instead"),
    ("off_policy_mask_threshold", None, _UNTOUCHED),
    ("importance_sampling_level", "token", "the rule is per token; leave it at {}"),
    ("vllm_importance_sampling_correction", False, "the ratio is already taken against the engine; use {}"),
    ("vllm_importance_sampling_cap", None, "no second correction of the ratio; leave it at {}"),
    ("top_entropy_quantile", 1.0, "a second token mask would hide the rule's; leave it at {}"),
    ("top_p", 1.0, _UNBIASED),
    ("top_k", 0, _UNBIASED),
    ("min_p", None, _UNBIASED),
    ("repetition_penalty", 1.0, _UNBIASED),
    ("vllm_structured_outputs_regex", None, _UNBIASED),
)
"""Options of TRL's that contradict the rule: the one value that does not, and why."""


@documented
@dataclass
class TrustRegionConfig:
    r"""The fields of the trust region, for every trainer's configuration.

    Args:
        trust_region: ``"cppo"``; ``"cppo_soft"``, its soft gate (appendix C); ``"dppo"``, one threshold for all
            positions and no budget; ``"trm_max"`` and ``"trm_avg"``, whole responses rejected by the maximum or the
            mean of D_t; ``"minpro"``, ``"cispo"`` and ``"grpo"`` (Clip-Higher), bounds on the sampled ratio;
            ``"drpo"``, a weight that falls with D_t; ``"ipo"``, a threshold in both directions; ``"vaco"``, one on
            a response's mean distance of the ratio from 1; or ``"none"``; or the dotted path of a rule of your own,
            as `cppo_trl.rules.Rule` describes it.
        trust_region_parameters: parameters of a rule of your own, by name.
        cppo_divergence: the estimator of D_t: ``"binary_tv"``, ``"binary_kl"``, or ``"topk_tv"`` (the paper's main
            runs) and ``"topk_kl"``, which compare ``cppo_topk`` tokens of the rollout policy. None for
            ``"binary_tv"``, and for ``"topk_kl"`` under TRM, which is stated in the exact KL.
        cppo_topk: K of the Top-K estimators, 1 to the vocabulary; 20 in the paper, and at most 20 from a colocated
            vLLM.
        cppo_topk_source: where Top-K takes μ from: ``"engine"``, which sampled the rollout, or ``"policy"``, the
            trained model, in one pass over the rollout before its updates. Without vLLM it is always the policy.
        cppo_delta: threshold δ > 0; None for the value of the rule's own paper (CPPO: 0.15 TV, 0.1 KL; DPPO: 0.15
            TV, 0.05 KL; TRM-Max: 0.05 KL; TRM-Avg: 0.001 KL; DRPO: 12.5; IPO: 0.3 TV; VACO: none, set one); inf
            switches the rule off.
        cppo_delta_b: budget δ_b > 0, the floor of Eq. (22); None for the paper's value (0.02 TV, 0.002 KL); inf
            switches the budget off.
        cppo_w_min: weight of the last token in (0, 1]; 1 switches the position weight off.
        cppo_delta_b_quantile: quantile q of Eq. (22) in [0, 1]; None for a fixed budget (the paper's choice, with
            0.015, for the post-trained Qwen3-1.7B).
        cppo_delta_b_max_multiple: ceiling of Eq. (22) in multiples of the floor, >= 1.
        cppo_shuffle_weights: give each response its position weights in a random order, drawn from ``seed`` with
            each rollout (an ablation).
        cppo_ratio_min: lower bound 1 - ε_low on the ratio, in [0, 1], of minpro and cispo (0, no bound) and grpo
            (0.8); None for these values.
        cppo_ratio_max: upper bound 1 + ε_high on the ratio, >= 1, of minpro (1.28), cispo (1.2) and grpo (1.28);
            None for these values.
        cppo_ratio_cap: cap C >= 1 on the ratio, as a detached weight min(1, C/ρ_t); None for no cap, as in the paper.
    """

    trust_region: str = "cppo"
    trust_region_parameters: dict | str | None = None
    cppo_divergence: str | None = None
    cppo_topk: int = 20
    cppo_topk_source: str = "engine"
    cppo_delta: float | None = None
    cppo_delta_b: float | None = None
    cppo_w_min: float = 0.8
    cppo_delta_b_quantile: float | None = 0.9
    cppo_delta_b_max_multiple: float = 2.0
    cppo_shuffle_weights: bool = False
    cppo_ratio_min: float | None = None
    cppo_ratio_max: float | None = None
    cppo_ratio_cap: float | None = None

    def _resolve_rule(self) -> None:
        """Check the fields and fill in the rule's own defaults; call it first in ``__post_init__``.

        Raises:
            ValueError: for a value out of range, or a field that the rule does not read.
        """
        if isinstance(self.trust_region_parameters, str):
            with suppress(json.JSONDecodeError):
                self.trust_region_parameters = json.loads(self.trust_region_parameters)
        given: Any = self.trust_region_parameters
        _require(given is None or isinstance(given, dict), "trust_region_parameters", given, "a JSON object, or null")
        self._check_rule()

    def _rename_checkpointing(self) -> None:
        """Set under their new names the fields that TRL sets under names deprecated in transformers 5.23."""
        for kind in ("", "_kwargs"):
            if getattr(self, f"activation_checkpointing{kind}", "") is None:
                setattr(self, f"activation_checkpointing{kind}", getattr(self, f"gradient_checkpointing{kind}"))

    @cached_property
    def rule(self) -> Rule:
        """What ``trust_region`` names."""
        parameters: Any = self.trust_region_parameters
        return find_rule(self.trust_region, parameters or {})

    @property
    def rule_parameters(self) -> dict[str, Any]:
        """The rule's parameters by name: ``trust_region_parameters``, or the fields ``cppo_<name>`` that it reads."""
        if self.trust_region not in RULES:
            own: Any = self.trust_region_parameters
            return own or {}
        return {name: getattr(self, f"cppo_{name}") for name in self.rule.parameters}

    @property
    def theorem_bound(self) -> Callable[[float, float, float], Bound | None] | None:
        """Theorem 1 under the rule's parameters, as a function of the budget δ_b, the length T and the bound ξ.

        None where the theorem does not cover the rule, or D_t is not a total variation.
        """
        if self.rule.bound is None or not str(self.cppo_divergence).endswith("tv"):
            return None
        return partial(self.rule.bound, **self.rule_parameters)

    @property
    def uses_topk(self) -> bool:
        """Whether the estimator needs log-probs of more than the sampled token."""
        return str(self.cppo_divergence).startswith("topk")

    @property
    def topk_of_policy(self) -> bool:
        """Whether Top-K is read off the trained model, whatever samples."""
        return self.uses_topk and self.cppo_topk_source == "policy"

    @property
    def judge(self) -> Callable[..., Verdict]:
        """`cppo_trl.rules.Rule.judge` of the rule with these fields' parameters."""
        return partial(self.rule.judge, ratio_cap=self.cppo_ratio_cap, **self.rule_parameters)

    def _rule_in_words(self) -> list[str]:
        words = [self.trust_region]
        if self.rule.estimators:
            of = " of the policy" if self.topk_of_policy else ""
            words.append(f"{self.cppo_divergence}" + (f" (K = {self.cppo_topk}{of})" if self.uses_topk else ""))
        words += self.rule.words(**self.rule_parameters)
        if self.cppo_ratio_cap is not None:
            words.append(f"ratio capped at {self.cppo_ratio_cap:g}")
        return words

    def _check_rule(self) -> None:
        self._refuse_unread_fields()
        if self.cppo_divergence is None:
            self.cppo_divergence = (self.rule.estimators or tuple(ESTIMATORS))[0]
        allowed = [name for name in ESTIMATORS if name in (self.rule.estimators or ESTIMATORS)]
        expected = f"one of {tuple(allowed)}"
        _require(self.cppo_divergence in allowed, "cppo_divergence", self.cppo_divergence, expected)
        _require(isinstance(self.cppo_topk, int), "cppo_topk", self.cppo_topk, "an integer")
        _require(self.cppo_topk >= 1, "cppo_topk", self.cppo_topk, ">= 1")
        sources = ("engine", "policy")
        _require(self.cppo_topk_source in sources, "cppo_topk_source", self.cppo_topk_source, f"one of {sources}")
        if not self.uses_topk:
            for name, default in (("cppo_topk", 20), ("cppo_topk_source", "engine")):
                value = getattr(self, name)
                _require(value == default, name, value, f"left at {default}: a binary estimator ignores it")
        for name, value in self.rule.defaults(self.cppo_divergence).items():
            if getattr(self, f"cppo_{name}") is None:
                setattr(self, f"cppo_{name}", value)
        bounded = self.cppo_divergence.endswith("tv") and self.rule.limits_divergence
        ranges = [*RANGES.items(), *(TV_RANGES.items() if bounded else ())]
        for name, (holds, expected) in ranges:
            if name in self._fields_read:
                value = getattr(self, name)
                source = f"set: {self.rule.source} gives no threshold"
                source += f" for {self.cppo_divergence}" * bool(self.rule.estimators)
                _require(value is not None or holds(None), name, None, source)
                _require(holds(value), name, value, expected)

    @property
    def _fields_read(self) -> set[str]:
        """Fields of the trust region that the rule reads."""
        read = {f"cppo_{name}" for name in self.rule.parameters if self.trust_region in RULES}
        if self.rule.estimators:
            read |= {"cppo_divergence", "cppo_topk", "cppo_topk_source"}
        return read if self.rule.bounds_ratio else read | {"cppo_ratio_cap"}

    def _refuse_unread_fields(self) -> None:
        """Refuse a field of the trust region that is set but not read by the rule."""
        for name, declared in type(self).__dataclass_fields__.items():
            # the default estimator may be stated: it is what the metrics are of
            stated = name == "cppo_divergence" and self.cppo_divergence == next(iter(ESTIMATORS))
            if name.startswith("cppo_") and name not in self._fields_read and not stated:
                expected = f"left at {declared.default!r}: trust_region={self.trust_region!r} does not read it"
                _require(getattr(self, name) == declared.default, name, getattr(self, name), expected)

    def _refuse_contradictions(self) -> None:
        """Refuse the options of the host that contradict the rule, as far as this host has them."""
        for name, neutral, reason in _HOST_OPTIONS:
            value = getattr(self, name, neutral)
            off = value == neutral or (name == "min_p" and value == 0) or (name == "top_k" and value is None)
            if not off:
                raise ValueError(
                    f"{name}={value!r} contradicts the trust region: " + reason.format(repr(neutral)) + "."
                )
        host: Any = self  # every one has these fields
        _require(host.temperature > 0, "temperature", host.temperature, "> 0: greedy rollouts have no log-probs")
        longest = host.max_completion_length
        _require(longest is None or longest >= 1, "max_completion_length", longest, ">= 1 (tokens)")
        _require(float(host.learning_rate) >= 0, "learning_rate", host.learning_rate, ">= 0")


@documented
@dataclass
class CPPOConfig(TrustRegionConfig, GRPOConfig):
    r"""Configuration of `CPPOTrainer`: `trl.GRPOConfig` plus the trust region, `TrustRegionConfig`.

    Defaults that differ from `GRPOConfig`, each with its reason:

    * ``steps_per_generation``: where neither it nor ``generation_batch_size`` is set, two updates per rollout (one
      pass over twice the update batch; above ``num_iterations=1``, that many passes over one): the paper's smallest
      schedule. TRL's default of one update never leaves the rollout policy, so no trust region could act.
    * ``loss_type="dr_grpo"``: sum over tokens divided by a constant, the authors' seq-mean-token-sum-norm.
    * ``scale_rewards="none"``: rewards minus the group mean, not divided by its standard deviation, as in both
      released codes.
    * ``disable_dropout=True``: dropout alone moves π away from μ.
    * ``vllm_importance_sampling_correction=False``: the ratio already is π/μ; TRL's factor would correct twice.

    Args:
        skip_zero_std_prompts: leave prompts whose responses all score alike out of the loss and of its normalizer,
            as the paper does. Not with ``loss_type="bnpo"``, which averages over micro-batches, empty ones included.
        log_tokens_steps: updates between two logs of a few responses token by token, for ``cppo_trl.report``; best a
            multiple of the updates per rollout, whose last has moved furthest. 0 logs none.

    Raises:
        ValueError: for a value out of range, or an option of TRL's that contradicts the rule.
    """

    skip_zero_std_prompts: bool = False
    log_tokens_steps: int = 0

    steps_per_generation: int | None = None
    loss_type: str = "dr_grpo"
    scale_rewards: str = "none"
    disable_dropout: bool = True
    vllm_importance_sampling_correction: bool = False

    def __post_init__(self) -> None:
        if self.generation_batch_size is None and self.steps_per_generation is None:
            self.steps_per_generation = self.gradient_accumulation_steps * (2 if self.num_iterations == 1 else 1)
        self._resolve_rule()
        if self.use_vllm and self.vllm_mode == "colocate" and self.uses_topk and not self.topk_of_policy:
            most = "<= 20, the most a colocated vLLM returns; or set cppo_topk_source to policy"
            _require(self.cppo_topk <= 20, "cppo_topk", self.cppo_topk, most)
        every = self.log_tokens_steps
        _require(every >= 0, "log_tokens_steps", every, "a number of updates, or 0 to log no tokens")
        self._rename_checkpointing()
        super().__post_init__()  # also parses JSON strings into dicts
        self._check_host_options()
        self._warn_doubtful()

    @property
    def updates_per_rollout(self) -> float:
        """Optimizer steps between two rollouts."""
        return self._steps_per_rollout / self.gradient_accumulation_steps

    @property
    def always_on_policy(self) -> bool:
        """Whether every update uses the weights that sampled its rollout."""
        return self.gradient_accumulation_steps % self._steps_per_rollout == 0

    @property
    def _steps_per_rollout(self) -> int:
        assert self.steps_per_generation is not None  # set by __post_init__
        return self.steps_per_generation * self.num_iterations

    def schedule(self) -> dict[str, str]:
        """What will happen, in words, row by row: the table printed when training starts."""
        responses = self.generation_batch_size
        each_reward = self.multi_objective_aggregation == "normalize_then_sum"  # TRL then ignores scale_rewards
        scale = "group for each reward, then batch" if each_reward else self.scale_rewards
        noisy = "update 1, by the engine's numerical noise"
        off_policy = "never" if self.always_on_policy else "update 2"
        if self.use_vllm:
            off_policy = f"{off_policy}; the ratio from {noisy}" if self.topk_of_policy else noisy
        return {
            "rollout": f"{responses // self.num_generations} prompts x {self.num_generations} responses = {responses}",
            "updates per rollout": f"{self.updates_per_rollout:g}"
            + (f" ({self.num_iterations} passes)" if self.num_iterations > 1 else ""),
            "an update": f"{responses * self.num_iterations / self.updates_per_rollout:g} responses, shuffled over "
            "all prompts of the rollout",
            "off-policy from": off_policy,
            "trust region": ", ".join(self._rule_in_words()),
            "loss": f"{self.loss_type}, advantages scaled by: {scale}, beta {self.beta:g}",
        }

    def _check_host_options(self) -> None:
        """Refuse the options of TRL's that contradict the rule."""
        losses = ("dr_grpo", "dapo", "grpo", "bnpo")
        skips = self.skip_zero_std_prompts and self.loss_type == "bnpo"
        _require(
            not skips, "skip_zero_std_prompts", True, "false with 'bnpo': it averages over micro-batches, full or not"
        )
        _require(
            self.loss_type in losses,
            "loss_type",
            self.loss_type,
            f"one of {losses}; others apply their own clipping",
        )
        self._refuse_contradictions()
        kwargs: Any = self.generation_kwargs
        clash = sorted(_SAMPLING_KEYS & set(kwargs)) if isinstance(kwargs, dict) else []
        if clash:
            raise ValueError(
                f"generation_kwargs sets {clash}: the rollout log-probs would no longer be those of the sampling "
                "policy. Remove them (the temperature has its own field)."
            )
        if self.uses_topk and self.torch_compile:
            raise ValueError(
                f"torch_compile=True with cppo_divergence={self.cppo_divergence!r}: Top-K is read off the head as it "
                "runs uncompiled. Set torch_compile to false, or cppo_divergence to binary_tv or binary_kl."
            )
        if self.use_transformers_continuous_batching and (self.bf16 is not False or self.fp16):
            raise ValueError(
                "use_transformers_continuous_batching casts the trained fp32 weights to bf16 for good. Set it to "
                "false, or set bf16 and fp16 to false."
            )

    def _warn_doubtful(self) -> None:
        """Warn once about settings that are valid but probably unintended."""
        doubts = []
        if self.always_on_policy and (self.topk_of_policy or not self.use_vllm):
            doubts.append(
                "every update is on-policy, so the mask keeps all tokens (unless a rollout_func returns log-probs): "
                f"raise steps_per_generation above gradient_accumulation_steps={self.gradient_accumulation_steps}, or "
                "num_iterations above 1"
            )
        delta, delta_b = self.cppo_delta or math.inf, self.cppo_delta_b or 0.0  # None where the rule reads none
        if delta < delta_b < math.inf:
            doubts.append(
                f"cppo_delta_b={delta_b:g} exceeds cppo_delta={delta:g}: a budget on the mean of "
                "D_t hardly acts above the limit on each token. Lower it, or set it to .inf"
            )
        if self.beta != 0.0:
            doubts.append(
                "beta != 0: the KL term to the reference also acts on masked tokens, and with "
                "use_bias_correction_kl=True it is multiplied by their ratio, which no mask or cap bounds"
            )
        whole_rollouts = self._steps_per_rollout // math.gcd(self._steps_per_rollout, self.gradient_accumulation_steps)
        if self.save_strategy == "steps" and self.save_steps >= 1 and self.save_steps % whole_rollouts:
            doubts.append(
                f"save_steps={self.save_steps:g} falls inside a rollout: a run resumed there makes a new one, and "
                f"takes another path than without the interruption. Use a multiple of {whole_rollouts} updates"
            )
        if not self.disable_dropout:
            doubts.append("disable_dropout=False: dropout noise counts as divergence from the rollout policy")
        if self.bf16 and not self.cast_lm_head_to_fp32:
            doubts.append(
                "bf16 log-probs carry noise of the order of delta_b: cast_lm_head_to_fp32=True removes the head's "
                "part (TRL 1.16 cannot do it with LoRA on a model whose head is its embedding)"
            )
        if self.scale_rewards != "none":
            doubts.append(f"scale_rewards={self.scale_rewards!r}: the authors' recipes do not divide by the deviation")
        if self.mask_truncated_completions:
            doubts.append("mask_truncated_completions: truncated responses leave the loss, not dr_grpo's normalizer")
        ignored = [f for f in type(self).__dataclass_fields__ if f.startswith(("sapo_", "vespo_"))]
        ignored += ["vllm_importance_sampling_mode", "vllm_importance_sampling_clip_max"]
        changed = [f for f in ignored if getattr(self, f) != type(self).__dataclass_fields__[f].default]
        if changed:
            doubts.append(f"{', '.join(changed)}: without effect under a trust region")
        for doubt in doubts:
            warnings.warn(doubt, UserWarning, stacklevel=4)


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {expected}; got {value!r}.")


def in_columns(title: str, rows: dict[str, str]) -> str:
    """Names and texts in two columns below a title."""
    width = max(map(len, rows))
    return "\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in rows.items())])
