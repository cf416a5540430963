"""From problems to records: generate, decode, score, extract answers and group equal ones; `evaluate` in one call."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cppo_trl.evaluation.generation import Completion, Generator, Sampling, TransformersGenerator, encode, seed_of
from cppo_trl.evaluation.metrics import RIGHT, Metrics, Record, benchmark_metrics
from cppo_trl.evaluation.problems import Problem, Prompt
from cppo_trl.rewards import accuracy_reward, compare_answers, extract_answer
from cppo_trl.rewards.answers import SOURCES as ANSWER_PLACES

Reward = Callable[..., list[float | None]]


@dataclass(frozen=True)
class Evaluator:
    """Answers problems and grades the answers.

    Args:
        generate: Generates completions.
        tokenizer: Tokenizer of the model.
        sampling: How completions are sampled.
        reward: As in `grade`.
        template_kwargs: Arguments of the chat template, such as ``{"enable_thinking": False}``.
    """

    generate: Generator
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    reward: Reward = accuracy_reward
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, problems: Sequence[Problem], seeds: Sequence[int] | None = None) -> list[Record]:
        """Answer and grade. Sample i of a problem has the seed of the problem + i.

        Args:
            problems: The problems.
            seeds: Seed of each problem. Defaults to one derived from the sampling seed and the problem's name.
        """
        if seeds is None:
            seeds = [seed_of(self.sampling.seed, problem.benchmark, problem.id) for problem in problems]
        prompts = encode(self.tokenizer, [problem.prompt for problem in problems], self.template_kwargs)
        samples = range(self.sampling.samples)
        repeated = [prompt for prompt in prompts for _ in samples]
        completions = self.generate(repeated, self.sampling, [seed + sample for seed in seeds for sample in samples])
        return grade(problems, completions, self.tokenizer, self.reward)


def grade(
    problems: Sequence[Problem],
    completions: Sequence[Completion],
    tokenizer: PreTrainedTokenizerBase,
    reward: Reward,
) -> list[Record]:
    """Score the completions of each problem.

    Args:
        problems: The problems.
        completions: All samples of the first problem, then all of the second, and so on; equally many of each.
        tokenizer: Decodes them, without special tokens.
        reward: Called as TRL calls it, with ``completions`` (strings, or messages where prompts are conversations)
            and ``solution``. Its attribute ``sources``, if any, says where answers are looked for.
    """
    n = len(completions) // len(problems)
    texts = tokenizer.batch_decode([completion.tokens for completion in completions], skip_special_tokens=True)
    asked = [problem for problem in problems for _ in range(n)]
    graded = [
        text if isinstance(problem.prompt, str) else [{"role": "assistant", "content": text}]
        for problem, text in zip(asked, texts, strict=True)
    ]
    scores = reward(completions=graded, solution=[problem.solution for problem in asked])
    answers = [extract_answer(text, getattr(reward, "sources", ANSWER_PLACES)) for text in texts]
    records = []
    for row, problem in enumerate(problems):
        mine = slice(row * n, row * n + n)
        records.append(
            Record(
                benchmark=problem.benchmark,
                id=problem.id,
                solution=problem.solution,
                completions=texts[mine],
                lengths=[len(completion.tokens) for completion in completions[mine]],
                truncated=[completion.truncated for completion in completions[mine]],
                answers=answers[mine],
                groups=group_answers(answers[mine], scores[mine]),
                scores=scores[mine],
            )
        )
    return records


def group_answers(answers: Sequence[str | None], scores: Sequence[float | None]) -> list[int | None]:
    """Number the groups of equal answers to a problem; None where there is no answer.

    Right answers equal the gold answer and form group 0. A wrong answer joins the first earlier one that the reward's
    checker finds equal. Wrong answers with different spellings are compared only where that can decide the vote:
    where some answers are right, but not more than are wrong.
    """
    given = [(answer, score == RIGHT) for answer, score in zip(answers, scores, strict=True)]
    wrong = [answer for answer, right in given if answer is not None and not right]
    right_count = sum(answer is not None for answer in answers) - len(wrong)
    distinct = list(dict.fromkeys(wrong))
    pairs = list(combinations(distinct, 2)) if 0 < right_count <= len(wrong) else []
    outcomes = compare_answers([earlier for earlier, _ in pairs], [later for _, later in pairs])
    equal = {pair for pair, outcome in zip(pairs, outcomes, strict=True) if outcome.why == "equal"}
    group: dict[str, int] = {}
    for answer in distinct:
        same = (number for earlier, number in group.items() if (earlier, answer) in equal)
        group[answer] = next(same, len(group) + 1)
    return [None if answer is None else 0 if right else group[answer] for answer, right in given]


@dataclass(frozen=True)
class Accuracy:
    """Mean scores in [0, 1] over problems.

    Attributes:
        greedy: Mean score of one greedy completion per problem.
        avg_at_k: Mean score of k samples per problem.
        avg_at_k_stderr: Its standard error over problems; None for one problem.
        k: Samples per problem.
        metrics: All of `cppo_trl.evaluation.metrics.benchmark_metrics` of the samples.
    """

    greedy: float
    avg_at_k: float
    avg_at_k_stderr: float | None
    k: int
    metrics: Metrics

    def as_dict(self) -> dict[str, float | None]:
        """Return ``greedy``, ``avg_at_16`` and ``avg_at_16_stderr`` (for k = 16)."""
        sampled = {f"avg_at_{self.k}": self.avg_at_k, f"avg_at_{self.k}_stderr": self.avg_at_k_stderr}
        return {"greedy": self.greedy, **sampled}


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    solutions: Sequence[str],
    reward: Reward,
    *,
    k: int = 16,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 64,
    batch_size: int = 512,
    seed: int = 0,
) -> Accuracy:
    """Score one greedy completion and ``k`` samples of each prompt.

    Args:
        model: A causal language model; its mode and torch's random state are restored.
        tokenizer: Its tokenizer.
        prompts: Plain texts or conversations.
        solutions: Gold answers, one per prompt.
        reward: Called as TRL calls it; problems for which it returns None do not count.
        k: Samples per prompt.
        temperature: Sampling temperature.
        top_p: Nucleus sampling mass.
        max_new_tokens: Longest completion in tokens.
        batch_size: Completions generated at a time.
        seed: Seed of the samples.

    Raises:
        ValueError: If the numbers of prompts and solutions differ, an option is out of range, or no problem counts.
    """
    if len(prompts) != len(solutions):
        raise ValueError(f"solutions has {len(solutions)} gold answers for {len(prompts)} prompts; give one for each.")
    problems = [Problem("task", str(i), *row) for i, row in enumerate(zip(prompts, solutions, strict=True))]
    generate = TransformersGenerator(model, tokenizer, batch_size)
    sampled = Evaluator(generate, tokenizer, Sampling(k, temperature, top_p, max_new_tokens, seed), reward)
    greedy = replace(sampled, sampling=Sampling(1, 0.0, 1.0, max_new_tokens, seed))
    seeds = [seed] * len(problems)
    once, metrics = benchmark_metrics(greedy(problems, seeds)), benchmark_metrics(sampled(problems, seeds))
    return Accuracy(once["avg@1"], metrics[f"avg@{k}"], metrics[f"avg@{k}_stderr"], k, metrics)
