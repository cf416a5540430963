"""Shapes and memory against models on the meta device, autograd's own count, and numbers worked by hand."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from cppo_trl.launch.memory import (
    GIB,
    MODEL_SHAPES,
    Layout,
    ModelShape,
    Workload,
    activations,
    estimate,
    fused_head,
    generation,
    kept_rollout,
    kv_bytes,
    layer_activations,
    model_states,
    vllm_minimum,
)

SMALL, LARGE, MOE = (MODEL_SHAPES[f"Qwen/Qwen3-{name}"] for name in ("1.7B", "8B", "30B-A3B"))
WORK = Workload(rows=2, rollout_rows=64, prompt_tokens=1024, completion_tokens=8192, topk=20)


def on_meta(shape, layers=None):
    fields = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "num_hidden_layers": layers or shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "tie_word_embeddings": shape.tied,
    }
    if shape.experts:
        fields |= {"moe_intermediate_size": shape.feed_forward, "num_experts": shape.experts}
        config = Qwen3MoeConfig(num_experts_per_tok=shape.active_experts, **fields)
    else:
        config = Qwen3Config(intermediate_size=shape.feed_forward, **fields)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", [name for name in MODEL_SHAPES if not name.endswith("-Base")])
def test_parameters_are_those_of_the_model(name):
    assert MODEL_SHAPES[name].parameters == sum(p.numel() for p in on_meta(MODEL_SHAPES[name]).parameters())


def test_the_table_agrees_with_the_sizes_that_the_model_cards_give():
    cards = {"0.6B": 0.6, "1.7B": 1.7, "4B": 4.0, "8B": 8.2, "14B": 14.8, "30B-A3B": 30.5}  # billions
    for name, billions in cards.items():
        assert MODEL_SHAPES[f"Qwen/Qwen3-{name}"].parameters / 1e9 == pytest.approx(billions, abs=0.051)


@pytest.mark.parametrize("modules", [None, "all-linear", ["q_proj", "down_proj"]])
def test_lora_parameters_are_those_of_peft(modules):
    model = get_peft_model(on_meta(SMALL, layers=2), LoraConfig(r=16, target_modules=modules, task_type="CAUSAL_LM"))
    count = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert SMALL.lora_parameters(16, modules) == count * SMALL.layers // 2


@pytest.mark.parametrize("experts", [0, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_saves_what_autograd_says(dtype, experts):
    shape = ModelShape(192, 1, 6, 2, 32, 320, 64, 1024, True, experts, 2 if experts else 0)
    model = on_meta(shape).to(dtype).to_empty(device="cpu")
    rows, length = 2, 52  # their product is no width of the layer: saved weights are told from activations by shape
    hidden = torch.randn(rows, length, shape.hidden, dtype=dtype, requires_grad=True)
    position = torch.randn(1, length, shape.head_dim, dtype=dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    widths = {tuple(sorted(p.shape)) for p in model.parameters() if p.dim() > 1}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tuple(sorted(tensor.shape)) not in widths:
            saved[storage.data_ptr()] = storage  # held, so that its address stays its own
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        model.model.layers[0](hidden, position_embeddings=(position, position), attention_mask=None)
    measured = sum(storage.nbytes() for storage in saved.values()) / (rows * length)
    assert layer_activations(shape, dtype.itemsize) == pytest.approx(measured, rel=0.15)


def total(shape, sharding, processes, work=WORK):
    return sum(model_states(shape, Layout(processes, sharding), work).values())


def test_states_of_known_models_by_hand():
    assert SMALL.parameters == 1_720_574_976
    assert LARGE.parameters == 8_190_735_360
    states = model_states(SMALL, Layout(), WORK)
    assert states["weights"] + states["gradients"] + states["optimizer"] == 16 * 1_720_574_976  # 27.5e9
    assert states["buckets"] == 0
    # autocast's bf16 copies of the 1.41 B parameters outside the embedding
    assert states["gathered or cast weights"] == pytest.approx(2 * (1_720_574_976 - 151_936 * 2048), rel=1e-5)
    assert total(SMALL, "ddp", 8) == total(SMALL, "none", 1) + 4 * 1_720_574_976  # DDP's buckets
    # 8B by FSDP2 over 8: 16 P / 8 = 16.38e9; two layers of 0.193 B and two embeddings of 0.622 B in bf16: 3.26e9
    assert total(LARGE, "fsdp2", 8) == pytest.approx(16.38e9 + 3.26e9, rel=2e-3)
    # 8B by ZeRO-2 over 8: 2 P + (2 + 12) P / 8 = 16.38e9 + 14.33e9, and 2e9 of buckets
    assert total(LARGE, "zero2", 8) == pytest.approx(32.71e9, rel=2e-3)
    # 8B by ZeRO-3 over 8: 16 P / 8, buckets and a billion live parameters
    assert total(LARGE, "zero3", 8) == pytest.approx(16.38e9 + 4e9, rel=2e-3)


def test_lora_keeps_gradients_and_moments_of_the_adapters_only():
    adapters = SMALL.lora_parameters(16, "all-linear")
    assert adapters == 17_432_576  # 28 x 16 x (4096 + 3072 + 3072 + 4096 + 3 x 8192)
    work = Workload(4, 256, 512, 1024, weight_bytes=2, lora_parameters=adapters)
    states = model_states(SMALL, Layout(), work)
    assert states["gradients"] + states["optimizer"] == 12 * adapters
    assert states["weights"] == 2 * SMALL.parameters + 2 * SMALL.head + 4 * adapters  # the head is fp32


def test_work_by_hand():
    tokens = 2 * 9216
    checkpoints = tokens * 28 * 2048 * 4  # 4.2e9: the fp32 input of 28 layers
    layer = tokens * (26 * 2048 + 10 * (2048 + 1024) + 8 * 6144)
    assert activations(SMALL, Layout(8, "ddp"), WORK) == checkpoints + layer
    # fp32 hidden states and their gradient; a tile of 4096 x 32768 logits; its rows of the head; the head's gradient
    by_hand = 16_384 * 2048 * 8 + 4096 * 32_768 * 4 + 32_768 * 2048 * 4 + 151_936 * 2048 * 4
    assert fused_head(SMALL, Layout(8, "ddp"), WORK) == by_hand
    assert kv_bytes(SMALL) == 114_688  # 2 x 28 x 1024 x 2
    assert kept_rollout(WORK) == 64 * (16 * 9216 + (4 + 168) * 8192)
    assert vllm_minimum(MOE, 8, 17_408) == 2 * MOE.parameters / 8 + 17_408 * kv_bytes(MOE) / 4 + 1.5 * GIB
    rows = Workload(8, 64, 200, 512, weight_bytes=2)
    assert generation(SMALL, Layout(), rows) == 64 * 712 * 114_688 + 3 * 64 * 151_936 * 4


def test_peaks_count_what_is_held_at_that_moment():
    asleep = estimate(SMALL, Layout(8, "ddp"), WORK, engine=30 * GIB)
    awake = estimate(SMALL, Layout(8, "ddp"), WORK, engine=30 * GIB, engine_stays=True)
    assert awake.update_peak - asleep.update_peak == 30 * GIB
    assert awake.rollout_peak == asleep.rollout_peak == asleep.peak < awake.peak == awake.update_peak
    # weights 4 P, moments 8 P, DDP's buckets 4 P; vLLM; the kept rollout; 1.5 GiB for CUDA
    assert asleep.rollout_peak == 16 * SMALL.parameters + 30 * GIB + kept_rollout(WORK) + 1.5 * GIB
    more = Workload(4, 64, 1024, 8192, topk=20)
    assert estimate(SMALL, Layout(8, "ddp"), more).update_peak > asleep.update_peak
