"""Mathematics rewards that compare by value and return in bounded time, whatever the model writes."""

from cppo_trl.rewards.answers import extract_answer, extract_gold
from cppo_trl.rewards.checker import Checker, Outcome
from cppo_trl.rewards.math import (
    AccuracyReward,
    AsyncAccuracyReward,
    accuracy_reward,
    accuracy_reward_async,
    compare_answers,
    format_reward,
    soft_overlong_punishment,
)

__all__ = [
    "AccuracyReward",
    "AsyncAccuracyReward",
    "Checker",
    "Outcome",
    "accuracy_reward",
    "accuracy_reward_async",
    "compare_answers",
    "extract_answer",
    "extract_gold",
    "format_reward",
    "soft_overlong_punishment",
]
