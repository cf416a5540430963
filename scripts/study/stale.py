"""What staleness does to each rule: a small model, a real vLLM server, continuous rollouts.

    PYTHONPATH=. .venv-vllm/bin/python scripts/study/stale.py --work outputs/stale --output docs/results/async.jsonl
    .venv/bin/python scripts/study/stale.py --output docs/results/async.jsonl --figure docs/figures/async.png

Runs on a CPU, in the environment of ``make test-vllm`` (which sets variables, too), with that suite's server and its
plain attention in place of TRL's FlashAttention-3 kernel. A line for each run; finished ones are kept. ``--figure``
draws what there is and prints the table. docs/async.md says what came out.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from cppo_trl import AsyncCPPOConfig, AsyncCPPOTrainer
from cppo_trl.data import arithmetic
from cppo_trl.evaluation import evaluate
from cppo_trl.output.run_files import versions, whole_lines
from cppo_trl.rewards import accuracy_reward

TERMS, HELD_OUT, UPDATES, LEARNING_RATE, IN_FLIGHT = 6, 256, 50, 1.5e-3, 160
RULES: dict[str, dict[str, Any]] = {"cppo": {"cppo_delta": 0.05, "cppo_delta_b": 0.005}, "grpo": {}, "none": {}}
"""The quickstart's thresholds: the paper's are made for a vocabulary of 150,000."""
SERVER = (
    "--max-model-len 96 --enable-lora --max-loras 10 --max-lora-rank 8 "
    "--no-enable-chunked-prefill --max-num-batched-tokens 8192"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """The task's, with a chat template that adds nothing: TRL's worker knows messages only."""
    characters = arithmetic.tokenizer()
    characters.chat_template = "{{ messages[0]['content'] }}"
    content = {"close_pattern": "<eos>", "content": "text"}
    characters.response_template = {"defaults": {"role": "assistant"}, "fields": {"content": content}}
    return characters


def task(directory: Path) -> tuple[Dataset, Dataset]:
    """Problems to train on and held-out ones; the warm start is left in ``directory / "model"``."""
    train, test = arithmetic.splits(8000, HELD_OUT, TERMS, seed=0)
    if not (directory / "model").exists():
        arithmetic.warm_start(
            directory / "model",
            terms=TERMS,
            error_rate=0.15,
            forgotten_carry=0.6,
            seed=0,
            exclude=set(test["prompt"]),
            steps=800,
            hidden=128,  # heads of 32, the smallest that vLLM takes on a CPU
        )
    return train, test


def accuracy(model: Any, test: Dataset, seed: int) -> dict[str, float]:
    """Held-out accuracy: greedy, and the mean of four samples."""
    found = evaluate(
        model.eval(),
        arithmetic.tokenizer(),
        test["prompt"],
        test["solution"],
        accuracy_reward,
        temperature=1.0,
        max_new_tokens=60,
        seed=seed,
        k=4,
    )
    return {"greedy": found.greedy, "sampled": found.avg_at_k}


def run(rule: str, seed: int, work: Path, server: str, options: argparse.Namespace) -> dict[str, Any]:
    """One run, as it is written to the file."""
    train, test = task(work)
    config = AsyncCPPOConfig(
        str(work / f"{rule}-{seed}"),
        trust_region=rule,
        **RULES[rule],
        learning_rate=options.learning_rate,
        max_steps=options.updates,
        per_device_train_batch_size=32,
        num_generations=8,
        max_completion_length=60,
        max_staleness=8,
        max_inflight_tasks=IN_FLIGHT,
        token_budget=0,
        vllm_server_base_url=server,
        seed=seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        disable_tqdm=True,
        report_to=[],
    )
    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}], "solution": row["solution"]} for row in train]
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    data = Dataset.from_list(rows).shuffle(seed=seed)
    trainer = AsyncCPPOTrainer(str(work / "model"), accuracy_reward, config, data, tokenizer(), peft_config=lora)
    start = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - start
    trainer.save_model()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(work / "model"), config.output_dir)
    return {
        "rule": rule,
        "seed": seed,
        "updates": options.updates,
        "learning_rate": options.learning_rate,
        "accuracy": accuracy(model, test, seed),
        "seconds": round(seconds),
        **summary([row for row in trainer.state.log_history if "reward" in row]),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def summary(logs: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Of the log of a run: the reward of each update, and the means of what the rule did, by staleness as well."""

    def mean(name: str) -> float | None:
        values = [row[name] for row in logs if name in row]
        return round(sum(values) / len(values), 5) if values else None

    by_staleness = sorted({name for row in logs for name in row if name.startswith("cppo/staleness_")})
    names = ["cppo/masked", "cppo/divergence/mean", "sample/staleness_mean", "sample/kept_length"]
    return {
        "rewards": [round(row["reward"], 4) for row in logs],
        "means": {name: mean(name) for name in (*names, "sample/dropped_stale_length", *by_staleness)},
        "oldest": max(row["sample/staleness_max"] for row in logs),
        "dropped": sum(row.get("sample/dropped_stale_total", 0.0) or 0.0 for row in logs),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """In markdown, means over the seeds."""
    lines = ["| | reward, updates 1-10 → 41-50 | greedy | sampled | masked |", "|---|---|---|---|---|"]
    for rule in ("warm start", *RULES):
        runs = [row for row in rows if row["rule"] == rule]
        if not runs:
            continue

        def over(values: Sequence[float]) -> str:
            spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
            return f"{sum(values) / len(values):.2f}{spread}"

        cells = [over([run["accuracy"][name] for run in runs]) for name in ("greedy", "sampled")]
        if rule in RULES:
            ends = [over([sum(part) / len(part) for part in parts]) for parts in zip(*map(_ends, runs), strict=True)]
            masked = sum(run["means"]["cppo/masked"] for run in runs) / len(runs)
            lines.append(f"| {rule} | {' → '.join(ends)} | {' | '.join(cells)} | {masked:.1%} |")
        else:
            lines.append(f"| {rule} | | {' | '.join(cells)} | |")
    return "\n".join(lines)


def _ends(run: dict[str, Any]) -> tuple[list[float], list[float]]:
    return run["rewards"][:10], run["rewards"][-10:]


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the training reward, and the share masked by staleness."""
    from matplotlib.figure import Figure  # noqa: PLC0415 (not where vLLM is)

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    rewards, shares = figure.subplots(1, 2)
    for rule, shade in zip(RULES, ("C0", "C1", "C3"), strict=True):
        runs = [row for row in rows if row["rule"] == rule]
        smooth = [[sum(run["rewards"][i : i + 5]) / 5 for i in range(len(run["rewards"]) - 4)] for run in runs]
        for curve in smooth:
            rewards.plot(range(5, len(curve) + 5), curve, color=shade, alpha=0.3, linewidth=1)
        mean = [sum(values) / len(values) for values in zip(*smooth, strict=True)]
        rewards.plot(range(5, len(mean) + 5), mean, color=shade, linewidth=2, label=rule)
        masked = {k: [run["means"].get(f"cppo/staleness_{k}/masked") for run in runs] for k in range(1, 9)}
        known = {k: [value for value in values if value is not None] for k, values in masked.items()}
        shares.plot(
            list(known), [100 * sum(values) / len(values) for values in known.values()], "o-", color=shade, label=rule
        )
    rewards.set(xlabel="update", ylabel="reward (mean of 5 updates)", ylim=(0, 1))
    shares.set(xlabel="updates between sampling and use", ylabel="% of tokens masked")
    for axes in (rewards, shares):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Make the runs that are missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("outputs/stale"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--rules", nargs="+", default=list(RULES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--updates", type=int, default=UPDATES)
    parser.add_argument("--learning_rate", type=float, default=LEARNING_RATE)
    options = parser.parse_args()
    finished = list(whole_lines(options.output))
    if options.figure:
        draw(finished, options.figure)
        return print(table(finished))
    _, test = task(options.work)
    tokenizer().save_pretrained(options.work / "model")
    from tests.asynchronous.conftest import run_on_the_cpu  # noqa: PLC0415 (the spawned worker has no use for them)
    from tests.vllm.conftest import Server, running  # noqa: PLC0415

    run_on_the_cpu(setattr)
    done = {(row["rule"], row["seed"]) for row in finished}
    if ("warm start", 0) not in done:
        model = AutoModelForCausalLM.from_pretrained(options.work / "model")
        write({"rule": "warm start", "seed": 0, "accuracy": accuracy(model, test, seed=0)}, options.output)
    with running(Server(options.work, SERVER, VLLM_ALLOW_RUNTIME_LORA_UPDATING="1")) as server:
        for seed in options.seeds:
            for rule in options.rules:
                if (rule, seed) not in done:
                    write(run(rule, seed, options.work, server.address, options), options.output)


def write(row: dict[str, Any], path: Path) -> None:
    """Append a line."""
    with path.open("a", encoding="utf-8") as file:
        print(json.dumps(row), file=file)


if __name__ == "__main__":
    main()
