"""What a trust region is for: from one warm start, CPPO and no trust region train side by side, a core each.

    python scripts/quickstart.py --config configs/quickstart/cppo.yaml --seed 1

Makes the task and the warm start, trains and evaluates both, and prints a table. Every field of the recipe is a flag.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: a run takes one core

import datasets
import torch
import transformers
import yaml
from matplotlib.figure import Figure
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, HfArgumentParser, PrinterCallback, TrainerCallback

from cppo_trl import CPPOConfig
from cppo_trl.data import arithmetic
from cppo_trl.evaluation import Accuracy, evaluate
from cppo_trl.fields import documented
from cppo_trl.launch.command import one_line_errors
from cppo_trl.launch.training import parse_arguments, train
from cppo_trl.output.checkpoints import RunError
from cppo_trl.output.hub import push
from cppo_trl.output.run_files import command_line, versions
from cppo_trl.rewards import accuracy_reward
from outcome import Log, markdown, masked, rewards, rollouts_of


@documented
@dataclass
class TaskArguments:
    """The built-in task.

    Args:
        task_dir: where data and warm start are kept.
        terms: digits in each sum.
        error_rate: probability of a wrong step in a demonstration.
        forgotten_carry: probability that a demonstration forgets the carry of a step that adds 9.
        warm_start_steps: updates of the supervised warm start.
        warm_start_seed: of problems and warm start; --seed is of the training.
        train_problems: problems to train on.
        test_problems: held-out problems.
    """

    task_dir: str = "outputs/quickstart-task"
    terms: int = 6
    error_rate: float = 0.15
    forgotten_carry: float = 0.6
    warm_start_steps: int = 800
    warm_start_seed: int = 0
    train_problems: int = 8000
    test_problems: int = 256


def prepare_task(task: TaskArguments) -> tuple[Path, Path]:
    """Make data and warm start, or find them from an earlier run; return both directories."""
    directory = Path(task.task_dir)
    if task != TaskArguments(task.task_dir):
        directory /= "-".join(str(value) for value in astuple(task)[1:])
    data, model = directory / "data", directory / "warm_start"
    to_train_on, test = arithmetic.splits(task.train_problems, task.test_problems, task.terms, task.warm_start_seed)
    data.mkdir(parents=True, exist_ok=True)
    test.to_json(data / "test.jsonl")
    to_train_on.to_json(data / "train.jsonl")
    if (model / "config.json").exists():
        print(f"Warm start: found in {model}")
    else:
        print(f"Warm start: {task.warm_start_steps} supervised updates on demonstrations that contain errors")
        arithmetic.warm_start(
            model,
            terms=task.terms,
            error_rate=task.error_rate,
            forgotten_carry=task.forgotten_carry,
            seed=task.warm_start_seed,
            exclude=set(test["prompt"]),
            steps=task.warm_start_steps,
            hidden=64,
        )
    return data, model


def keep_earlier_run(output_dir: Path) -> None:
    """Move an earlier run out of the way and say so."""
    if output_dir.exists() and any(output_dir.iterdir()):
        kept = output_dir.with_name(f"{output_dir.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        print(f"{output_dir} holds an earlier run: it is kept as {kept}, and a new run is written to {output_dir}")
        output_dir.rename(kept)


def without_trust_region(arguments: Sequence[str], output_dir: Path) -> list[str]:
    """The arguments of the same run with ``trust_region: none``, which refuses the thresholds of other rules."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", required=True)
    for name in (f.name for f in fields(CPPOConfig) if f.name.startswith("cppo_")):
        parser.add_argument(f"--{name}", nargs="?")
    known, others = parser.parse_known_args(arguments)
    recipe = yaml.safe_load(Path(known.config).read_text(encoding="utf-8"))
    path = output_dir / "recipe.yaml"
    output_dir.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({name: value for name, value in recipe.items() if not name.startswith("cppo_")}))
    changes = {"config": path, "output_dir": output_dir, "trust_region": "none", "push_to_hub": False}
    return [*others, *(word for name, value in changes.items() for word in (f"--{name}", str(value)))]


