"""The recipes' models, found without the Hub."""

import pytest
from transformers import Qwen3Config, Qwen3MoeConfig

from cppo_trl.launch import plan
from cppo_trl.launch.plan import dry_run
from tests.conftest import ROOT

# From the models' config.json: hidden and feed-forward size, layers, query heads, key-value heads, whether the LM head
# is the embedding, billions of parameters on the model card
QWEN3 = {
    "Qwen/Qwen3-0.6B": (1024, 3072, 28, 16, 8, True, 0.6),
    "Qwen/Qwen3-1.7B": (2048, 6144, 28, 16, 8, True, 1.7),
    "Qwen/Qwen3-8B": (4096, 12_288, 36, 32, 8, False, 8.2),
    "Qwen/Qwen3-30B-A3B": (2048, 768, 48, 32, 4, False, 30.5),
}


def qwen3(name):
    """The architecture of one of them, or of its base model."""
    hidden, feed_forward, layers, heads, groups, tied, _ = QWEN3[name.removesuffix("-Base")]
    fields = {"vocab_size": 151_936, "hidden_size": hidden, "num_hidden_layers": layers, "head_dim": 128}
    fields |= {"num_attention_heads": heads, "num_key_value_heads": groups, "tie_word_embeddings": tied}
    fields["max_position_embeddings"] = 32_768 if name.endswith("-Base") else 40_960
    if "A3B" in name:
        return Qwen3MoeConfig(moe_intermediate_size=feed_forward, num_experts=128, num_experts_per_tok=8, **fields)
    return Qwen3Config(intermediate_size=feed_forward, **fields)


@pytest.fixture(autouse=True)
def qwen3_on_the_hub(monkeypatch):
    """The dry run finds the configurations of the recipes' models."""
    find = plan.architecture_of

    def found(name):
        return qwen3(name) if str(name).removesuffix("-Base") in QWEN3 else find(name)

    monkeypatch.setattr(plan, "architecture_of", found)


def path_of(model):
    (path,) = ROOT.glob(f"configs/{model.split('/')[1].lower()}/paper-*/cppo.yaml")
    return path


def plan_of(path, layout=None, *arguments):
    layout = ["--accelerate_config", ROOT / f"configs/accelerate/{layout}.yaml"] if layout else []
    return dry_run([str(x) for x in ("--config", path, *layout, *arguments)])
