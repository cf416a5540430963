"""Compare trust regions on the built-in task: methods x seeds x settings, resumable, in parallel.

    python scripts/study/compare.py --config scripts/study/main.yaml --processes 2

Each finished run is one line of OUTPUT/<name>.jsonl; repeating the command resumes an interrupted study. Tables and
figures are written from these lines at the end, or at any time with --report.
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

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: one core per run
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**30))  # workers keep freed memory: 1.2x faster
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**30))
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import datasets
import torch
import transformers
from tqdm.auto import tqdm

from study import Study, StudyRun, Task, digest, finished, prepare, train
from tables import write_tables

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


def _work(run: StudyRun, task: Task, warm_start: Path) -> dict[str, Any]:
    with open(os.devnull, "w") as silence:
        os.dup2(silence.fileno(), 1)  # the start-up table of every run
    record = train(run, task, warm_start, _count_rollout)
    gc.collect()  # a trainer is part of a reference cycle
    return record


def _train_all(runs: list[StudyRun], study: Study, warm_start: Path, lines: Path, processes: int) -> list[str]:
    """Train the runs, append each record as it arrives, and return what failed."""
    context = multiprocessing.get_context("spawn")
    counter, failed = context.Value("l", 0), []
    bar = tqdm(total=sum(run.rollouts for run in runs), unit="rollout", desc=study.name, smoothing=0.02)
    with ProcessPoolExecutor(processes, context, initializer=_start_worker, initargs=(counter,)) as pool:
        pending: dict[Future[dict[str, Any]], StudyRun] = {
            pool.submit(_work, r, study.task, warm_start): r for r in runs
        }
        try:
            while pending:
                done, _ = wait(pending, timeout=2, return_when=FIRST_COMPLETED)
                bar.update(counter.value - bar.n)
                for future in done:
                    run = pending.pop(future)
                    try:
                        record = future.result()
                    except Exception as error:  # the other runs continue
                        failed.append(f"{run.key}: {type(error).__name__}: {error}")
                        continue
                    with lines.open("a") as file:
                        file.write(json.dumps(record) + "\n")
                    accuracy, seconds = record["evaluations"][-1][1], record["seconds"]
                    bar.write(f"{run.setting}, {run.method}, seed {run.seed}: avg@16 {accuracy:.3f}, {seconds:.0f} s")
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    bar.close()
    return failed


def command_line() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the study")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/study"), help="directory of records, tables, figures"
    )
    parser.add_argument("--processes", type=int, help="number of parallel runs, one core each (default: all cores)")
    parser.add_argument("--warm_start", type=Path, help="initial checkpoint (default: train one for the task)")
    parser.add_argument("--report", action="store_true", help="only write tables and figures of the finished runs")
    return parser


def main() -> None:
    """Train the runs that are missing, then write tables and figures."""
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
        warm_start = arguments.warm_start or prepare(study.task, Path("outputs/study-tasks"))
        finished(lines, study, digest(warm_start))
        failed = _train_all(runs, study, warm_start, lines, arguments.processes or os.cpu_count() or 1)
        print(f"{len(runs) - len(failed)} runs in {(time.perf_counter() - started) / 60:.0f} minutes")
    written = write_tables(list(finished(lines, study).values()), arguments.output, study.name)
    print("\n".join(f"wrote {path}" for path in written))
    if failed:
        raise SystemExit("These runs failed; repeat the command to retry them:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
