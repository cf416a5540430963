import json
import re
import sys
from xml.sax.saxutils import quoteattr

from tests.conftest import ROOT, launch
from tests.gpu.conftest import DEVICE

sys.path.insert(0, str(ROOT / "scripts"))
import gpu_kit


def test_the_benchmark_runs_in_a_tiny_shape(tmp_path):
    sizes = ["--shape", "tiny", "--rows", "2", "--length", "32", "--repeats", "6", "--bf16", "--checkpointing"]
    parts = ["--parts", "state", "step", "rollout", "policy", "rule", "length", "topk"]
    visible = {} if DEVICE.type == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    result = launch(ROOT / "scripts/benchmark.py", *sizes, *parts, "--json", tmp_path / "x.json", **visible)
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads((tmp_path / "x.json").read_text())
    rows = {(row["part"].split(",")[0], row["variant"]): row for row in report["costs"]}
    for key in [("step", "CPPO, Top-K"), ("scoring a rollout", "Top-K"), ("step by K", "K = 80")]:
        assert 0.9 < rows[key]["peak_ratio"] < 1.3
        assert rows[key]["ratio_low"] <= rows[key]["ratio"] <= rows[key]["ratio_high"]
    (state,) = report["state"]
    assert 0.95 * state["held"] < state["planned"] < 1.05 * state["held"] < state["peak"]
    assert len(re.findall(r"^\| rule alone", result.stdout, re.MULTILINE)) == 8


def test_a_step_of_the_kit_is_stopped_at_its_limit_and_its_log_stays(tmp_path):
    def step(program, limit):
        return gpu_kit.run_step("x", [sys.executable, "-u", "-c", program], limit, tmp_path / "x.log")

    stopped = step("import time; print('here'); time.sleep(60)", 2)
    assert stopped["result"] == "stopped at 2 s"
    assert stopped["seconds"] < 20
    assert (tmp_path / "x.log").read_text() == "here\n"
    assert step("raise SystemExit(3)", 20)["result"] == "failed (3)"
    assert step("pass", 20)["result"] == "passed"


def test_the_kit_counts_tests_by_their_end(tmp_path):
    assert gpu_kit.test_counts(tmp_path / "none.xml") == {}
    skip = f"<skipped message={quoteattr('needs CUDA')}/>"
    cases = ["", "", "<failure/>", skip, skip]
    xml = "".join(f'<testcase name="t{i}">{inside}</testcase>' for i, inside in enumerate(cases))
    (tmp_path / "x.xml").write_text(f"<testsuites>{xml}</testsuites>")
    counts = gpu_kit.test_counts(tmp_path / "x.xml")
    assert counts == {"passed": 2, "failed": ["t2"], "skipped": {"needs CUDA": 2}}
