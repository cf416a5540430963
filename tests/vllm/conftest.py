"""A colocated vLLM on the CPU; `make test-vllm` sets its environment up.

vLLM must compute in fp32 as the trainer does, or the comparison would measure bf16. On a CPU it also packs weights
for oneDNN when it loads them, after which no new weights can be loaded: that is switched off.
"""

import copy
import os
import string
from functools import partial

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from cppo_trl import CPPOConfig
from tests.conftest import SMALL_RUN, digit_reward, tiny_data

ALPHABET = ["<pad>", "<eos>", *string.digits, *"+=", *string.ascii_letters]  # 66: many tokens rank beyond 20


def tokenizer():
    vocabulary = {token: index for index, token in enumerate(ALPHABET)}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>")


def save_model(directory, tied):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(ALPHABET),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,  # vLLM's CPU kernels take 32, 64, 80, ...
        initializer_range=0.2 if tied else 0.4,  # peaked enough that updates move the policy
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)
    tokenizer().save_pretrained(directory)


@pytest.fixture
def colocate(tmp_path, monkeypatch):
    """A trainer (of class ``cls``) with a colocated engine; keyword arguments go to its config."""
    import trl.generation.vllm_generation as host
    import vllm
    import vllm._custom_ops

    monkeypatch.setattr(vllm._custom_ops, "_supports_onednn", False)
    monkeypatch.setattr(host, "LLM", partial(vllm.LLM, dtype="float32", enforce_eager=True))

    def make(cls, tied=False, peft=None, **fields):
        save_model(tmp_path / "model", tied)
        defaults = {
            "output_dir": str(tmp_path / "output"),
            "use_vllm": True,
            "vllm_mode": "colocate",
            "vllm_max_model_length": 64,
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 12,
            "learning_rate": 1e-2,
            "max_steps": 6,
            **SMALL_RUN,
        }
        return cls(
            str(tmp_path / "model"),
            digit_reward,
            CPPOConfig(**{**defaults, **fields}),
            train_dataset=tiny_data(),
            processing_class=tokenizer(),
            peft_config=copy.deepcopy(peft),
        )

    yield make
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # TRL sets them: the next trainer would think it was launched
        os.environ.pop(name, None)