def held_out(model: Any, data: Path, config: CPPOConfig) -> Accuracy:
    """Accuracy on the held-out problems."""
    rows = [json.loads(line) for line in (data / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    return evaluate(
        model,
        arithmetic.tokenizer(),
        [row["prompt"] for row in rows],
        [row["solution"] for row in rows],
        accuracy_reward,
        temperature=config.temperature,
        max_new_tokens=config.max_completion_length,
        seed=config.seed,
    )


class SecondRun(TrainerCallback):
    """A run of ``scripts/train.py`` in a process of its own; as a callback of the first, it shows how far both are.

    Args:
        arguments: of the script.
        output_dir: of the run; what it prints goes to ``output.txt`` there.
    """

    def __init__(self, arguments: Sequence[str], output_dir: Path) -> None:
        self.output, self.table = output_dir / "output.txt", ""
        self.bars: list[tqdm] = []
        command = [sys.executable, "-u", str(Path(__file__).with_name("train.py")), *arguments]
        with self.output.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)

    def card_sections(self) -> dict[str, str]:
        """The table on the model card of the first run, once it is known."""
        return {"Evaluation": self.table} if self.table else {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the trainer of the first run."""
        total = round(args.max_steps / args.updates_per_rollout)
        self.bars = [tqdm(total=total, desc=f"{name:>15}", unit="rollout") for name in ("CPPO", "no trust region")]

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Called by the trainer of the first run."""
        if "reward" in logs:
            self.bars[0].update()
            self.bars[0].set_postfix_str(
                f"reward {logs['reward']:.3f}, masked {100 * logs.get('cppo/masked', 0):.1f} %"
            )
        self.show()

    def show(self) -> None:
        """Show how far the second run is.

        Raises:
            RunError: if it has failed.
        """
        output = self.output.read_text(encoding="utf-8")
        rewards = re.findall(r"'reward': '?([\d.]+)", output)
        if len(rewards) > self.bars[1].n:
            self.bars[1].update(len(rewards) - self.bars[1].n)
            self.bars[1].set_postfix_str(f"reward {float(rewards[-1]):.3f}")
        if self.process.poll():
            reason = (output.strip() or f"exit status {self.process.returncode}").splitlines()[-1]
            raise RunError(f"The run without a trust region failed and both are stopped: {reason} ({self.output})")

    def wait(self) -> None:
        """Show the second run until it has ended."""
        while self.process.poll() is None:
            self.show()
            time.sleep(0.5)
        self.show()

    def stop(self) -> None:
        """End the second run if it still goes on, and the progress bars."""
        self.process.terminate()
        self.process.wait()
        for bar in self.bars:
            bar.close()


def draw(path: Path, logs: Sequence[Log], other: Sequence[Log], before: Accuracy) -> None:
    """Draw the training reward of both runs."""
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    for name, rows, shade in (("CPPO", logs, "C0"), ("no trust region", other, "C3")):
        axes.plot(range(1, len(rows) + 1), [row["reward"] for row in rows], color=shade, label=name)
    axes.axhline(before.avg_at_k, color="gray", linestyle="--", linewidth=1, label="warm start")
    axes.set(xlabel="rollout", ylabel="share of right answers (training reward)", ylim=(0, 1))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def table(before: Accuracy, after: Accuracy, without: Accuracy, results: Mapping[str, Any]) -> str:
    """The result in markdown."""
    accuracies = (before, after, without)
    rows: dict[str, Sequence[str]] = {
        "greedy accuracy": [f"{a.greedy:.3f}" for a in accuracies],
        "avg@16 (± standard error)": [f"{a.avg_at_k:.3f} ± {a.avg_at_k_stderr or 0:.3f}" for a in accuracies],
        "training reward, first and last 10 rollouts": [
            "",
            *(f"{run['reward_first_10']:.3f} → {run['reward_last_10']:.3f}" for run in (results, results["without"])),
        ],
        "tokens masked": ("", f"{100 * results['masked']:.2f} %", "none"),
    }
    return markdown(("warm start", "CPPO", "no trust region"), rows)


def main() -> None:
    """Run everything and print the table."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the second run must not outlive this one
    warnings.filterwarnings("ignore", category=FutureWarning)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()  # of loading and saving; training keeps its bars
    task, arguments = HfArgumentParser(TaskArguments).parse_args_into_dataclasses(return_remaining_strings=True)
    script, config, model, mixture = parse_arguments(arguments)
    output_dir = Path(config.output_dir)
    second_dir = output_dir.with_name(f"{output_dir.name}-without")
    keep_earlier_run(output_dir)
    keep_earlier_run(second_dir)
    data, warm_start = prepare_task(task)
    script.dataset_name, model.model_name_or_path = str(data), str(warm_start)
    start = ["--dataset_name", str(data), "--model_name_or_path", str(warm_start)]
    second_arguments = without_trust_region([*arguments, *start], second_dir)

    print(f"Evaluating the warm start on {task.test_problems} held-out problems")
    before = held_out(AutoModelForCausalLM.from_pretrained(warm_start), data, config)
    second = SecondRun(second_arguments, second_dir)
    try:
        trainer = train(script, config, model, mixture, callbacks=[second], drop_callbacks=[PrinterCallback])
        second.wait()
    finally:
        second.stop()
    after = held_out(trainer.model, data, config)
    without = held_out(AutoModelForCausalLM.from_pretrained(second_dir), data, config)

    logs, other = rollouts_of(output_dir), rollouts_of(second_dir)
    results = {
        "before": before.as_dict(),
        "after": after.as_dict(),
        **rewards(logs),
        "train_seconds": next(r["train_runtime"] for r in trainer.state.log_history if "train_runtime" in r),
        "rollouts": len(logs),
        "seed": config.seed,
        **masked(logs),
        "without": {"after": without.as_dict(), **rewards(other)},
        "command": command_line(sys.argv),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    draw(output_dir / "curves.png", logs, other, before)
    second.table = table(before, after, without, results)
    trainer.create_model_card(model_name="CPPO quickstart")
    (output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(
        f"\n{output_dir}: model, tokenizer, README.md (model card), trainer_state.json (log), curves.png, results.json"
        f"\n{second_dir}: the same run without a trust region"
        f"\nThe report page: python -m cppo_trl.report {output_dir}"
        f"\n\n{len(logs)} rollouts in {results['train_seconds']:.0f} s, {task.test_problems} held-out problems:\n"
        f"\n{second.table}"
    )
    push(trainer)
    trainer.end()


if __name__ == "__main__":
    with one_line_errors("Both runs are stopped. A warm start that was finished is kept for the next run."):
        main()
