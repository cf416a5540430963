"""From nothing to a model that CPPO made better at arithmetic: task, warm start, training, evaluation, report.

python scripts/quickstart.py --config configs/quickstart/cppo.yaml --seed 1
"""

import json
import shlex
import sys
import time
import warnings
from dataclasses import astuple, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback

from cppo_trl.data import arithmetic
from cppo_trl.evaluation import Accuracy, evaluate
from cppo_trl.launch.command import one_line_errors, parse
from cppo_trl.launch.training import ARGUMENT_TYPES, train
from cppo_trl.output.hub import push
from cppo_trl.report.figures import plot_curves
from cppo_trl.rewards import accuracy_reward


@dataclass
class TaskArguments:
    """The built-in task."""

    task_dir: str = field(default="outputs/quickstart-task", metadata={"help": "Where data and warm start are kept."})
    terms: int = field(default=6, metadata={"help": "Digits in each sum."})
    error_rate: float = field(default=0.25, metadata={"help": "Probability of a wrong step in a demonstration."})
    warm_start_steps: int = field(default=800, metadata={"help": "Updates of the supervised warm start."})
    train_problems: int = field(default=8000, metadata={"help": "Problems to train on."})
    test_problems: int = field(default=256, metadata={"help": "Held-out problems."})


class RolloutProgress(TrainerCallback):
    """One progress bar over rollouts, with reward and masked share; and the table of the model card."""

    table = ""

    def card_sections(self) -> dict[str, str]:
        return {"Evaluation": self.table} if self.table else {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = tqdm(total=round(state.max_steps / args.updates_per_rollout), desc="CPPO training", unit="rollout")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "reward" in logs:
            self.bar.update()
            self.bar.set_postfix_str(f"reward {logs['reward']:.3f}, masked {100 * logs.get('cppo/masked', 0):.2f} %")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()


def prepare_task(task: TaskArguments, seed: int) -> tuple[Path, Path, datasets.Dataset]:
    """Make, or find from an earlier run, data and warm start; return both directories and the held-out split."""
    directory = Path(task.task_dir) / f"seed-{seed}"
    if task != TaskArguments(task.task_dir):
        directory = directory.with_name("-".join(str(value) for value in (*astuple(task)[1:], "seed", seed)))
    data, model = directory / "data", directory / "warm_start"
    to_train_on, test = arithmetic.splits(task.train_problems, task.test_problems, task.terms, seed)
    data.mkdir(parents=True, exist_ok=True)
    test.to_json(data / "test.jsonl")
    to_train_on.to_json(data / "train.jsonl")
    if (model / "config.json").exists():
        print(f"Warm start: found in {model}")
    else:
        print(f"Warm start: supervised training on demonstrations with {task.error_rate:.0%} wrong steps")
        arithmetic.warm_start(
            model,
            terms=task.terms,
            error_rate=task.error_rate,
            seed=seed,
            exclude=set(test["prompt"]),
            steps=task.warm_start_steps,
        )
    return data, model, test


def keep_earlier_run(output_dir: Path) -> None:
    """Move an earlier run out of the way, and say so."""
    if output_dir.exists() and any(output_dir.iterdir()):
        kept = output_dir.with_name(f"{output_dir.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        print(f"{output_dir} holds an earlier run: it is kept as {kept}, and a new run is written to {output_dir}")
        output_dir.rename(kept)


def main() -> None:
    """Run everything and print the table."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()  # of loading and saving; training keeps its bars
    task, script, config, model_args, mixture = parse((TaskArguments, *ARGUMENT_TYPES))
    output_dir = Path(config.output_dir)
    if not config.resume_from_checkpoint:
        keep_earlier_run(output_dir)
    data, warm_start, test = prepare_task(task, config.seed)
    script.dataset_name, model_args.model_name_or_path = str(data), str(warm_start)
    tokenizer = AutoTokenizer.from_pretrained(warm_start)

    def held_out(model: Any) -> Accuracy:
        return evaluate(
            model,
            tokenizer,
            test["prompt"],
            test["solution"],
            accuracy_reward,
            temperature=config.temperature,
            max_new_tokens=config.max_completion_length,
            seed=config.seed,
        )

    print(f"Evaluating the warm start on {len(test)} held-out problems")
    before = held_out(AutoModelForCausalLM.from_pretrained(warm_start))
    progress = RolloutProgress()
    trainer = train(script, config, model_args, mixture, callbacks=[progress], drop_callbacks=[PrinterCallback])
    print("Evaluating the trained model")
    after = held_out(trainer.model)

    history = [row for row in trainer.state.log_history if "reward" in row]
    rewards = [row["reward"] for row in history]

    def share(name: str) -> float:
        return sum(row.get(f"cppo/{name}", 0.0) for row in history) / len(history)

    masked = {name: share(name) for name in ("masked", "masked_by_threshold", "masked_by_budget")}
    results = {
        "before": before.as_dict(),
        "after": after.as_dict(),
        "reward_first_10": sum(rewards[:10]) / len(rewards[:10]),
        "reward_last_10": sum(rewards[-10:]) / len(rewards[-10:]),
        "train_seconds": next(r["train_runtime"] for r in trainer.state.log_history if "train_runtime" in r),
        "rollouts": len(history),
        "seed": config.seed,
        **masked,
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("cppo-trl", "trl", "transformers", "torch", "math-verify")},
    }
    table = "\n".join(
        [
            f"| {len(test)} held-out problems | before | after |",
            "|---|---|---|",
            f"| greedy accuracy | {before.greedy:.3f} | {after.greedy:.3f} |",
            f"| avg@16 (± standard error) | {before.avg_at_k:.3f} ± {before.avg_at_k_stderr:.3f} "
            f"| {after.avg_at_k:.3f} ± {after.avg_at_k_stderr:.3f} |",
        ]
    )
    plot_curves(
        history,
        output_dir / "curves.png",
        title=f"CPPO quickstart, seed {config.seed}",
        evaluation={"held-out avg@16 before": before.avg_at_k, "held-out avg@16 after": after.avg_at_k},
    )
    progress.table = table
    trainer.create_model_card(model_name="CPPO quickstart")
    (output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"\n{table}\n")
    print(
        f"training reward        {results['reward_first_10']:.3f} (first 10 rollouts) -> "
        f"{results['reward_last_10']:.3f} (last 10)"
    )
    print(
        f"tokens masked          {100 * masked['masked']:.2f} %: {100 * masked['masked_by_threshold']:.2f} % by the "
        f"threshold, {100 * masked['masked_by_budget']:.2f} % by the budget (of tokens with an advantage)"
    )
    print(f"CPPO training time     {results['train_seconds']:.0f} s for {len(history)} rollouts")
    print(
        f"\n{output_dir}: model, tokenizer, README.md (model card), trainer_state.json (log), curves.png, results.json"
    )
    push(trainer)
    trainer.end()


if __name__ == "__main__":
    with one_line_errors("Repeat the command to start again."):
        main()
