"""Cost and accuracy of Top-K against Binary total variation, all variants alternating in one process.

    python scripts/benchmark_topk.py --layers 4 --rows 1 --length 512 --json outputs/benchmark_topk.json

A model of Qwen3-1.7B's shape with random weights (28 layers unless told) takes training steps (forward, loss,
backward) on one made-up batch. Variants: Binary; Top-K with K rows of the head and TRL's log Z (what the trainer
does); Top-K with a second product over the whole vocabulary (the alternative).
"""

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl.trainer.utils import add_fused_lm_head

import cppo_trl.trainer as seam
from cppo_trl import CPPOConfig, CPPOTrainer
from cppo_trl.data import arithmetic
from cppo_trl.divergence import topk_tv
from cppo_trl.policy_topk import HeadTap

K = 20


class ProductTap(HeadTap):
    """The alternative: the listed tokens' logits by one more product over the whole vocabulary."""

    @staticmethod
    def chosen(
        hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, ids: torch.Tensor
    ) -> torch.Tensor:
        """Logits of ``ids``, gathered from all."""
        return (hidden @ weight.to(hidden.dtype).t()).gather(-1, ids.long())


def qwen3(layers: int, hidden: int = 2048, tied: bool = True) -> Qwen3ForCausalLM:
    """Random weights in Qwen3-1.7B's shape, narrower where ``hidden`` is smaller."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=151_936,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 128,
            num_key_value_heads=hidden // 256,
            head_dim=128,
            tie_word_embeddings=tied,
        )
    )


def peak_memory(device: torch.device, work: Callable[[], Any]) -> float:
    """Peak memory of ``work`` in GiB: of the device, or the process's resident set sampled every 20 ms."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**30
    process, peak, done = psutil.Process(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], process.memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    work()
    done.set()
    thread.join()
    return peak[0] / 2**30


