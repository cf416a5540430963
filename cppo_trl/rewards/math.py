"""Reward functions for mathematics, with TRL's signature."""

import asyncio
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from cppo_trl.rewards.answers import SOURCES, extract_answer, extract_gold
from cppo_trl.rewards.checker import Outcome, shared_checker

Completion = str | Sequence[Mapping[str, Any]] | None
LogExtra = Callable[[str, list], None]
LogMetric = Callable[[str, float], None]

MAX_CHARS = 2000  # of an answer or a gold; a text beyond is neither
_METRICS = ["reward/" + kind for kind in "unparseable_gold no_answer unparseable_answer timeout error".split()]
_THOUGHT_AND_ANSWER = re.compile(r"<think>(?:(?!</?think>).)*</think>(?:(?!</?think>).)+", re.DOTALL)
_PLAIN_INTEGER = re.compile(r"-?[1-9][0-9]{0,17}|0")


def completion_text(completion: Completion) -> str:
    """Return the text of a completion: a string, or the last message of a conversation that has a text."""
    if isinstance(completion, str):
        return completion
    for message in reversed(completion or []):
        content = message.get("content")
        if isinstance(content, list):  # parts, as in multimodal conversations
            content = "".join(part.get("text") or "" for part in content)
        if content:
            return content
    return ""


def compare_answers(
    golds: Sequence[str | None], answers: Sequence[str | None], time_limit: float = 5.0
) -> list[Outcome]:
    """Compare extracted answers, each with its gold, in the shared pool where it needs mathematics.

    Args:
        golds: As from ``extract_gold``, or as from ``extract_answer`` to compare two answers.
        answers: As from ``extract_answer``, one for each gold.
        time_limit: Seconds one comparison may take.

    Raises:
        RuntimeError: If no worker process can be started.
    """
    plain = [_compare_plainly(gold, answer) for gold, answer in zip(golds, answers, strict=True)]
    pairs = [(gold or "", answer or "") for gold, answer, done in zip(golds, answers, plain, strict=True) if not done]
    checked = iter(shared_checker().check(pairs, time_limit) if pairs else ())
    return [outcome or next(checked) for outcome in plain]


