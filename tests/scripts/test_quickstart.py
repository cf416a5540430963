"""`make quickstart`, small."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.conftest import RECIPE, ROOT, flags, launch


def quickstart(directory, *options):
    fields = {"config": RECIPE, "output_dir": directory / "run", "task_dir": directory / "task", "terms": 3}
    fields |= {"max_steps": 32, "train_problems": 64, "test_problems": 8, "warm_start_steps": 5}
    return [ROOT / "scripts/quickstart.py", *flags(fields), *options]


def test_quickstart_end_to_end_keeps_an_earlier_run(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "precious.txt").write_text("an earlier run")
    command = quickstart(tmp_path, "--cppo_delta", "0.04")
    first = launch(*command)
    assert first.returncode == 0, first.stderr[-3000:]
    assert "holds an earlier run: it is kept as" in first.stdout
    assert [p.name for p in tmp_path.glob("run-2*/*")] == ["precious.txt"]
    for name in (
        "model.safetensors",
        "tokenizer.json",
        "README.md",
        "trainer_state.json",
        "curves.png",
        "results.json",
    ):
        assert (out / name).stat().st_size > 100
    last_lines = first.stdout.strip().splitlines()[-6:]
    assert last_lines[0].startswith("| ")
    assert "\n".join(last_lines) in (out / "README.md").read_text()
    results = json.loads((out / "results.json").read_text())
    accuracy = {"greedy", "avg_at_16", "avg_at_16_stderr"}
    assert results["before"].keys() == results["after"].keys() == results["without"]["after"].keys() == accuracy
    assert results["rollouts"] == 2
    # the two runs differ in the trust region alone
    configs = [json.loads((tmp_path / name / "run.json").read_text())["config"] for name in ("run", "run-without")]
    differing = {name for name in configs[0] if configs[0][name] != configs[1].get(name)}
    assert [config["trust_region"] for config in configs] == ["cppo", "none"]
    assert configs[0]["cppo_delta"] == 0.04
    assert all(name.startswith("cppo_") for name in differing - {"trust_region", "output_dir"})
    # the same seed gives the same numbers
    second = launch(*command)
    assert second.returncode == 0, second.stderr[-3000:]
    assert f"Warm start: found in {tmp_path / 'task'}" in second.stdout
    again = json.loads((out / "results.json").read_text())
    del results["train_seconds"], again["train_seconds"]
    assert again == results


@pytest.mark.parametrize(
    ("victim", "message"),
    [("first", "interrupted. Both runs are stopped."), ("second", "The run without a trust region failed")],
)
def test_quickstart_stops_both_runs_with_one_line(tmp_path, victim, message):
    command = [sys.executable, *map(str, quickstart(tmp_path, "--max_steps", "100000"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # else ignored where pytest runs in the background
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        profile = tmp_path / "run/trust_region.jsonl"  # written once training has begun
        while process.poll() is None and not profile.exists():
            time.sleep(0.2)
        (second,) = (p for p in psutil.Process(process.pid).children() if "train.py" in " ".join(p.cmdline()))
        if victim == "first":
            process.send_signal(signal.SIGINT)
        else:
            second.kill()
        output, _ = process.communicate(timeout=120)
    assert process.returncode == (130 if victim == "first" else 1)
    assert "Traceback" not in output
    assert output.strip().splitlines()[-1].startswith(f"quickstart.py: {message}")
    assert not second.is_running()
