"""The GPU tests and the benchmark on a machine without network.

    python scripts/gpu_kit.py gather                          # here: .gpu-kit, to be copied there
    python3 .gpu-kit/gpu_kit.py run --out outputs/gpu         # there: at most ten minutes

``gather`` packs the committed checkout and the wheels in WHEELS, in constraints.txt's versions. ``run`` needs a Python
with torch, transformers' other requirements, peft, scipy and pytest. It installs into a folder of its own beside the
results, runs each step under a time limit, prints one table and writes gpu.json with all figures.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

WHEELS = "trl datasets transformers math-verify latex2sympy2_extended antlr4-python3-runtime dill multiprocess".split()
PLATFORMS = [f"manylinux{glibc}_x86_64" for glibc in ("_2_28", "_2_27", "_2_17", "2014", "1")]
TOTAL = 580  # seconds


def gather(kit: Path, python_version: str) -> None:
    """Fill the folder, and print its size."""
    root = Path(__file__).parents[1]
    shutil.rmtree(kit, ignore_errors=True)
    (kit / "wheels").mkdir(parents=True)
    subprocess.run(
        ["git", "archive", "--format=tar.gz", "-o", kit.absolute() / "checkout.tar.gz", "HEAD"], cwd=root, check=True
    )
    shutil.copy(__file__, kit)
    pins = dict(line.split("==") for line in (root / "constraints.txt").read_text().splitlines() if "==" in line)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--implementation", "cp", "--python-version", python_version, "-d", str(kit / "wheels")]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    subprocess.run([*command, *(f"{name}=={pins[name]}" for name in WHEELS)], check=True)
    for path in sorted(kit.rglob("*")):
        if path.is_file():
            print(f"{path.stat().st_size / 2**20:8.2f} MiB  {path.relative_to(kit)}")
    print(f"{sum(path.stat().st_size for path in kit.rglob('*') if path.is_file()) / 2**20:8.2f} MiB  in all")


def run_step(name: str, command: list[str], limit: float, log: Path, **how: Any) -> dict[str, Any]:
    """Run a command in a process group that is killed at the limit; its output goes to the log."""
    start = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, **how)
        try:
            code = process.wait(max(limit, 1))
            result = "passed" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            result = f"stopped at {limit:.0f} s"
    return {"step": name, "seconds": time.monotonic() - start, "result": result, "log": log.name}


def test_counts(report: Path) -> dict[str, Any]:
    """Counts of a JUnit report, the names of what failed, and why tests were skipped."""
    if not report.exists():
        return {}
    cases = list(ET.parse(report).iter("testcase"))
    failed = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skips = [skip.get("message", "") for case in cases for skip in case.iter("skipped")]
    passed = len(cases) - len(failed) - len(skips)
    return {"passed": passed, "failed": failed, "skipped": {reason: skips.count(reason) for reason in set(skips)}}


def run(kit: Path, out: Path, device: str) -> int:
    """Install, test, measure; returns the number of steps that did not pass."""
    out, work = out.absolute(), out.absolute() / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    with tarfile.open(kit / "checkout.tar.gz") as archive:
        archive.extractall(work / "checkout", filter="data")
    site, checkout, began = work / "site", work / "checkout", time.monotonic()
    paths = [str(site), str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "CPPO_TEST_DEVICE": device}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    if device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--no-compile",
        "--no-cache-dir",
    ]
    install += ["--target", str(site), "--find-links", str(kit / "wheels"), *WHEELS]
    test = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/gpu", f"--junitxml={out / 'tests.xml'}"]
    steps = [("install", install, 90), ("tests", test, 300)]
    shapes = {"0.6b": ["8192"], "1.7b": ["8192", "16384"]} if device == "cuda" else {"tiny": ["32", "64"]}
    bench = [sys.executable, "scripts/benchmark.py", "--repeats", "6", "--bf16", "--checkpointing"]
    only = ["--shape", next(iter(shapes)), "--parts", "rule", "length", "--json", str(out / "rule.json")]
    steps.append(("rule", [*bench, *only], 60))
    for shape, lengths in shapes.items():
        parts = ["--shape", shape, "--length", *lengths, "--parts", "step", "rollout", "state"]
        steps.append((shape, [*bench, *parts, "--json", str(out / f"{shape}.json")], 150))
    results = []
    for name, command, limit in steps:
        left = min(limit, TOTAL - (time.monotonic() - began))
        results.append(run_step(name, command, left, out / f"{name}.log", env=environment, cwd=checkout))
        print(f"{name}: {results[-1]['result']}", flush=True)
    tests = test_counts(out / "tests.xml")
    report = {"device": device, "python": sys.version, "steps": results, "tests": tests}
    report["benchmark"] = {f.stem: json.loads(f.read_text()) for f in out.glob("*.json") if f.name != "gpu.json"}
    (out / "gpu.json").write_text(json.dumps(report, indent=2) + "\n")
    shutil.rmtree(work)
    print("\n| step | seconds | result |\n|---|---|---|")
    for row in results:
        print(f"| {row['step']} | {row['seconds']:.0f} | {row['result']} |")
    print(f"| tests passed | | {tests.get('passed', 0)} |")
    for name in tests.get("failed", []):
        print(f"| failed | | {name} |")
    for reason, count in tests.get("skipped", {}).items():
        print(f"| skipped or expected to fail | | {count}: {reason} |")
    for row in results[2:]:
        print("\n" + "\n".join(x for x in (out / row["log"]).read_text().splitlines() if x.startswith("|")))
    return sum(row["result"] != "passed" for row in results)


def main() -> int:
    """Gather or run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    gathering, running = commands.add_parser("gather"), commands.add_parser("run")
    gathering.add_argument("--kit", type=Path, default=Path(".gpu-kit"))
    gathering.add_argument("--python-version", default="3.12", help="of the machine there")
    running.add_argument("--kit", type=Path, default=Path(__file__).parent)
    running.add_argument("--out", type=Path, default=Path("outputs/gpu"))
    running.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: tiny shapes, to try the kit")
    arguments = parser.parse_args()
    if arguments.command == "gather":
        gather(arguments.kit, arguments.python_version)
        return 0
    return run(arguments.kit.absolute(), arguments.out, arguments.device)


if __name__ == "__main__":
    sys.exit(main())
