"""The device of these tests: ``CPPO_TEST_DEVICE``, else CUDA where there is one, else the CPU.

With ``TRITON_INTERPRET=1`` TRL takes its Triton branch on the CPU, and Triton interprets the kernels.
"""

import os
from functools import partial

import pytest
import torch
from trl.kernels import chunked_logprob
from trl.trainer import utils

DEVICE = torch.device(os.environ.get("CPPO_TEST_DEVICE", "cuda" if torch.cuda.is_available() else "cpu"))
if DEVICE.type == "cuda" and not torch.cuda.is_available():
    raise pytest.UsageError("CPPO_TEST_DEVICE=cuda, but torch sees no GPU")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NEEDS_CUDA = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs CUDA")
ON_REQUEST = pytest.mark.skipif(
    DEVICE.type != "cuda" and "CPPO_TEST_DEVICE" not in os.environ, reason="needs CUDA, or CPPO_TEST_DEVICE=cpu"
)


@pytest.fixture(autouse=True)
def triton_branch(monkeypatch):
    """TRL's kernels through Triton on the CPU, where its interpreter is on."""
    if INTERPRETED:
        for module in (chunked_logprob, utils):
            monkeypatch.setattr(module, "_use_triton", lambda device: True)


@pytest.fixture
def make_on_device(make_trainer):
    """`make_trainer`, on the device."""
    return partial(make_trainer, use_cpu=DEVICE.type == "cpu")


def on_device(batch):
    """A batch whose tensors are on the device."""
    return {name: value.to(DEVICE) for name, value in batch.items()}
