"""The paired comparison on a language model: drift, masked share and surrogate of a few rules on the same rollout.

    PYTHONPATH=.smollm2 python scripts/quickstart_llm.py ...  # makes the models and the data
    python scripts/study/language_model.py --output docs/results/paired-smollm2.jsonl \
        --models outputs/quickstart-llm-task/seed-0/warm_start outputs/quickstart-llm \
        --data outputs/quickstart-llm-task/seed-0/data/train.jsonl

A unit is a rollout of one of the models; every arm starts there with LoRA adapters of its own and makes the same four
updates on the same responses. A line for each unit; finished ones are kept.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import load_dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from cppo_trl.divergence import binary_tv, topk_kl, topk_tv
from cppo_trl.output.run_files import whole_lines
from cppo_trl.rewards import accuracy_reward
from cppo_trl.rules import RULES

PROMPTS, RESPONSES, UPDATES, LENGTH, K = 4, 4, 4, 40, 20
LEARNING_RATE = 3e-4
CPPO = {"delta": 0.15, "w_min": 0.8, "delta_b": 0.02, "delta_b_quantile": 0.9, "delta_b_max_multiple": 2.0}
ARMS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "cppo, Top-K": ("cppo", "topk", CPPO),
    "cppo, Binary": ("cppo", "binary", CPPO),
    "dppo, Top-K": ("dppo", "topk", {"delta": 0.15}),
    "dppo, Binary": ("dppo", "binary", {"delta": 0.15}),
    "grpo": ("grpo", "binary", {"ratio_min": 0.8, "ratio_max": 1.28}),
    "none": ("none", "binary", {}),
}
"""The papers' thresholds."""
FIELDS = ("kl", "topk_tv", "binary_tv", "masked", "surrogate")
"""Of an arm in a row: Σ_t of the Top-K KL of a response, means over tokens, share of tokens with an advantage, L'."""


class Rollout(NamedTuple):
    """Responses of μ, padded on both sides."""

    ids: Tensor
    """``(B, prompt + T)``"""
    attention: Tensor
    """the same shape, 1 on tokens"""
    mask: Tensor
    """``(B, T)``, 1 on the responses' tokens"""
    advantages: Tensor
    """``(B, 1)`` reward minus the mean of the prompt's responses"""
    top: Tensor
    """``(B, T, K + 1)`` token ids: the sampled one, then μ's likeliest others"""
    mu: Tensor
    """``(B, T, K + 1)`` log μ at them"""


def level(model: Any, ids: Tensor, attention: Tensor) -> Tensor:
    """The log π over the vocabulary along the responses, ``(B, LENGTH, V)``."""
    logits = model(input_ids=ids, attention_mask=attention, logits_to_keep=LENGTH + 1).logits
    return logits[:, :-1].log_softmax(-1)


@torch.no_grad()
def roll_out(model: Any, tokenizer: Any, rows: Sequence[Mapping[str, Any]]) -> Rollout:
    """Sample `RESPONSES` to each row's prompt, and score them."""
    texts = [tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True) for row in rows]
    inputs = tokenizer([text for text in texts for _ in range(RESPONSES)], return_tensors="pt", padding=True)
    ids = model.generate(
        **inputs, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=LENGTH, pad_token_id=tokenizer.pad_token_id
    )
    width = inputs["input_ids"].size(1)
    ids = torch.nn.functional.pad(ids, (0, width + LENGTH - ids.size(1)), value=tokenizer.pad_token_id)
    completion = ids[:, width:]
    ended = (completion == tokenizer.eos_token_id).int()
    mask = (ended.cumsum(-1) - ended == 0).long()
    attention = torch.cat([inputs["attention_mask"], mask], 1)
    answers = tokenizer.batch_decode(completion * mask, skip_special_tokens=True)
    completions = [[{"role": "assistant", "content": answer}] for answer in answers]
    scores = accuracy_reward(completions, solution=[row["solution"] for row in rows for _ in range(RESPONSES)])
    rewards = torch.tensor([float(score or 0.0) for score in scores]).view(-1, RESPONSES)
    top, mu = [], []
    for part in range(0, len(ids), RESPONSES):
        at = slice(part, part + RESPONSES)
        logps = level(model, ids[at], attention[at])
        sampled = completion[at].unsqueeze(-1)
        others = logps.scatter(-1, sampled, -torch.inf).topk(K).indices
        top.append(torch.cat([sampled, others], -1))
        mu.append(logps.gather(-1, top[-1]))
    advantages = (rewards - rewards.mean(1, keepdim=True)).view(-1, 1)
    return Rollout(ids, attention, mask, advantages, torch.cat(top), torch.cat(mu))


