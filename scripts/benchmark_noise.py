"""What an engine and a trainer with the same weights seem to differ by: D_t of a trained model before any update.

    python scripts/quickstart_llm.py ...  # once: leaves SmolLM2-135M-Instruct in its output directory
    .venv-vllm/bin/python scripts/benchmark_noise.py --model DIR --json outputs/noise.json

A real vLLM in fp32 and in bf16 writes stories of a thousand tokens (its end token is ignored), with the log-probs of
the 20 likeliest tokens. The same weights score the same tokens as the trainer does: in fp32, under bf16 autocast, and
there with an fp32 head. Then the fp32 weights make one AdamW step on advantages of +1 and -1 in turn, and the signs of
log ρ_t are compared with those against fp32's own log μ.

Tables: D_t by engine and trainer, Binary and Top-K; by probability and position; the share of tokens that CPPO masks
although nothing has moved, by length; the share of signs that noise flips.

``--part budget`` needs no vLLM: a bf16 forward of transformers stands for the engine; the trainer is under bf16
autocast, with an fp32 head. Against the masks of fp32 on both sides it holds those of several budgets, unmoved and
after updates: the displacement of two AdamW steps of the policy gradient, advantages of +1 and -1 in turn, scaled to
a given mean D_t.
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
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

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
    import vllm  # noqa: PLC0415
    from trl.generation.vllm_generation import extract_logprobs  # noqa: PLC0415

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


def all_log_probs(model: Any, row: dict[str, Any], bf16: bool, fp32_head: bool) -> Tensor:
    """Log π of the vocabulary at each of a response's tokens, ``(T, V)``: full logits, then softmax."""
    tokens, start = torch.tensor([row["prompt"] + row["answer"]]), len(row["prompt"]) - 1
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        hidden = model.model(tokens).last_hidden_state[0, start:-1]
        logits = model.lm_head(hidden) if not fp32_head else None
    logits = hidden.float() @ model.lm_head.weight.t() if logits is None else logits
    return logits.float().log_softmax(-1)


def log_probs(model: Any, row: dict[str, Any], bf16: bool, fp32_head: bool) -> tuple[Tensor, Tensor]:
    """Log π of a response's tokens ``(T,)``, and at the ids listed for each ``(T, K)``."""
    logps = all_log_probs(model, row, bf16, fp32_head)
    sampled = logps.gather(-1, torch.tensor(row["answer"]).unsqueeze(-1)).squeeze(-1)
    return sampled, logps.gather(-1, row["ids"])


def divergences(row: dict[str, Any], sampled: Tensor, others: Tensor) -> dict[str, Tensor]:
    """Binary and Top-K TV of a response's tokens."""
    pi, mu = torch.cat([sampled[:, None], others], -1), torch.cat([row["sampled"][:, None], row["others"]], -1)
    return {"Binary": binary_tv(sampled, row["sampled"]), "Top-K": topk_tv(pi[None], mu[None])[0]}


def masks(rows: list[tuple[Tensor, Tensor]], length: int, budget: dict[str, Any]) -> Tensor:
    """Where CPPO masks, in responses of ``length`` tokens, for both signs of the advantage.

    ``rows`` hold D_t and log ρ_t of longer responses, which are cut into pieces.
    """
    pieces = [torch.stack(row).split(length, dim=-1) for row in rows]
    divergence, log_ratio = torch.stack([x for row in pieces for x in row if x.size(-1) == length], 1)
    fields = {"delta": 0.15, "w_min": 0.8, "delta_b_max_multiple": 2.0, "shuffle_weights": False, **budget}
    signs = [torch.full((len(divergence), 1), sign) for sign in (1.0, -1.0)]
    ones = torch.ones_like(divergence)
    weights = [RULES["cppo"].judge(divergence, sign, log_ratio, ones, **fields).weight for sign in signs]
    return torch.cat(weights).eq(0)


def masked(rows: list[tuple[Tensor, Tensor]], length: int, budget: dict[str, Any]) -> float:
    """Share of tokens that CPPO masks; arguments as in `masks`."""
    return masks(rows, length, budget).float().mean().item()


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


