"""Accuracy of a model on a verifiable task: greedy and averaged over samples."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Accuracy:
    """Shares of right answers in [0, 1]; the standard error is that of the mean over problems."""

    greedy: float
    avg_at_k: float
    avg_at_k_stderr: float
    k: int

    def as_dict(self) -> dict[str, float]:
        """``greedy``, ``avg_at_16`` and ``avg_at_16_stderr`` (for k = 16)."""
        return {
            "greedy": self.greedy,
            f"avg_at_{self.k}": self.avg_at_k,
            f"avg_at_{self.k}_stderr": self.avg_at_k_stderr,
        }


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    solutions: Sequence[str],
    reward: Callable[..., list[float | None]],
    *,
    k: int = 16,
    temperature: float = 1.0,
    max_new_tokens: int = 64,
    batch_size: int = 512,
    seed: int = 0,
) -> Accuracy:
    """Answer every prompt once greedily and ``k`` times by sampling, and score the answers with ``reward``.

    Args:
        model: a causal language model; left in the mode it came in.
        tokenizer: its tokenizer, with a pad token.
        prompts: plain-text prompts.
        solutions: the gold answers, one for each prompt.
        reward: called as TRL calls it; rows where it returns None do not count.
        k: samples for each prompt.
        temperature: of the samples.
        max_new_tokens: longest answer, in tokens.
        batch_size: answers generated at once.
        seed: of the samples; the global random state is left as it was.
    """
    was_training = model.training
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        greedy = _scores(model, tokenizer, prompts, solutions, reward, max_new_tokens, batch_size, do_sample=False)
        repeated = [[x for x in column for _ in range(k)] for column in (prompts, solutions)]
        sampled = _scores(
            model,
            tokenizer,
            repeated[0],
            repeated[1],
            reward,
            max_new_tokens,
            batch_size,
            do_sample=True,
            temperature=temperature,
            top_p=1.0,
            top_k=0,
        )
    model.train(was_training)
    by_problem = sampled.view(len(prompts), k).nanmean(1)
    answered = by_problem[~by_problem.isnan()]
    stderr = answered.std().item() / math.sqrt(len(answered))
    return Accuracy(greedy.nanmean().item(), answered.mean().item(), stderr, k)


def _scores(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    solutions: Sequence[str],
    reward: Callable[..., list[float | None]],
    max_new_tokens: int,
    batch_size: int,
    **sampling: Any,
) -> torch.Tensor:
    scores: list[float | None] = []
    for start in tqdm(range(0, len(prompts), batch_size), desc="evaluating", leave=False):
        chunk = slice(start, start + batch_size)
        inputs = tokenizer(prompts[chunk], return_tensors="pt", padding=True, padding_side="left").to(model.device)
        with torch.no_grad():
            output = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                **sampling,
            )
        answers = tokenizer.batch_decode(output[:, inputs["input_ids"].size(1) :], skip_special_tokens=True)
        scores += reward(completions=answers, solution=solutions[chunk])
    return torch.tensor([float("nan") if score is None else score for score in scores])