def divergences(pi: Tensor, mu: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """D_t by either estimator, ``(B, T)``, from log-probs at `Rollout.top`."""
    return {"topk": topk_tv(pi, mu) * mask, "binary": binary_tv(pi[..., 0], mu[..., 0]) * mask}


def arm_of(base: Any, rollout: Rollout, arm: str, seed: int) -> dict[str, float]:
    """Train with one rule, and measure on the rollout."""
    name, estimator, parameters = ARMS[arm]
    set_seed(seed)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], LEARNING_RATE, weight_decay=0.0)
    masked = active = 0.0
    order = torch.randperm(len(rollout.ids), generator=torch.Generator().manual_seed(seed))
    for rows in order.chunk(UPDATES):
        mask, advantages, mu = rollout.mask[rows], rollout.advantages[rows], rollout.mu[rows]
        pi = level(model, rollout.ids[rows], rollout.attention[rows]).gather(-1, rollout.top[rows])
        log_ratio = (pi - mu)[..., 0] * mask
        divergence = divergences(pi.detach(), mu, mask)[estimator]
        verdict = RULES[name].judge(divergence, advantages, log_ratio.detach(), mask, **parameters)
        loss = -(log_ratio.exp() * advantages * verdict.weight * mask).sum() / (len(rows) * LENGTH)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with_advantage = (mask == 1) & (advantages != 0)
        masked += float((with_advantage & (verdict.weight == 0)).sum())
        active += float(with_advantage.sum())
    with torch.no_grad():
        pi = torch.cat(
            [
                level(model, ids, attention).gather(-1, top)
                for ids, attention, top in zip(
                    *(t.split(RESPONSES) for t in (rollout.ids, rollout.attention, rollout.top)), strict=True
                )
            ]
        )
    model.unload()
    mask, tokens = rollout.mask, float(rollout.mask.sum())
    moved = divergences(pi, rollout.mu, mask)
    ratio = ((pi - rollout.mu)[..., 0] * mask).exp()
    return {
        "kl": float((topk_kl(pi, rollout.mu) * mask).sum(1).mean()),
        "topk_tv": float(moved["topk"].sum()) / tokens,
        "binary_tv": float(moved["binary"].sum()) / tokens,
        "masked": masked / max(active, 1.0),
        "surrogate": float(((ratio - 1) * rollout.advantages).sum(1).mean()),
    }


def load(path: str) -> Any:
    """A model, with its adapters merged."""
    if Path(path, "adapter_config.json").exists():
        return AutoPeftModelForCausalLM.from_pretrained(path, dtype=torch.float32).merge_and_unload()
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Means over the units of each model, in Markdown."""
    lines = ["| model | arm | units | KL, nats a response | Top-K TV | Binary TV | masked | L' |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for model in dict.fromkeys(row["model"] for row in rows):
        found = [row for row in rows if row["model"] == model]
        for arm in ARMS:
            kl, topk, binary, masked, surrogate = (np.mean([row["arms"][arm][f] for row in found]) for f in FIELDS)
            means = f"{kl:.3f} | {topk:.4f} | {binary:.4f} | {masked:.3f} | {surrogate:+.3f}"
            lines.append(f"| {model} | {arm} | {len(found)} | {means} |")
    return "\n".join(lines)


def main() -> None:
    """Make the units that are missing, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, help="directories, adapters or whole models")
    parser.add_argument("--data", required=True, help="JSON lines with prompt and solution")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines, one for each unit")
    parser.add_argument("--units", type=int, default=4, help="rollouts of each model")
    options = parser.parse_args()
    data = load_dataset("json", data_files=options.data, split="train")
    done = {(row["model"], row["unit"]) for row in whole_lines(options.output)}
    for path in options.models:
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        missing = [unit for unit in range(options.units) if (Path(path).name, unit) not in done]
        base = load(path) if missing else None
        for unit in tqdm(missing, desc=Path(path).name, unit="unit"):
            set_seed(1000 + unit)
            rows = data.shuffle(seed=unit).select(range(PROMPTS))
            rollout = roll_out(base, tokenizer, list(rows))
            arms = {arm: arm_of(base, rollout, arm, unit) for arm in ARMS}
            rounded = {arm: {k: float(f"{v:.5g}") for k, v in of.items()} for arm, of in arms.items()}
            mixed = int((rollout.advantages.view(-1, RESPONSES) != 0).any(1).sum())
            row = {"model": Path(path).name, "unit": unit, "prompts_with_advantage": mixed, "arms": rounded}
            with options.output.open("a", encoding="utf-8") as file:
                print(json.dumps(row), file=file)
    print(table(list(whole_lines(options.output))))


if __name__ == "__main__":
    main()
