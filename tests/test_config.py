import math
import warnings

import pytest

from cppo_trl import CPPOConfig


def make(**fields):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CPPOConfig("out", use_cpu=True, **{"bf16": False, **fields})


def test_defaults_are_the_paper_s():
    config = make()
    assert (config.trust_region, config.cppo_divergence) == ("cppo", "binary_tv")
    assert (config.cppo_delta, config.cppo_delta_b, config.cppo_w_min) == (0.15, 0.02, 0.8)
    assert (config.cppo_delta_b_quantile, config.cppo_delta_b_max_multiple) == (0.9, 2.0)
    assert config.cppo_ratio_cap is None
    assert (config.loss_type, config.scale_rewards, config.beta) == ("dr_grpo", "none", 0.0)
    assert config.disable_dropout
    assert not config.vllm_importance_sampling_correction
    kl = make(cppo_divergence="binary_kl")
    assert (kl.cppo_delta, kl.cppo_delta_b) == (0.1, 0.002)
    assert make(cppo_divergence="binary_kl", cppo_delta=0.3).cppo_delta == 0.3


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (
            "cppo_soft",
            "cppo_soft, binary_tv, delta 0.15, w_min 0.8, delta_b 0.02 to 0.04 (quantile 0.9 of each response)",
        ),
        ("dppo", "dppo, binary_tv, delta 0.15"),
        ("trm_max", "trm_max, topk_kl (K = 20), delta 0.05"),
        ("trm_avg", "trm_avg, topk_kl (K = 20), delta 0.001"),
        ("minpro", "minpro, ratio_min 0, ratio_max 1.28"),
        ("cispo", "cispo, ratio_min 0, ratio_max 1.2"),
        ("grpo", "grpo, ratio_min 0.8, ratio_max 1.28"),
        ("drpo", "drpo, binary_tv, delta 12.5"),
        ("ipo", "ipo, binary_tv, delta 0.3"),
        ("none", "none"),
    ],
)
def test_each_rule_has_the_defaults_of_its_own_paper(rule, words):
    assert make(trust_region=rule).schedule()["trust region"] == words
    assert make(trust_region="dppo", cppo_divergence="binary_kl").cppo_delta == 0.05
    assert make(trust_region="grpo", cppo_divergence="binary_tv") == make(trust_region="grpo")


