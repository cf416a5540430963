"""The task of the paired study: sums in worked steps, on which the expected reward is known without sampling.

A prompt is ``04+3+5=``: start at 4, add 3 and 5 in turn, modulo 100. A response is a fixed number of steps of eight
tokens, ``04+3=07;07+5=12;...``, and is right if every step is. So J = E[reward] is the probability of the right
response, one forward pass. Where the first token decides how well the rest is worked out, each has its right response.
"""

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cppo_trl.data import arithmetic

PROMPT = 7
"""Tokens of a prompt."""
TOKENIZER = arithmetic.tokenizer()


@dataclass(frozen=True)
class Task:
    """Sums of so many steps.

    Args:
        steps: of a response.
        errors: the tokens that may begin a response, "" for none, and the probability of a wrong step in its
            demonstrations.
        updates: of the warm start: those on at most 6 steps, and those on ``steps``.
    """

    steps: int = 6
    errors: tuple[tuple[str, float], ...] = (("", 0.1),)
    updates: tuple[int, int] = (500, 0)

    @property
    def length(self) -> int:
        """T, tokens of a response."""
        return 8 * self.steps + len(self.errors[0][0])

    def prompts(self, count: int, generator: random.Random) -> Tensor:
        """``(count, PROMPT)`` token ids."""
        drawn = [
            (generator.randrange(100), generator.randrange(1, 10), generator.randrange(1, 10)) for _ in range(count)
        ]
        return encode([f"{start:02d}+{first}+{second}=" for start, first, second in drawn])

    def answers(self, prompts: Tensor) -> Tensor:
        """The right responses, ``(B, first tokens, T)``."""
        return torch.stack([self.work_out(prompts, first, 0.0, random.Random(0)) for first, _ in self.errors], 1)

    def work_out(self, prompts: Tensor, first: str, error: float, generator: random.Random) -> Tensor:
        """Responses ``(B, T)``, in which each step is wrong by 1 to 3 with probability ``error``."""
        texts = []
        for prompt in TOKENIZER.batch_decode(prompts):
            total, *addends = map(int, prompt.replace(" ", "").rstrip("=").split("+"))
            text = first
            for step in range(self.steps):
                digit = addends[step % 2]
                result = total + digit
                if generator.random() < error:
                    result += generator.choice((-3, -2, -1, 1, 2, 3))
                text += f"{total:02d}+{digit}={result % 100:02d};"
                total = result % 100
            texts.append(text)
        return encode(texts)

    def demonstrations(self, count: int, generator: random.Random) -> Tensor:
        """``(count, PROMPT + T)``, with each first token equally often."""
        prompts = self.prompts(count, generator)
        parts = zip(prompts.chunk(len(self.errors)), self.errors, strict=True)
        worked = [self.work_out(part, first, error, generator) for part, (first, error) in parts]
        return torch.cat([prompts, torch.cat(worked)], 1)

    @cached_property
    def held_out(self) -> tuple[Tensor, Tensor]:
        """64 prompts that measure J, and their `answers`."""
        prompts = self.prompts(64, random.Random(0))
        return prompts, self.answers(prompts)

    @torch.no_grad()
    def objective(self, policy: PreTrainedModel) -> tuple[float, float]:
        """J, and the share of prompts that are answered right by greedy decoding."""
        prompts, answers = self.held_out
        each = answers.size(1)
        ids = torch.cat([prompts.repeat_interleave(each, 0), answers.flatten(0, 1)], 1)
        levels = logps(policy, ids)
        right = levels.gather(-1, ids[:, PROMPT:, None]).squeeze(-1).sum(-1).exp().view(-1, each)
        greedy = (levels.argmax(-1) == ids[:, PROMPT:]).all(-1).view(-1, each).any(-1)
        return float(right.sum(-1).mean()), float(greedy.float().mean())


def encode(texts: Sequence[str]) -> Tensor:
    """Texts of one length as ``(B, length)`` token ids."""
    return torch.tensor([TOKENIZER(text)["input_ids"] for text in texts])


def logps(policy: PreTrainedModel, ids: Tensor) -> Tensor:
    """The log π(· | s_t) along the responses of ``ids``, ``(B, PROMPT + T)`` to ``(B, T, V)``."""
    return policy(input_ids=ids).logits[:, PROMPT - 1 : -1].log_softmax(-1)


@torch.no_grad()
def sample(policy: PreTrainedModel, prompts: Tensor, length: int) -> Tensor:
    """Prompts with responses at temperature 1 from the whole vocabulary, ``(B, PROMPT + length)``."""
    return policy.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        top_k=0,
        max_new_tokens=length,
        eos_token_id=None,
        pad_token_id=0,
    )


def warm_start(task: Task, seed: int, directory: Path) -> PreTrainedModel:
    """A policy trained on erroneous demonstrations; kept in ``directory``."""
    torch.manual_seed(seed)
    policy = arithmetic.model(TOKENIZER, hidden=64)
    policy.config.max_position_embeddings = 1024
    file = directory / f"{hash_of((task, seed))}.pt"
    if file.exists():
        policy.load_state_dict(torch.load(file))
        return policy
    generator = random.Random(seed)
    short = Task(min(task.steps, 6), task.errors)
    _supervise(policy, short, generator, task.updates[0], rows=64, learning_rate=3e-3)
    _supervise(policy, task, generator, task.updates[1], rows=12 if task.steps > 40 else 24, learning_rate=2e-3)
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(policy.state_dict(), file)
    return policy


def _supervise(
    policy: PreTrainedModel, task: Task, generator: random.Random, updates: int, rows: int, learning_rate: float
) -> None:
    if not updates:
        return
    optimizer = torch.optim.AdamW(policy.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=updates, pct_start=0.05)
    for _ in range(updates):
        ids = task.demonstrations(rows, generator)
        step(policy, optimizer, -logps(policy, ids).gather(-1, ids[:, PROMPT:, None]).mean())
        schedule.step()


def step(policy: PreTrainedModel, optimizer: Any, loss: Tensor) -> None:
    """One update, with the gradient's norm clipped at 1."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()


def hash_of(key: Any) -> int:
    """A seed from whatever has a repr, the same in every process."""
    return zlib.crc32(repr(key).encode())
