"""Parameters and bytes of the dry run against the models' cards, PEFT, and numbers worked by hand."""

import pytest
from trl import ModelConfig

from cppo_trl.launch.plan import Layout, count_parameters, state_bytes
from tests.launch.conftest import QWEN3, qwen3

SMALL, LARGE, MOE = 1_720_574_976, 8_190_735_360, 30_532_122_624  # parameters of Qwen3-1.7B, 8B and 30B-A3B


@pytest.mark.parametrize("name", QWEN3)
def test_parameters_are_those_that_the_model_cards_give(name):
    total, trained = count_parameters(qwen3(name), ModelConfig())
    assert total / 1e9 == pytest.approx(QWEN3[name][-1], abs=0.051)
    assert trained == total


def test_with_lora_the_adapters_alone_are_trained():
    model = ModelConfig(use_peft=True, lora_r=16, lora_target_modules="all-linear")
    # 28 x 16 x (4096 + 3072 + 3072 + 4096 + 3 x 8192): in and out of the seven matrices of a layer
    assert count_parameters(qwen3("Qwen/Qwen3-1.7B"), model) == (SMALL + 17_432_576, 17_432_576)


@pytest.mark.parametrize(
    ("total", "trained", "sharding", "processes", "weight_bytes", "expected"),
    [
        (SMALL, SMALL, "none", 1, 4, 27.53e9),  # 16 P
        (SMALL, SMALL, "ddp", 8, 4, 34.41e9),  # 20 P, with DDP's buckets
        (SMALL + 17_432_576, 17_432_576, "none", 1, 2, 3.720e9),  # 2 P + 16 adapters
        (LARGE, LARGE, "fsdp2", 8, 4, 16.38e9),  # 16 P / 8
        (MOE, MOE, "fsdp2", 16, 4, 30.53e9),  # 16 P / 16
        (LARGE, LARGE, "zero2", 8, 4, 30.71e9),  # 2 P + 14 P / 8
        (LARGE, LARGE, "zero3", 8, 4, 16.38e9),  # 16 P / 8
    ],
)
def test_bytes_of_known_models_by_hand(total, trained, sharding, processes, weight_bytes, expected):
    assert state_bytes(total, trained, Layout(processes, sharding), weight_bytes) == pytest.approx(expected, rel=1e-3)