class AccuracyReward:
    r"""Reward 1.0 for a completion whose final answer equals the gold, 0.0 otherwise, None for an unusable gold.

    Instances are picklable and share one pool of worker processes.

    Args:
        sources: Where an answer may stand: ``"boxed"``, ``"answer_line"`` (a last line ``Answer: 42``) or both.
        time_limit: Seconds one comparison may take; past it the answer counts as wrong.
        partial_credit: Reward of a wrong answer that could be read as mathematics. Default 0.0: off.
        name: Name under which a trainer logs the reward.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        sources: str | Collection[str] = SOURCES,
        time_limit: float = 5.0,
        partial_credit: float = 0.0,
        name: str = "accuracy_reward",
    ):
        sources = (sources,) if isinstance(sources, str) else tuple(sources)
        if not sources or not set(sources) <= set(SOURCES):
            raise ValueError(f"sources must name some of {', '.join(SOURCES)}; got {sources!r}")
        if not time_limit > 0:
            raise ValueError(f"time_limit must be a positive number of seconds, got {time_limit!r}")
        if not 0 <= partial_credit < 1:
            raise ValueError(f"partial_credit must be at least 0 (off) and below 1, got {partial_credit!r}")
        self.sources = sources
        self.time_limit = time_limit
        self.partial_credit = partial_credit
        self.__name__ = name

    def __call__(
        self,
        completions: Sequence[Completion],
        solution: Sequence[Any],
        log_extra: LogExtra | None = None,
        log_metric: LogMetric | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        """Grade a batch.

        Args:
            completions: Strings or lists of messages.
            solution: The golds, one for each completion.
            log_extra: Given the columns ``gold_parsed``, ``answer_parsed``, ``verdict`` and ``why``.
            log_metric: Given the shares of the batch ``reward/unparseable_gold``, ``reward/no_answer``,
                ``reward/unparseable_answer``, ``reward/timeout`` and ``reward/error``.
            **kwargs: What else a trainer passes; not used.

        Raises:
            ValueError: If there are not as many golds as completions.
            RuntimeError: If no worker process can be started.
        """
        outcomes = self.grade(completions, solution)
        if log_extra is not None:
            verdicts = {"equal": "right", "unparseable_gold": "skipped"}
            log_extra("gold_parsed", [outcome.gold for outcome in outcomes])
            log_extra("answer_parsed", [outcome.answer for outcome in outcomes])
            log_extra("verdict", [verdicts.get(outcome.why, "wrong") for outcome in outcomes])
            log_extra("why", [outcome.why for outcome in outcomes])
        if log_metric is not None and outcomes:
            kinds = ["error" if outcome.why == "crash" else outcome.why.partition(":")[0] for outcome in outcomes]
            for name in _METRICS:
                log_metric(name, kinds.count(name.removeprefix("reward/")) / len(kinds))
        return [self.reward(outcome) for outcome in outcomes]

    def grade(self, completions: Sequence[Completion], solution: Sequence[Any]) -> list[Outcome]:
        """Compare each completion with its gold, for use without a trainer.

        Args:
            completions: Strings or lists of messages.
            solution: The golds, one for each completion.

        Raises:
            ValueError: If there are not as many golds as completions.
            RuntimeError: If no worker process can be started.
        """
        if len(completions) != len(solution):
            raise ValueError(f"solution has {len(solution)} golds for {len(completions)} completions; give one each")
        answers = [extract_answer(completion_text(completion), self.sources) for completion in completions]
        return compare_answers([extract_gold(gold) for gold in solution], answers, self.time_limit)

    def reward(self, outcome: Outcome) -> float | None:
        """Return the reward for an outcome; None if the gold could not be read."""
        return {"equal": 1.0, "different": self.partial_credit, "unparseable_gold": None}.get(outcome.why, 0.0)


class AsyncAccuracyReward(AccuracyReward):
    """The same as a coroutine: other rewards and the event loop go on while the pool works."""

    async def __call__(  # type: ignore[override]
        self, completions: Sequence[Completion], solution: Sequence[Any], **kwargs: Any
    ) -> list[float | None]:
        """Grade a batch; as :meth:`AccuracyReward.__call__`."""
        return await asyncio.to_thread(super().__call__, completions, solution, **kwargs)


accuracy_reward = AccuracyReward()
accuracy_reward_async = AsyncAccuracyReward()


def format_reward(completions: Sequence[Completion], **kwargs: Any) -> list[float]:
    """Reward 1.0 for one thinking part, in ``<think>`` tags at the start, followed by an answer; 0.0 otherwise."""
    return [float(bool(_THOUGHT_AND_ANSWER.fullmatch(completion_text(text).strip()))) for text in completions]


def soft_overlong_punishment(max_completion_len: int, soft_punish_cache: int) -> Callable[..., list[float]]:
    """Return DAPO's length penalty, which is TRL's own; lengths in tokens. Imported on use, for it brings torch."""
    from trl.rewards import get_soft_overlong_punishment  # noqa: PLC0415

    return get_soft_overlong_punishment(max_completion_len, soft_punish_cache)


def _compare_plainly(gold: str | None, answer: str | None) -> Outcome | None:
    """Return the outcome where it needs no mathematics: one is missing or too long, or both are plain integers."""
    if gold is None or len(gold) > MAX_CHARS:
        return Outcome("unparseable_gold")
    if answer is None or len(answer) > MAX_CHARS:
        return Outcome("no_answer" if answer is None else "unparseable_answer")
    if _PLAIN_INTEGER.fullmatch(gold) and _PLAIN_INTEGER.fullmatch(answer):
        return Outcome("equal" if gold == answer else "different", gold, answer)
    return None
