"""A rollout by vLLM and the update on it: CPPO against TRL's default, alternating in one process, on a CPU.

    .venv-vllm/bin/python scripts/benchmark_vllm.py --json outputs/benchmark_vllm.json

One update a rollout (aligned steps), the same model, data and batch. TRL's default scores each rollout once more with
the trained model, to correct for the engine; CPPO takes the engine's log-probs for the rollout policy's and does not.
Each side has a colocated engine of its own. Time is CPU time of the process, on one thread, so other work on the
machine hardly counts. `make test-vllm` sets the environment up.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import torch
import trl.generation.vllm_generation as host
import vllm
import vllm._custom_ops
from transformers import Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from cppo_trl import CPPOConfig, CPPOTrainer
from cppo_trl.data import arithmetic

STEPS = 2  # timed in a round; one more before them is not
PARTS = ("whole", "rollout", "second pass")


class Stopwatch(TrainerCallback):
    """CPU seconds of each update, of vLLM's part in it (with the weight sync), and of passes without a gradient."""

    def __init__(self, trainer: GRPOTrainer) -> None:
        self.rows: list[dict[str, float]] = []
        for method, part in (("_generate_single_turn", 1), ("_get_per_token_logps_and_entropies", 2)):
            setattr(trainer, method, partial(self._timed, getattr(trainer, method), PARTS[part]))
        trainer.add_callback(self)

    def _timed(self, method: Any, part: str, *args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        result = method(*args, **kwargs)
        if part == "rollout" or not torch.is_grad_enabled():
            self.rows[-1][part] += time.process_time() - start
        return result

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.rows.append(dict.fromkeys(PARTS, 0.0))
        self._start = time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.rows[-1]["whole"] = time.process_time() - self._start

    def take(self) -> dict[str, float]:
        """Mean CPU seconds of the updates since the last call, without the first."""
        rows, self.rows = self.rows[1:], []
        return {part: statistics.fmean(row[part] for row in rows) for part in PARTS}


def make_trainer(
    trainer: type[GRPOTrainer], config: type[GRPOConfig], model: str, args: argparse.Namespace, **fields: Any
) -> GRPOTrainer:
    """One update a rollout, fp32, with a colocated engine."""
    settings = {
        "output_dir": f"{model}/output",
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_max_model_length": 32 + args.length,
        "per_device_train_batch_size": args.rows,
        "num_generations": 8,
        "steps_per_generation": 1,
        "max_completion_length": args.length,
        "max_steps": STEPS + 1,
        "learning_rate": 1e-6,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    return trainer(
        model,
        lambda completions, **kwargs: [float(len(text)) for text in completions],
        config(**{**settings, **fields}),
        train_dataset=arithmetic.problems(64, terms=3, seed=0),
        processing_class=arithmetic.tokenizer(),
    )


def main() -> None:
    """Time the variants in turn, print the table, and write it to ``--json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--rows", type=int, default=16, help="responses of a rollout, a multiple of 8")
    parser.add_argument("--length", type=int, default=48, help="longest response, in tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    vllm._custom_ops._supports_onednn = False  # packed weights take no new ones
    host.LLM = partial(vllm.LLM, dtype="float32", enforce_eager=True)
    with tempfile.TemporaryDirectory() as model:
        config = Qwen3Config(
            vocab_size=8192,  # random weights, so responses seldom end early
            hidden_size=args.hidden,
            intermediate_size=3 * args.hidden,
            num_hidden_layers=args.layers,
            num_attention_heads=args.hidden // 64,
            num_key_value_heads=args.hidden // 128,
            head_dim=64,
            pad_token_id=arithmetic.tokenizer().pad_token_id,
            eos_token_id=arithmetic.tokenizer().eos_token_id,
            bos_token_id=None,
        )
        Qwen3ForCausalLM(config).save_pretrained(model)
        arithmetic.tokenizer().save_pretrained(model)
        trainers = {
            "TRL's default": make_trainer(GRPOTrainer, GRPOConfig, model, args),
            "CPPO, Binary": make_trainer(CPPOTrainer, CPPOConfig, model, args),
            "CPPO, Top-K": make_trainer(CPPOTrainer, CPPOConfig, model, args, cppo_divergence="topk_tv"),
        }
        watches = {name: Stopwatch(trainer) for name, trainer in trainers.items()}
        seconds: dict[str, list[dict[str, float]]] = {name: [] for name in trainers}
        for _ in range(args.rounds):
            for name, trainer in trainers.items():
                trainer.train()
                seconds[name].append(watches[name].take())
    baseline = [row["whole"] for row in next(iter(seconds.values()))]
    report = {}
    print("| | CPU seconds | rollout | second pass | time / TRL's default (range) |\n|---|---|---|---|---|")
    for name, rows in seconds.items():
        ratios = [row["whole"] / base for row, base in zip(rows, baseline, strict=True)]
        median = {part: statistics.median(row[part] for row in rows) for part in PARTS}
        report[name] = {**median, "ratio": statistics.median(ratios), "ratios": ratios}
        cells = " | ".join(f"{value:.2f}" for value in median.values())
        print(
            f"| {name} | {cells} | {report[name]['ratio']:.3f} ({min(ratios):.3f} to {max(ratios):.3f}) |", flush=True
        )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**vars(args), "json": None, "results": report}, indent=2))


if __name__ == "__main__":
    main()