@pytest.mark.parametrize(
    ("fields", "steps", "updates", "on_policy"),
    [
        ({}, 2, 2, False),
        ({"gradient_accumulation_steps": 4}, 8, 2, False),
        ({"gradient_accumulation_steps": 4, "num_iterations": 2}, 4, 2, False),
        ({"steps_per_generation": 8, "gradient_accumulation_steps": 2}, 8, 4, False),
        ({"generation_batch_size": 32}, 4, 4, False),
        ({"steps_per_generation": 4, "gradient_accumulation_steps": 4}, 4, 1, True),
        ({"steps_per_generation": 1, "gradient_accumulation_steps": 4}, 1, 0.25, True),
        ({"steps_per_generation": 3, "gradient_accumulation_steps": 2}, 3, 1.5, False),
    ],
)
def test_schedule(fields, steps, updates, on_policy):
    config = make(**fields)
    assert config.steps_per_generation == steps
    assert config.updates_per_rollout == updates
    assert config.always_on_policy == on_policy
    assert config.schedule()["off-policy from"] == ("never" if on_policy else "update 2")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"trust_region": "ppo"}, "trust_region must be one of .* Did you mean '.ppo'"),
        ({"cppo_divergence": "kl"}, "cppo_divergence must be one of"),
        ({"cppo_delta": 0.0}, "cppo_delta must be > 0"),
        ({"cppo_delta": math.nan}, "cppo_delta must be > 0"),
        ({"cppo_delta_b": -1.0}, "cppo_delta_b must be > 0"),
        ({"cppo_w_min": 0.0}, "cppo_w_min must be in"),
        ({"cppo_w_min": 1.2}, "cppo_w_min must be in"),
        ({"cppo_delta_b_quantile": 90.0}, "cppo_delta_b_quantile must be in"),
        ({"cppo_delta_b_max_multiple": 0.5}, "cppo_delta_b_max_multiple must be"),
        ({"cppo_ratio_cap": 0.5}, "cppo_ratio_cap must be >= 1"),
        ({"trust_region": "dppo", "cppo_w_min": 0.9}, "cppo_w_min must be left at 0.8"),
        ({"trust_region": "dppo", "cppo_delta_b": 0.01}, "cppo_delta_b must be left at None"),
        ({"trust_region": "dppo", "cppo_shuffle_weights": True}, "cppo_shuffle_weights must be left at False"),
        ({"trust_region": "trm_avg", "cppo_delta_b_quantile": None}, "cppo_delta_b_quantile must be left at 0.9"),
        ({"trust_region": "trm_max", "cppo_divergence": "topk_tv"}, "cppo_delta must be set: .* gives no threshold"),
        ({"trust_region": "drpo", "cppo_divergence": "topk_tv"}, r"cppo_divergence must be one of \('binary_tv',\)"),
        ({"trust_region": "ipo", "cppo_delta": 1.5}, "cppo_delta must be at most 1"),
        ({"trust_region": "vaco"}, "cppo_delta must be set: VACO, .* gives no threshold; got None"),
        ({"trust_region": "grpo", "cppo_delta": 0.1}, "cppo_delta must be left at None"),
        ({"trust_region": "grpo", "cppo_divergence": "topk_kl"}, "cppo_divergence must be left at None"),
        ({"trust_region": "cispo", "cppo_ratio_cap": 5.0}, "cppo_ratio_cap must be left at None"),
        ({"trust_region": "none", "cppo_ratio_max": 1.2}, "cppo_ratio_max must be left at None"),
        ({"trust_region": "grpo", "cppo_ratio_min": 1.1}, "cppo_ratio_min must be in"),
        ({"trust_region": "minpro", "cppo_ratio_max": 0.28}, "cppo_ratio_max must be >= 1"),
        ({"cppo_ratio_max": 1.28}, "cppo_ratio_max must be left at None"),
        ({"log_tokens_steps": -1}, "log_tokens_steps must be a number of updates"),
        ({"skip_zero_std_prompts": True, "loss_type": "bnpo"}, "skip_zero_std_prompts must be false with 'bnpo'"),
        ({"loss_type": "cispo"}, "loss_type must be one of"),
        ({"loss_type": "luspo", "importance_sampling_level": "sequence"}, "loss_type must be one of"),
        ({"epsilon": 0.1}, "epsilon=0.1 .*cppo_delta"),
        ({"epsilon_high": 0.28}, "epsilon_high=0.28 .*cppo_delta"),
        ({"delta": 4.0}, "delta=4.0 .*cppo_ratio_cap"),
        ({"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold=0.5"),
        ({"loss_type": "grpo", "importance_sampling_level": "sequence"}, "importance_sampling_level='sequence'"),
        ({"vllm_importance_sampling_correction": True}, "vllm_importance_sampling_correction=True"),
        ({"vllm_importance_sampling_cap": 2.0}, "vllm_importance_sampling_cap=2.0"),
        ({"top_entropy_quantile": 0.2}, "top_entropy_quantile=0.2"),
        ({"top_p": 0.9}, "top_p=0.9"),
        ({"top_k": 50}, "top_k=50"),
        ({"min_p": 0.1}, "min_p=0.1"),
        ({"repetition_penalty": 1.1}, "repetition_penalty=1.1"),
        ({"vllm_structured_outputs_regex": "a+"}, "vllm_structured_outputs_regex='a[+]'"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"generation_kwargs": {"logprobs": 20}}, r"generation_kwargs sets \['logprobs'\]"),
        ({"generation_kwargs": '{"top_p": 0.5}'}, r"generation_kwargs sets \['top_p'\]"),
        ({"generation_kwargs": {"min_new_tokens": 5}}, r"generation_kwargs sets \['min_new_tokens'\]"),
        ({"cppo_divergence": "topk_tv", "torch_compile": True}, "torch_compile=True with cppo_divergence='topk_tv'"),
        ({"cppo_divergence": "topk_tv", "cppo_topk": 0}, "cppo_topk must be >= 1"),
        ({"cppo_topk": 5}, "cppo_topk must be left at 20"),
        ({"cppo_topk_source": "policy"}, "cppo_topk_source must be left at engine: a binary"),
        ({"cppo_divergence": "topk_tv", "cppo_topk_source": "vllm"}, "cppo_topk_source must be one of"),
        ({"trust_region": "grpo", "cppo_topk_source": "policy"}, "cppo_topk_source must be left at 'engine'"),
        ({"use_transformers_continuous_batching": True, "bf16": True}, "continuous_batching .*bf16"),
    ],
)
def test_what_contradicts_the_rule_is_refused_by_name(fields, named):
    with pytest.raises(ValueError, match=named):
        make(**fields)


@pytest.mark.parametrize(
    ("fields", "warned"),
    [
        ({"steps_per_generation": 1}, "steps_per_generation"),
        ({"beta": 0.1}, "beta"),
        ({"disable_dropout": False}, "dropout"),
        ({"bf16": True}, "cast_lm_head_to_fp32"),
        ({"sapo_temperature_neg": 2.0}, "sapo_temperature_neg"),
        ({"scale_rewards": "group"}, "scale_rewards"),
        ({"mask_truncated_completions": True}, "mask_truncated_completions"),
        ({"steps_per_generation": 3, "gradient_accumulation_steps": 2}, "Use a multiple of 3 updates"),
        ({"steps_per_generation": 4, "save_steps": 10}, "save_steps=10 falls inside a rollout"),
    ],
)
def test_doubtful_settings_warn_once(fields, warned):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        CPPOConfig("out", use_cpu=True, **{"bf16": False, **fields})
    assert sum(warned in str(w.message) for w in caught if w.category is UserWarning) == 1


