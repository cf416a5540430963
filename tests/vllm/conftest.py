"""vLLM on the CPU, colocated and as a server; `make test-vllm` sets its environment up.

vLLM must compute in fp32 as the trainer does, or the comparison would measure bf16. On a CPU it also packs weights
for oneDNN when it loads them, after which no new weights can be loaded: that is switched off.
"""

import copy
import os
import signal
import socket
import string
import subprocess
import sys
import time
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path

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


def make_trainer(directory, cls, tied=False, peft=None, config_cls=CPPOConfig, **fields):
    """A trainer of class ``cls`` whose rollouts vLLM makes; keyword arguments go to its config."""
    save_model(directory / "model", tied)
    defaults = {
        "output_dir": str(directory / "output"),
        "use_vllm": True,
        "vllm_max_model_length": 64,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 12,
        "learning_rate": 1e-2,
        "max_steps": 6,
        **SMALL_RUN,
    }
    return cls(
        str(directory / "model"),
        digit_reward,
        config_cls(**{**defaults, **fields}),
        train_dataset=tiny_data(),
        processing_class=tokenizer(),
        peft_config=copy.deepcopy(peft),
    )


@pytest.fixture
def colocate(tmp_path, monkeypatch):
    """Makes trainers with a colocated engine, as `make_trainer`."""
    import trl.generation.vllm_generation as host
    import vllm
    import vllm._custom_ops

    monkeypatch.setattr(vllm._custom_ops, "_supports_onednn", False)
    # few blocks: an engine in this process keeps its cache, and dozens of a gigabyte each would fill the machine
    engine = partial(vllm.LLM, dtype="float32", enforce_eager=True, num_gpu_blocks_override=256)
    monkeypatch.setattr(host, "LLM", engine)
    yield partial(make_trainer, tmp_path, vllm_mode="colocate")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # TRL sets them: the next trainer would think it was launched
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The address of a vLLM server with the model of `save_model`; it starts in about a minute."""
    directory = tmp_path_factory.mktemp("server")
    save_model(directory / "model", tied=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--model", str(directory / "model"), "--dtype", "float32", "--enforce-eager", "--max-model-len", "64"]
    command += ["--logprobs-mode", "processed_logprobs", "--max-logprobs", "20"]
    command += ["--worker-extension-cls", "tests.vllm.server_worker.WeightsFromFile"]
    environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    log = directory / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    try:
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 400
        while not answers(f"{address}/health"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"vLLM's server did not start:\n{log.read_text()[-4000:]}")
            time.sleep(1)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # its engine is a process of its own
        process.wait(60)


def answers(address):
    try:
        return urllib.request.urlopen(address, timeout=5).status == 200
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


@pytest.fixture
def with_server(tmp_path, monkeypatch, server):
    """Makes trainers that use the server, as `make_trainer`. Weights travel by file: TRL's way for them needs CUDA."""
    import requests
    from safetensors.torch import save_file
    from trl.generation.vllm_client import VLLMClient

    def update_named_params(client, metadata, named_params):
        weights = {name: param.detach().clone() for name, param in named_params}
        assert [name for name, *_ in metadata] == list(weights)
        save_file(weights, tmp_path / "weights.safetensors")
        call = {"method": "load_from_file", "args": [str(tmp_path / "weights.safetensors")]}
        requests.post(f"{client.base_url}/collective_rpc", json=call, timeout=60).raise_for_status()

    monkeypatch.setattr(VLLMClient, "init_communicator", lambda client, device: None)
    monkeypatch.setattr(VLLMClient, "update_named_params", update_named_params)
    return partial(make_trainer, tmp_path, vllm_mode="server", vllm_server_base_url=server)
