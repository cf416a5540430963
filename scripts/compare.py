"""Compare trust regions on the built-in task: methods x seeds x settings, resumable, in parallel.

    python scripts/compare.py --config configs/compare/main.yaml --processes 2

Each finished run is a line of OUTPUT/<name>.jsonl; the same command goes on where it was interrupted. At the end, or
with --report at any time, OUTPUT/<name>.md and the figures are written from the lines.
"""

import argparse
import gc
import json
import multiprocessing
import os
import time
import warnings
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: a run takes one core
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**30))  # the workers keep their memory: a run is 1.2x as fast
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**30))
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import datasets
import torch
import transformers
from tqdm.auto import tqdm

from cppo_trl.report.study import write_report
from cppo_trl.study import Run, Study, Task, carry_out, digest, finished, prepare

_rollouts_done: Any = None


def _start_worker(counter: Any) -> None:
    global _rollouts_done  # noqa: PLW0603
    _rollouts_done = counter
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    os.environ["TQDM_DISABLE"] = "1"


def _count_rollout() -> None:
    with _rollouts_done.get_lock():
        _rollouts_done.value += 1


def _work(run: Run, task: Task, warm_start: Path) -> dict[str, Any]:
    with open(os.devnull, "w") as silence:
        os.dup2(silence.fileno(), 1)  # the start-up table of every run
    line = carry_out(run, task, warm_start, _count_rollout)
    gc.collect()  # a trainer holds itself in a cycle
    return line


def _carry_out_all(runs: list[Run], study: Study, warm_start: Path, lines: Path, processes: int) -> list[str]:
    """Make the runs, appending each line as it comes; return what failed."""
    context = multiprocessing.get_context("spawn")
    counter, failed = context.Value("l", 0), []
    bar = tqdm(total=sum(run.rollouts for run in runs), unit="rollout", desc=study.name, smoothing=0.02)
    with ProcessPoolExecutor(processes, context, initializer=_start_worker, initargs=(counter,)) as pool:
        waiting: dict[Future[dict[str, Any]], Run] = {pool.submit(_work, r, study.task, warm_start): r for r in runs}
        try:
            while waiting:
                done, _ = wait(waiting, timeout=2, return_when=FIRST_COMPLETED)
                bar.update(counter.value - bar.n)
                for future in done:
                    run = waiting.pop(future)
                    try:
                        line = future.result()
                    except Exception as error:  # the other runs go on
                        failed.append(f"{run.key}: {type(error).__name__}: {error}")
                        continue
                    with lines.open("a") as file:
                        file.write(json.dumps(line) + "\n")
                    last = line["evaluations"][-1][1]
                    bar.write(
                        f"{run.setting}, {run.method}, seed {run.seed}: avg@16 {last:.3f}, {line['seconds']:.0f} s"
                    )
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    bar.close()
    return failed


def command_line() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="the study's YAML file")
    parser.add_argument("--output", type=Path, default=Path("outputs/compare"), help="lines, table and figures")
    parser.add_argument("--processes", type=int, help="runs at a time, one core each; default: all cores")
    parser.add_argument("--warm_start", type=Path, help="the checkpoint to begin from; default: one made for the task")
    parser.add_argument("--report", action="store_true", help="make no run, only the report of those finished")
    return parser


def main() -> None:
    """Run what is missing, then write the report."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    arguments = command_line().parse_args()
    study = Study.load(arguments.config)
    arguments.output.mkdir(parents=True, exist_ok=True)
    lines = arguments.output / f"{study.name}.jsonl"
    done = finished(lines, study)
    runs = [run for run in study.runs if run.key not in done]
    print(f"{study.name}: {len(study.runs)} runs, {len(study.runs) - len(runs)} of them finished")
    failed = []
    if runs and not arguments.report:
        started = time.perf_counter()
        warm_start = arguments.warm_start
        if warm_start is None:
            print("Warm start: made once, kept in outputs/compare-tasks")
            warm_start = prepare(study.task, Path("outputs/compare-tasks"))
        finished(lines, study, digest(warm_start))
        processes = arguments.processes or os.cpu_count() or 1
        failed = _carry_out_all(runs, study, warm_start, lines, processes)
        print(f"{len(runs) - len(failed)} runs in {(time.perf_counter() - started) / 60:.0f} minutes")
    written = write_report(list(finished(lines, study).values()), arguments.output, study.name)
    print("\n".join(f"wrote {path}" for path in written))
    if failed:
        raise SystemExit("These runs failed; the same command makes them again:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
