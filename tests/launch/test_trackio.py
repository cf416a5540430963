"""A run that reports to Trackio, which keeps its data on this machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import RECIPE, ROOT, launch, small_run


def test_a_run_reports_its_metrics_to_trackio(task):
    pytest.importorskip("trackio")
    fields = ["--report_to", "trackio", "--project", "cppo", "--run_name", "tiny", "--logging_steps", "1"]
    environment = {"TRACKIO_DIR": str(task / "trackio")}
    result = launch(ROOT / "scripts/train.py", "--config", RECIPE, *small_run(task), *fields, **environment)
    assert result.returncode == 0, result.stderr[-3000:]
    metric = ["--project", "cppo", "--run", "tiny", "--metric", "train/cppo/divergence/mean", "--json"]
    command = [Path(sys.executable).with_name("trackio"), "get", "metric", *metric]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    reported = {row["step"]: row["value"] for row in json.loads(printed)["values"]}
    history = json.loads((task / "out/trainer_state.json").read_text())["log_history"]
    assert reported == {row["step"]: row["cppo/divergence/mean"] for row in history if "loss" in row}
