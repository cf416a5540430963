"""What an engine and a trainer with the same weights seem to differ by: D_t of a trained model before any update.

    python scripts/quickstart_llm.py ...  # once: leaves SmolLM2-135M-Instruct in its output directory
    .venv-vllm/bin/python scripts/benchmark_noise.py --model DIR --json outputs/noise.json

A real vLLM in fp32 and in bf16 writes stories of a thousand tokens (its end token is ignored), with the log-probs of
the 20 likeliest tokens. The same weights score the same tokens as the trainer does: in fp32, under bf16 autocast, and
there with an fp32 head. Then the fp32 weights make one AdamW step on advantages of +1 and -1 in turn, and the signs of
log ρ_t are compared with those against fp32's own log μ.

Tables: D_t by engine and trainer, Binary and Top-K; by probability and position; the share of tokens that CPPO masks
although nothing has moved, by length; the share of signs that noise flips.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import torch
import vllm
from torch import Tensor
from transformers import AutoModelForCausalLM
from trl.generation.vllm_generation import extract_logprobs

from cppo_trl.divergence import binary_tv, topk_tv
from cppo_trl.rules import RULES

K, LEARNING_RATE = 20, 1e-6  # both the paper's
TRAINERS = {"fp32": (False, False), "bf16": (True, False), "bf16, fp32 head": (True, True)}
BUDGETS: dict[str, dict[str, Any]] = {
    "fixed, 0.015": {"delta_b": 0.015, "delta_b_quantile": None},
    "Eq. 22 from 0.02": {"delta_b": 0.02, "delta_b_quantile": 0.9},
}
PROMPTS = [
    f"Write a long and detailed story about {subject}."
    for subject in ("a lighthouse keeper", "two rival bakers", "a lost robot", "a slow train", "a flood", "an old map")
]


def rollout(model: str, dtype: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Prompts, responses of ``args.length`` tokens, and log μ: of the sampled token, and of the K likeliest others."""
    llm = vllm.LLM(model, dtype=dtype, enforce_eager=True, logprobs_mode="processed_logprobs", seed=args.seed)
    chat = [[{"role": "user", "content": PROMPTS[i % len(PROMPTS)]}] for i in range(args.rows)]
    sampling = vllm.SamplingParams(max_tokens=args.length, logprobs=K, ignore_eos=True, seed=args.seed)
    outputs = llm.chat(chat, sampling, use_tqdm=False)
    rows = []
    for output, logps, ids in zip(outputs, *extract_logprobs(outputs), strict=True):
        answer = list(output.outputs[0].token_ids)
        listed = [
            [(i, p) for i, p in zip(*pair, strict=True) if i != y]
            for y, pair in zip(answer, zip(ids, logps, strict=True), strict=True)
        ]
        sampled = [p[i.index(y)] for y, i, p in zip(answer, ids, logps, strict=True)]
        others = torch.tensor([[(*row, (0, -torch.inf))[j] for j in range(K)] for row in listed], dtype=torch.float64)
        rows.append({"prompt": output.prompt_token_ids, "answer": answer, "ids": others[..., 0].long()})
        rows[-1] |= {"sampled": torch.tensor(sampled), "others": others[..., 1].float()}
    return rows


def log_probs(model: Any, row: dict[str, Any], bf16: bool, fp32_head: bool) -> tuple[Tensor, Tensor]:
    """Log π of a response's tokens ``(T,)``, and at the ids listed for each ``(T, K)``; full logits, then softmax."""
    tokens, start = torch.tensor([row["prompt"] + row["answer"]]), len(row["prompt"]) - 1
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        hidden = model.model(tokens).last_hidden_state[0, start:-1]
        logits = model.lm_head(hidden) if not fp32_head else None
    logits = hidden.float() @ model.lm_head.weight.t() if logits is None else logits
    logps = logits.float().log_softmax(-1)
    sampled = logps.gather(-1, torch.tensor(row["answer"]).unsqueeze(-1)).squeeze(-1)
    return sampled, logps.gather(-1, row["ids"])


def divergences(row: dict[str, Any], sampled: Tensor, others: Tensor) -> dict[str, Tensor]:
    """Binary and Top-K TV of a response's tokens."""
    pi, mu = torch.cat([sampled[:, None], others], -1), torch.cat([row["sampled"][:, None], row["others"]], -1)
    return {"Binary": binary_tv(sampled, row["sampled"]), "Top-K": topk_tv(pi[None], mu[None])[0]}


