"""`evaluate`: a model in memory, in one call."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cppo_trl.evaluation.generation import Sampling, TransformersGenerator
from cppo_trl.evaluation.grading import Evaluator, Reward
from cppo_trl.evaluation.metrics import benchmark_metrics
from cppo_trl.evaluation.problems import Problem, Prompt


@dataclass(frozen=True)
class Accuracy:
    """Shares of right answers in [0, 1]; the standard error is that of the mean over problems, None for one problem.

    Attributes:
        greedy: Of one greedy answer to each problem.
        avg_at_k: Of k samples of each.
        avg_at_k_stderr: Its standard error.
        k: Samples of each problem.
        metrics: Of the samples: `cppo_trl.evaluation.metrics.benchmark_metrics`.
    """

    greedy: float
    avg_at_k: float
    avg_at_k_stderr: float | None
    k: int
    metrics: Mapping[str, float | None]

    def as_dict(self) -> dict[str, float | None]:
        """``greedy``, ``avg_at_16`` and ``avg_at_16_stderr`` (for k = 16)."""
        return {
            "greedy": self.greedy,
            f"avg_at_{self.k}": self.avg_at_k,
            f"avg_at_{self.k}_stderr": self.avg_at_k_stderr,
        }


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
    """Answer every prompt once greedily and ``k`` times by sampling, and score the answers with ``reward``.

    Args:
        model: A causal language model; its mode and the global random state are left as they were.
        tokenizer: Its tokenizer.
        prompts: Plain texts or conversations.
        solutions: The gold answers, one for each prompt.
        reward: Called as TRL calls it; problems where it returns None do not count.
        k: Samples for each prompt.
        temperature: Of the samples.
        top_p: Of the samples.
        max_new_tokens: Longest answer, in tokens.
        batch_size: Answers generated at once.
        seed: Of the samples.

    Raises:
        ValueError: If there are not as many solutions as prompts, an option is out of range, or no problem counts.
    """
    if len(prompts) != len(solutions):
        raise ValueError(f"solutions has {len(solutions)} golds for {len(prompts)} prompts; give one for each.")
    problems = [Problem("task", str(i), *row) for i, row in enumerate(zip(prompts, solutions, strict=True))]
    sampling = Sampling(k, temperature, top_p, max_new_tokens, seed)
    sampled = Evaluator(
        TransformersGenerator(model, tokenizer, batch_size, progress=True), tokenizer, sampling, reward
    )
    greedy = replace(sampled, sampling=Sampling(1, 0.0, 1.0, max_new_tokens, seed))
    seeds = [seed] * len(problems)  # one for all: they are sampled in one call
    greedy_metrics = benchmark_metrics(greedy(problems, seeds))
    metrics = benchmark_metrics(sampled(problems, seeds))
    average = metrics[f"avg@{k}"]
    assert average is not None
    assert greedy_metrics["avg@1"] is not None
    return Accuracy(greedy_metrics["avg@1"], average, metrics[f"avg@{k}_stderr"], k, metrics)