@torch.no_grad()
def pair(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model in fp32 and in bf16, each weight scaled by a random 1 ± 2^-8, a step of bf16.

    Dequantized weights lie on a grid where many are halfway between two bf16 numbers; weights in training do not.
    """
    torch.manual_seed(args.seed)
    model, bf16 = (AutoModelForCausalLM.from_pretrained(args.model, dtype=d) for d in (torch.float32, torch.bfloat16))
    for p, q in zip(model.parameters(), bf16.parameters(), strict=True):
        q.copy_(p.mul_(1 + (2 * torch.rand_like(p) - 1) / 256))
    return model, bf16


def sample(model: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Prompts and responses of ``args.length`` tokens, sampled from the model."""
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    model.generation_config.eos_token_id = None
    chat = [[{"role": "user", "content": PROMPTS[i % len(PROMPTS)]}] for i in range(args.rows)]
    texts = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    torch.manual_seed(args.seed)
    tokens = model.generate(**batch, max_new_tokens=args.length, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    start = batch["input_ids"].size(1)
    own = [mask.bool() for mask in batch["attention_mask"]]
    return [{"prompt": x[:start][m].tolist(), "answer": x[start:].tolist()} for x, m in zip(tokens, own, strict=True)]


@torch.no_grad()
def anchored(model: Any, rows: list[dict[str, Any]], precision: tuple[bool, bool]) -> list[dict[str, Any]]:
    """The rows with log μ of a model: of the sampled token, and of the K likeliest others."""
    found = []
    for row in rows:
        logps, answer = all_log_probs(model, row, *precision), torch.tensor(row["answer"]).unsqueeze(-1)
        others, ids = logps.topk(K)
        others = others.masked_fill(ids == answer, -torch.inf)
        found.append({**row, "ids": ids, "others": others, "sampled": logps.gather(-1, answer).squeeze(-1)})
    return found


def displacement(model: Any, rows: list[dict[str, Any]], steps: int = 2, length: int = 250) -> list[Tensor]:
    """How far AdamW moves the weights, which are left as they were: policy gradient of the rows' first tokens."""
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    for _ in range(steps):
        for i, row in enumerate(rows):
            short = {**row, "answer": row["answer"][:length], "ids": row["ids"][:length]}
            (log_probs(model, short, bf16=False, fp32_head=False)[0].mean() * (-1) ** i).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = [p.detach() - s for p, s in zip(model.parameters(), start, strict=True)]
    place(model, start, moved, 0.0)
    return moved


@torch.no_grad()
def place(model: Any, start: list[Tensor], moved: list[Tensor], scale: float) -> None:
    """Set the weights to ``start + scale * moved``."""
    for p, s, m in zip(model.parameters(), start, moved, strict=True):
        p.copy_(s + scale * m)


@torch.no_grad()
def drift(model: Any, rows: list[dict[str, Any]], precision: tuple[bool, bool], ratio: list[Tensor]) -> list[Any]:
    """Top-K D_t of each row against its own anchor, and log ρ_t against the anchor ``ratio``."""
    scored = [log_probs(model, row, *precision) for row in rows]
    d = [divergences(row, *pi)["Top-K"] for row, pi in zip(rows, scored, strict=True)]
    return list(zip(d, [pi[0] - mu for pi, mu in zip(scored, ratio, strict=True)], strict=True))


def judged(exact: list[Any], engine: list[Any], policy: list[Any], noise: float, length: int) -> dict[str, Any]:
    """Share masked, precision and recall by candidate; ``noise`` is the mean of D_t with unmoved weights."""
    fixed, eq22 = BUDGETS.values()
    less = [((d - noise).clamp(min=0.0), r) for d, r in engine]
    signs = [(d, r) for (d, _), (_, r) in zip(exact, engine, strict=True)]
    candidates = {
        "fixed, 0.015": (engine, fixed, fixed),
        "Eq. 22 from 0.02": (engine, eq22, eq22),
        "Eq. 22, against 0.015": (engine, eq22, fixed),
        "0.015 + noise": (engine, {**fixed, "delta_b": 0.015 + noise}, fixed),
        "max(0.015, 1.5 noise)": (engine, {**fixed, "delta_b": max(0.015, 1.5 * noise)}, fixed),
        "noise subtracted": (less, fixed, fixed),
        "policy, 0.015": (policy, fixed, fixed),
        "policy, Eq. 22": (policy, eq22, eq22),
        "exact D_t, engine's signs": (signs, fixed, fixed),
    }
    found = {}
    for name, (rows, budget, truth) in candidates.items():
        ours, true = masks(rows, length, budget), masks(exact, length, truth)
        both = (ours & true).sum().item()
        found[name] = {"masked": ours.float().mean().item(), "should be": true.float().mean().item()}
        found[name] |= {"precision": both / max(ours.sum().item(), 1), "recall": both / max(true.sum().item(), 1)}
    return found


def budgets(args: argparse.Namespace) -> dict[str, Any]:
    """The candidates by mean drift and length; the moved weights are never saved."""
    model, bf16 = pair(args)
    rows, paper = sample(model, args), TRAINERS["bf16, fp32 head"]
    engine = anchored(bf16, rows, (False, False))
    exact, own = anchored(model, rows, TRAINERS["fp32"]), anchored(model, rows, paper)
    mu, true_mu = [row["sampled"] for row in engine], [row["sampled"] for row in exact]
    start, moved = [p.detach().clone() for p in model.parameters()], displacement(model, exact)
    report, scale, noise = {}, 1.0, 0.0
    for target in (0.0, 0.005, 0.015, 0.04):
        for _ in range(2 * (target > 0)):  # the drift is nearly proportional to the displacement
            place(model, start, moved, scale)
            scale *= target / drift(model, exact[:1], TRAINERS["fp32"], true_mu[:1])[0][0].mean().item()
        place(model, start, moved, scale * (target > 0))
        true = drift(model, exact, TRAINERS["fp32"], true_mu)
        noisy, policy = drift(model, engine, paper, mu), drift(model, own, paper, mu)
        seen = [torch.cat([d for d, _ in case]).mean().item() for case in (true, noisy, policy)]
        noise = noise or seen[1]
        print("\ndrift {:.2g}; seen by the engine's Top-K {:.2g}, by the policy's {:.2g}".format(*seen), flush=True)
        for length in sorted({100, args.length}):
            found = judged(true, noisy, policy, noise, length)
            report[f"{target}, {length}"] = {"drift": seen, **found}
            print(f"\n{length} tokens\n| budget | masked | should be | precision | recall |\n|---|---|---|---|---|")
            for name, case in found.items():
                print(f"| {name} | " + " | ".join(f"{x:.3f}" for x in case.values()) + " |", flush=True)
    return report


def main() -> None:
    """Measure, print the tables, and write them to ``--json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of a trained model with a chat template")
    parser.add_argument("--rows", type=int, default=6, help="responses")
    parser.add_argument("--length", type=int, default=1000, help="tokens of a response")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--part", choices=("noise", "budget"), default="noise")
    args = parser.parse_args()
    report = noises(args) if args.part == "noise" else budgets(args)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**vars(args), "json": None, "results": report}, indent=2))


def noises(args: argparse.Namespace) -> dict[str, Any]:
    """The figures of `compare` and `flipped` by engine, printed."""
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
    return report


if __name__ == "__main__":
    main()
