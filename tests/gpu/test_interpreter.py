"""TRL's Triton kernels run by Triton's interpreter, in a process of its own: `make test-triton` installs Triton."""

import sys
from importlib.util import find_spec

import pytest

from tests.conftest import ROOT, launch
from tests.gpu.conftest import INTERPRETED

PLACE = ROOT / ".triton"
MISSING = find_spec("triton") is None and not (PLACE / "triton").is_dir()


@pytest.mark.skipif(MISSING or INTERPRETED, reason="needs Triton: make test-triton")
def test_the_kernels_under_the_interpreter():
    command = ["-m", "pytest", "-p", "no:cacheprovider", "tests/gpu/test_head.py", "tests/gpu/test_step.py"]
    paths = ":".join(str(path) for path in [ROOT, PLACE, *sys.path] if str(path))
    result = launch(*command, PYTHONPATH=paths, TRITON_INTERPRET="1", CPPO_TEST_DEVICE="cpu")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    assert "10 passed, 2 skipped" in result.stdout