def test_top_k_of_the_policy_says_when_it_acts_and_has_no_limit_of_the_engine_s():
    engine = {"use_vllm": True, "vllm_mode": "colocate", "cppo_divergence": "topk_tv"}
    schedule = make(**engine, cppo_topk_source="policy", cppo_topk=21).schedule()
    assert schedule["off-policy from"] == "update 2; the ratio from update 1, by the engine's numerical noise"
    assert "topk_tv (K = 21 of the policy)" in schedule["trust region"]
    with pytest.raises(ValueError, match=r"cppo_topk must be <= 20, .* or set cppo_topk_source to policy"):
        make(**engine, cppo_topk=21)
    assert "update 1" in make(**engine, steps_per_generation=1).schedule()["off-policy from"]
    with pytest.warns(UserWarning, match="every update is on-policy"):
        CPPOConfig("o", use_cpu=True, bf16=False, **engine, cppo_topk_source="policy", steps_per_generation=1)


def test_a_sound_setting_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        CPPOConfig("out", use_cpu=True, bf16=False)


def test_infinite_limits_and_fixed_budget_are_legal():
    config = make(cppo_delta=math.inf, cppo_delta_b=math.inf, cppo_w_min=1.0, cppo_delta_b_quantile=None)
    for off in (config, make(cppo_delta=math.inf)):  # delta is the budget's slack
        assert "delta_b off" in off.schedule()["trust region"]
    assert "quantile" not in config.schedule()["trust region"]
    assert "fixed" in make(cppo_delta_b_quantile=None).schedule()["trust region"]


def test_theorem_1_covers_a_budget_in_total_variation():
    assert make().theorem_bound(0.02, 100, 1.0).ratio == pytest.approx(0.02 / (0.15 * 0.8))
    soft = make(trust_region="cppo_soft", cppo_divergence="topk_tv", cppo_w_min=1.0)
    assert soft.theorem_bound(0.02, 100, 1.0).ratio == pytest.approx(0.02 / 0.15)
    for fields in ({"trust_region": "dppo"}, {"cppo_divergence": "binary_kl"}, {"trust_region": "grpo"}):
        assert make(**fields).theorem_bound is None
    assert make(cppo_shuffle_weights=True).theorem_bound(0.02, 100, 1.0) is None


def test_the_deduction_of_the_paper_s_8b_recipe_is_vacuous():
    # T = 8,192, delta 0.15, delta_b at its ceiling of 0.04, w_min 0.8, rewards of 0 and 1: 2 xi = 2 is all J can lose
    deduction = make().theorem_bound(0.04, 8192, 1.0).deduction
    assert deduction == pytest.approx(2 * 8192 * 8191 * 0.15 * 0.04 / 0.8 + 4 * 8191 * 0.15**2 / 0.8)
    assert deduction > 1e6


def test_a_rule_of_your_own_is_checked_against_its_signature(tmp_path, monkeypatch):
    (tmp_path / "own_rules.py").write_text(
        "def late(divergence, advantages, log_ratio, mask, *, delta, after=0.5):\n    return mask.bool()\n"
    )
    monkeypatch.chdir(tmp_path)
    config = make(trust_region="own_rules.late", trust_region_parameters='{"delta": 0.1}')
    assert config.rule_parameters == {"delta": 0.1}
    assert config.schedule()["trust region"] == "own_rules.late, binary_tv, delta 0.1"
    for fields, named in [
        ({"trust_region": "own_rules.late"}, r"missing: \['delta'\]"),
        ({"trust_region": "own_rules.late", "trust_region_parameters": {"delta": 0.1, "w": 1}}, r"unknown: \['w'\]"),
        ({"trust_region": "own_rules.early"}, "trust_region: cannot import 'own_rules.early'"),
        ({"trust_region_parameters": {"delta": 0.1}}, "trust_region_parameters are for a rule of your own"),
        ({"trust_region": "own_rules.late", "cppo_delta": 0.2}, "cppo_delta must be left at None"),
    ]:
        with pytest.raises(ValueError, match=named):
            make(**{"trust_region_parameters": {"delta": 0.1} if "cppo_delta" in fields else None, **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cppo_topk": 20.0, "cppo_divergence": "topk_tv"}, "cppo_topk must be an integer; got 20.0"),
        ({"cppo_delta": 15}, "cppo_delta must be at most 1, the largest total variation"),
        ({"max_completion_length": 0}, "max_completion_length must be >= 1"),
        ({"learning_rate": -1.0}, "learning_rate must be >= 0"),
    ],
)
def test_a_wrong_field_from_python(fields, message):
    with pytest.raises(ValueError, match=message):
        CPPOConfig("x", use_cpu=True, bf16=False, **fields)


def test_a_budget_above_the_threshold_is_doubtful():
    with pytest.warns(UserWarning, match=r"cppo_delta_b=0.2 exceeds cppo_delta=0.1: .* Lower it"):
        CPPOConfig("x", use_cpu=True, bf16=False, cppo_delta=0.1, cppo_delta_b=0.2)
