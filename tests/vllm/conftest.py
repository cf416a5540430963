"""vLLM on the CPU, colocated and as a server; `make test-vllm` sets its environment up.

vLLM must compute in fp32 as the trainer does, or the comparison would measure bf16. On a CPU it also packs weights
for oneDNN when it loads them, after which no new weights can be loaded: that is switched off.
"""

import contextlib
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

from cppo_trl import CPPOConfig
from cppo_trl.asynchronous.file_transfer import load_on_server
from tests.conftest import SMALL_RUN, character_tokenizer, digit_reward, tiny_data, tiny_model

ALPHABET = ["<pad>", "<eos>", *string.digits, *"+=", *string.ascii_letters]  # 66: many tokens rank beyond 20


def tokenizer():
    return character_tokenizer(ALPHABET)


def save_model(directory, tied):
    tiny_model(
        vocab_size=len(ALPHABET),
        head_dim=32,  # vLLM's CPU kernels take 32, 64, 80, ...
        initializer_range=0.2 if tied else 0.4,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    ).save_pretrained(directory)
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


class Server:
    """A vLLM server with ``model``, by default ``directory/model``; it can be killed and started at the same address.

    It starts in about half a minute; weights reach it through a file.
    """

    def __init__(self, directory, options, model="", **environment):
        self.directory, self.process = directory, None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        common = f"--host 127.0.0.1 --port {port} --dtype float32 --enforce-eager --logprobs-mode processed_logprobs"
        common += " --worker-extension-cls tests.vllm.server_worker.WeightsFromFile"
        program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model or directory / "model"]
        self.command = [*program, *common.split(), *options.split()]
        root = str(Path(__file__).parents[2])
        self.environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": root, **environment}

    def start(self):
        log = self.directory / "log"
        with log.open("a") as output:
            self.process = subprocess.Popen(
                self.command, stdout=output, stderr=output, env=self.environment, start_new_session=True
            )
        deadline = time.monotonic() + 400
        while not answers(f"{self.address}/health"):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"vLLM's server did not start:\n{log.read_text()[-4000:]}")
            time.sleep(1)

    def stop(self, how=signal.SIGTERM):
        """End the server and its engine, which is a process of its own."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, how)
        self.process.wait(60)


@contextlib.contextmanager
def running(server):
    """The server from its start to its end."""
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The address of a vLLM server with the model of `save_model`."""
    directory = tmp_path_factory.mktemp("server")
    save_model(directory / "model", tied=False)
    with running(Server(directory, "--max-model-len 64 --max-logprobs 20")) as started:
        yield started.address


def answers(address):
    try:
        return urllib.request.urlopen(address, timeout=5).status == 200
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


@pytest.fixture
def weights_by_file(tmp_path, monkeypatch):
    """Weights travel to a server by file: TRL's way for them needs CUDA."""
    from trl.generation.vllm_client import VLLMClient

    def update_named_params(client, metadata, named_params):
        weights = {name: param.detach().clone() for name, param in named_params}
        assert [name for name, *_ in metadata] == list(weights)
        load_on_server(client.base_url, weights, tmp_path / "weights.safetensors", timeout=60)

    monkeypatch.setattr(VLLMClient, "init_communicator", lambda client, device: None)
    monkeypatch.setattr(VLLMClient, "update_named_params", update_named_params)


@pytest.fixture
def with_server(tmp_path, weights_by_file, server):
    """Makes trainers that use the server, as `make_trainer`."""
    return partial(make_trainer, tmp_path, vllm_mode="server", vllm_server_base_url=server)