def cost(arguments: argparse.Namespace) -> dict[str, Any]:
    """Median time and peak memory of a training step and of the rollout's scoring pass, by variant."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, rows, length = qwen3(arguments.layers), arguments.rows, arguments.length
    config = CPPOConfig(
        tempfile.mkdtemp(),
        cppo_divergence="topk_tv",
        per_device_train_batch_size=rows,
        generation_batch_size=8 * rows,
        max_completion_length=length,
        use_cpu=device.type == "cpu",
        bf16=arguments.bf16,
        report_to=[],
    )
    trainer = CPPOTrainer(
        model,
        lambda completions, **_: [0.0] * len(completions),
        config,
        train_dataset=Dataset.from_dict({"prompt": ["1+1="] * 8}),
        processing_class=arithmetic.tokenizer(),
    )
    trainer.current_gradient_accumulation_steps = 1
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 150_000, (rows, 64 + length), generator=g)
    batch = {
        "prompt_ids": tokens[:, :64],
        "prompt_mask": torch.ones(rows, 64, dtype=torch.long),
        "completion_ids": tokens[:, 64:],
        "completion_mask": torch.ones(rows, length, dtype=torch.long),
        "advantages": torch.randn(rows, generator=g),
        "old_per_token_logps": torch.full((rows, length), -12.0),
        "num_items_in_batch": torch.tensor(rows * length),
    }
    topk = {
        "topk_ids": torch.randint(0, 150_000, (rows, length, K), generator=g, dtype=torch.int32),
        "topk_logps": torch.full((rows, length, K), -5.0),
    }
    batch, topk = ({k: v.to(device) for k, v in x.items()} for x in (batch, topk))
    inputs = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    trainer.model.train()

    def step(divergence: str, tap: type[HeadTap] = HeadTap) -> None:
        config.cppo_divergence, seam.HeadTap = divergence, tap  # type: ignore[misc]
        loss = trainer._compute_loss(trainer.model, batch | topk if divergence == "topk_tv" else batch)
        loss.backward()
        trainer.model.zero_grad(set_to_none=False)
        seam.HeadTap = HeadTap  # type: ignore[misc]

    def rollout_pass(divergence: str) -> None:
        config.cppo_divergence, trainer._rollout_pass_due = divergence, True
        with torch.no_grad():
            trainer._get_per_token_logps_and_entropies(trainer.model, inputs, torch.ones_like(inputs), length)

    variants = {
        ("training step", "Binary"): lambda: step("binary_tv"),
        ("training step", "Top-K, K rows and log Z"): lambda: step("topk_tv"),
        ("training step", "Top-K, second product"): lambda: step("topk_tv", ProductTap),
        ("scoring a rollout", "Binary"): lambda: rollout_pass("binary_tv"),
        ("scoring a rollout", "Top-K"): lambda: rollout_pass("topk_tv"),
    }
    seconds: dict[tuple[str, str], list[float]] = {name: [] for name in variants}
    for work in variants.values():  # warm-up: gradients and buffers are there before anything is measured
        work()
    memory = {name: peak_memory(device, work) for name, work in variants.items()}
    for _ in tqdm(range(arguments.repeats), desc="alternating"):
        for name, work in variants.items():
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    result = []
    for (part, variant), times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds[part, "Binary"], strict=True)]
        result.append(
            {
                "part": part,
                "variant": variant,
                "seconds": statistics.median(times),
                "ratio": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                "peak_gib": memory[part, variant],
                "peak_ratio": memory[part, variant] / memory[part, "Binary"],
            }
        )
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {"device": device_name, **vars(arguments), "parameters": model.num_parameters(), "cost": result}


def accuracy(rows: int = 2, length: int = 128) -> list[dict[str, Any]]:
    """Error of D_t by way and precision: what two equal policies seem to differ by, against fp64."""
    results: list[dict[str, Any]] = []
    for name, bf16, fp32_head in (("fp32", False, False), ("bf16", True, False), ("bf16, fp32 head", True, True)):
        torch.manual_seed(0)
        model = qwen3(1, hidden=512, tied=False)
        model.lm_head.weight.data *= 9  # peaked, as a trained model
        add_fused_lm_head(model, cast_lm_head_to_fp32=fp32_head, outputs=("log_probs", "entropy"))
        ids = torch.randint(0, 150_000, (rows, 8 + length))
        labels = ids.clone()
        labels[:, :8] = -100
        call = {"attention_mask": torch.ones_like(ids), "logits_to_keep": length}
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            hidden = model.model(ids).last_hidden_state[:, 7:-1]
        exact = (hidden.double() @ model.lm_head.weight.double().t()).log_softmax(-1)
        top = exact.topk(K)
        for way, tap in (("K rows and log Z", HeadTap), ("second product", ProductTap)):
            read = tap(call, ids=top.indices.int())
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16), read:
                model(ids, labels=labels, fused_lm_head=True)
            error = topk_tv(read.logps, top.values)
            worst = {"mean": error.mean().item(), "p99": error.quantile(0.99).item(), "max": error.max().item()}
            results.append({"precision": name, "way": way, **worst})
    return results


def main() -> None:
    """Measure, print the tables as markdown, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--json", type=Path, default=Path("outputs/benchmark_topk.json"))
    arguments = parser.parse_args()
    report = {**cost(arguments), "accuracy": accuracy()}
    print(
        f"\n{report['device']}; {report['parameters'] / 1e9:.2f} B parameters, {arguments.rows} x {arguments.length}\n"
    )
    print("| | variant | seconds | time / Binary (range) | peak GiB | peak / Binary |\n|---|---|---|---|---|---|")
    for row in report["cost"]:
        print(
            f"| {row['part']} | {row['variant']} | {row['seconds']:.2f} | {row['ratio']:.3f} "
            f"({row['ratio_min']:.3f} to {row['ratio_max']:.3f}) | {row['peak_gib']:.2f} | {row['peak_ratio']:.3f} |"
        )
    print("\n| precision | way | mean error of D_t | p99 | max |\n|---|---|---|---|---|")
    for row in report["accuracy"]:
        print(f"| {row['precision']} | {row['way']} | {row['mean']:.1e} | {row['p99']:.1e} | {row['max']:.1e} |")
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({**report, "json": str(arguments.json)}, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
