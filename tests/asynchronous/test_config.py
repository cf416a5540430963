"""What `AsyncCPPOConfig` refuses."""

import pytest

from cppo_trl import AsyncCPPOConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cppo_divergence": "topk_tv"}, "Set cppo_divergence to binary_tv or binary_kl"),
        ({"trust_region": "trm_max"}, "Set cppo_divergence to binary_tv or binary_kl"),
        ({"epsilon": 0.3}, "epsilon=0.3 contradicts the trust region"),
        ({"top_p": 0.9}, "top_p=0.9 contradicts the trust region"),
        ({"min_p": 0.1}, "min_p=0.1 contradicts the trust region"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"cppo_delta": -1.0}, "cppo_delta must be > 0"),
        ({"trust_region": "dppo", "cppo_delta_b": 0.1}, "does not read it"),
    ],
)
def test_refusals_name_the_field(fields, message):
    with pytest.raises(ValueError, match=message):
        AsyncCPPOConfig("out", bf16=False, **fields)