def masked(rows: list[tuple[Tensor, Tensor]], length: int, budget: dict[str, Any]) -> float:
    """Share of tokens that CPPO masks in responses of ``length`` tokens, over both signs of the advantage.

    ``rows`` hold D_t and log ρ_t of longer responses, which are cut into pieces.
    """
    pieces = [torch.stack(row).split(length, dim=-1) for row in rows]
    divergence, log_ratio = torch.stack([x for row in pieces for x in row if x.size(-1) == length], 1)
    fields = {"delta": 0.15, "w_min": 0.8, "delta_b_max_multiple": 2.0, "shuffle_weights": False, **budget}
    signs = [torch.full((len(divergence), 1), sign) for sign in (1.0, -1.0)]
    ones = torch.ones_like(divergence)
    weights = [RULES["cppo"].judge(divergence, sign, log_ratio, ones, **fields).weight for sign in signs]
    return torch.cat(weights).eq(0).float().mean().item()


def summary(divergence: Tensor, mu: Tensor, position: Tensor) -> dict[str, Any]:
    """Mean and quantiles of D_t, and its mean by the token's probability and by position."""
    p, found = mu.exp(), {"mean": divergence.mean().item()}
    found |= {f"p{q}": divergence.quantile(q / 100).item() for q in (90, 99)}
    for low, high in ((0, 0.1), (0.1, 0.5), (0.5, 0.9), (0.9, 1.01)):
        found[f"probability {low:g} to {min(high, 1):g}"] = divergence[(p >= low) & (p < high)].mean().item()
    for low, high in ((0, 100), (100, 300), (300, 1000), (1000, 4000)):
        if (among := (position >= low) & (position < high)).any():
            found[f"tokens {low} to {high}"] = divergence[among].mean().item()
    return found


def compare(model: Any, rows: list[dict[str, Any]], lengths: list[int]) -> dict[str, Any]:
    """The figures of one engine's responses, by trainer and estimator."""
    report: dict[str, Any] = {}
    mu, position = torch.cat([r["sampled"] for r in rows]), torch.cat([torch.arange(len(r["answer"])) for r in rows])
    for trainer, precision in TRAINERS.items():
        with torch.no_grad():
            scored = [log_probs(model, row, *precision) for row in rows]
        ratios = [sampled - row["sampled"] for row, (sampled, _) in zip(rows, scored, strict=True)]
        by_row = [divergences(row, *pi) for row, pi in zip(rows, scored, strict=True)]
        nats = torch.cat(ratios).abs().mean().item()
        for estimator in by_row[0]:
            found = [row[estimator] for row in by_row]
            report[f"{trainer}, {estimator}"] = summary(torch.cat(found), mu, position) | {"nats": nats}
            report[f"{trainer}, {estimator}"] |= {
                f"masked at {length}, {name}": masked(list(zip(found, ratios, strict=True)), length, budget)
                for length in lengths
                for name, budget in BUDGETS.items()
            }
    return report


def flipped(model: Any, rows: list[dict[str, Any]]) -> float:
    """Share of signs of log ρ_t after one update of the fp32 weights that differ between engine's μ and their own."""
    own = []
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    for i, row in enumerate(rows):
        sampled, _ = log_probs(model, row, bf16=False, fp32_head=False)
        own.append(sampled.detach())
        (sampled.mean() * (-1) ** i).backward()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        moved = [log_probs(model, row, bf16=False, fp32_head=False)[0] for row in rows]
    signs = [(m > r["sampled"]) != (m > o) for m, o, r in zip(moved, own, rows, strict=True)]
    return torch.cat(signs).float().mean().item()


def show(report: dict[str, Any]) -> None:
    """One table a quantity, as markdown."""
    for engine, cases in report.items():
        names = list(next(iter(cases["noise"].values())))
        print(f"\nengine {engine}, {cases['tokens']} tokens, signs flipped {cases['flipped']:.3f}\n")
        print("| trainer, estimator | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
        for case, found in cases["noise"].items():
            print(f"| {case} | " + " | ".join(f"{found[name]:.2g}" for name in names) + " |", flush=True)


def main() -> None:
    """Measure, print the tables, and write them to ``--json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of a trained model with a chat template")
    parser.add_argument("--rows", type=int, default=6, help="responses")
    parser.add_argument("--length", type=int, default=1000, help="tokens of a response")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rollouts = {}
    for dtype in ("float32", "bfloat16"):
        rollouts[dtype] = rollout(args.model, dtype, args)
    report = {}
    for dtype, rows in rollouts.items():
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        noise = compare(model, rows, sorted({min(n, args.length) for n in (100, 1000, args.length)}))
        tokens = sum(len(row["answer"]) for row in rows)
        report[dtype] = {"tokens": tokens, "noise": noise, "flipped": flipped(model, rows)}
    show(report)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**vars(args), "json": None, "results": report}, indent=2))


if __name__ == "__main__":
    main()
