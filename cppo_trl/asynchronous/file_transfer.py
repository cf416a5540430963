"""All weights to a vLLM server through a file, for machines without NCCL; with LoRA, TRL syncs the adapter by itself.

The server needs ``VLLM_SERVER_DEV_MODE=1`` in its environment and
``--worker-extension-cls cppo_trl.asynchronous.file_transfer.LoadFromFile``.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests
from safetensors.torch import load_file, save_file
from torch import Tensor


def load_on_server(server_url: str, weights: dict[str, Tensor], path: Path, timeout: float) -> None:
    """Write weights to a file and have the server's `LoadFromFile` read them.

    Args:
        server_url: URL of the vLLM server.
        weights: by the model's names.
        path: file that the server can read.
        timeout: time limit of the request, in seconds.

    Raises:
        requests.HTTPError: if the server refuses.
    """
    save_file(weights, path)
    call = {"method": "load_from_file", "args": [str(path.absolute())]}
    requests.post(f"{server_url}/collective_rpc", json=call, timeout=timeout).raise_for_status()


class FileTransfer:
    """A ``weight_transfer`` for `AsyncCPPOTrainer`. Each sync writes the whole model.

    Args:
        server_url: URL of the vLLM server, ``vllm_server_base_url``.
        path: file that the server can read.
        timeout: time limit of each request, in seconds.
    """

    def __init__(self, server_url: str, path: Path, timeout: float = 600.0) -> None:
        from trl.experimental.async_grpo.vllm_client import VLLMClient  # noqa: PLC0415 (not in the server)

        client = VLLMClient(server_url)
        self._url, self._path, self._timeout = client.server_url, path, timeout
        self.init_weight_transfer, self.pause, self.resume = client.wait_for_server_ready, client.pause, client.resume

    def send_weights(self, iterator: Iterator[tuple[str, Tensor]]) -> None:
        """Write the weights and have the server read them."""
        weights = {name: weight.cpu().clone().contiguous() for name, weight in iterator}
        load_on_server(self._url, weights, self._path, self._timeout)

    def destroy(self) -> None:
        """Nothing is held."""


class LoadFromFile:
    """Mixed into the server's workers."""

    model_runner: Any

    def load_from_file(self, path: str) -> None:
        """Load the weights of a safetensors file."""
        self.model_runner.model.load_weights(load_file(path).items())
