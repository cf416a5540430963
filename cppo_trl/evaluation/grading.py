"""From problems to records: ask, decode, score, extract the answers and group the equal ones."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from cppo_trl.evaluation.generation import Completion, Generator, Sampling, encode, seed_of
from cppo_trl.evaluation.metrics import RIGHT, Record
from cppo_trl.evaluation.problems import Problem
from cppo_trl.rewards import accuracy_reward, compare_answers, extract_answer
from cppo_trl.rewards.answers import SOURCES

Reward = Callable[..., list[float | None]]


def grade(
    problems: Sequence[Problem],
    completions: Sequence[Sequence[Completion]],
    tokenizer: PreTrainedTokenizerBase,
    reward: Reward,
) -> list[Record]:
    """Score the completions of each problem.

    Args:
        problems: What was asked.
        completions: The samples of each problem.
        tokenizer: Decodes them; special tokens are left out.
        reward: Called as TRL calls it, with ``completions`` (strings, or messages where prompts are conversations)
            and ``solution``. Its ``sources``, if it has any, say where an answer may stand.
    """
    texts = [tokenizer.batch_decode([c.tokens for c in row], skip_special_tokens=True) for row in completions]
    scores = iter(
        reward(
            completions=[
                text if isinstance(problem.prompt, str) else [{"role": "assistant", "content": text}]
                for problem, row in zip(problems, texts, strict=True)
                for text in row
            ],
            solution=[problem.solution for problem, row in zip(problems, texts, strict=True) for _ in row],
        )
    )
    scored = [[next(scores) for _ in row] for row in texts]
    sources = getattr(reward, "sources", SOURCES)
    answers = [[extract_answer(text, sources) for text in row] for row in texts]
    return [
        Record(
            benchmark=problem.benchmark,
            id=problem.id,
            solution=problem.solution,
            completions=texts[row],
            lengths=[len(c.tokens) for c in completions[row]],
            truncated=[c.truncated for c in completions[row]],
            answers=answers[row],
            groups=groups,
            scores=scored[row],
        )
        for row, (problem, groups) in enumerate(zip(problems, group_answers(answers, scored), strict=True))
    ]


@dataclass(frozen=True)
class Evaluator:
    """Everything between problems and their records.

    Args:
        generate: Answers prompts.
        tokenizer: The model's.
        sampling: How.
        reward: As in `grade`.
        template_kwargs: Passed to the chat template, such as ``{"enable_thinking": False}``.
    """

    generate: Generator
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    reward: Reward = accuracy_reward
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, problems: Sequence[Problem], seeds: Sequence[int] | None = None) -> list[Record]:
        """Answer and grade; by default a problem's seed comes from the sampling's seed and the problem's name."""
        if seeds is None:
            seeds = [seed_of(self.sampling.seed, problem.benchmark, problem.id) for problem in problems]
        prompts = encode(self.tokenizer, [problem.prompt for problem in problems], self.template_kwargs)
        completions = self.generate(prompts, self.sampling, seeds)
        return grade(problems, completions, self.tokenizer, self.reward)


def group_answers(
    answers: Sequence[Sequence[str | None]], scores: Sequence[Sequence[float | None]]
) -> list[list[int | None]]:
    """Number the groups of equal answers of each problem; None where there is no answer.

    Right answers all equal the gold: they are group 0. A wrong answer joins the first one before it that the reward's
    checker finds equal. Wrong answers of different spelling are compared only where that can decide the vote: where
    some answers are right, but not more than are wrong.
    """
    wrong: list[list[str]] = []  # of each problem, the distinct ones, in order
    pairs: dict[tuple[int, str, str], None] = {}
    for row, (given, scored) in enumerate(zip(answers, scores, strict=True)):
        right = sum(a is not None and s == RIGHT for a, s in zip(given, scored, strict=True))
        others = [a for a, s in zip(given, scored, strict=True) if a is not None and s != RIGHT]
        wrong.append(list(dict.fromkeys(others)))
        if 0 < right <= len(others):
            pairs |= {(row, a, b): None for at, b in enumerate(wrong[-1]) for a in wrong[-1][:at]}
    outcomes = compare_answers([a for _, a, _ in pairs], [b for _, _, b in pairs])
    equal = {pair for pair, outcome in zip(pairs, outcomes, strict=True) if outcome.why == "equal"}
    result: list[list[int | None]] = []
    for row, (given, scored) in enumerate(zip(answers, scores, strict=True)):
        group: dict[str, int] = {}
        for at, answer in enumerate(wrong[row]):
            group[answer] = next((group[a] for a in wrong[row][:at] if (row, a, answer) in equal), at + 1)
        result.append(
            [None if a is None else 0 if s == RIGHT else group[a] for a, s in zip(given, scored, strict=True)]
        )
    return result
