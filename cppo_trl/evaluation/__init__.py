"""avg@k, pass@k and maj@k of a model on problems with verifiable answers; see ``docs/evaluation.md``."""

from cppo_trl.evaluation.callback import EvaluationCallback
from cppo_trl.evaluation.generation import Sampling
from cppo_trl.evaluation.grading import Accuracy, evaluate
from cppo_trl.evaluation.metrics import Record, all_metrics
from cppo_trl.evaluation.problems import Problem, load_problems, problems_of

__all__ = [
    "Accuracy",
    "EvaluationCallback",
    "Problem",
    "Record",
    "Sampling",
    "all_metrics",
    "evaluate",
    "load_problems",
    "problems_of",
]
