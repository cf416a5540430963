"""CPPO (Cumulative Prefix-divergence Policy Optimization, arXiv 2606.10968) for Hugging Face TRL.

The trainer and its config are imported on first use, so that ``cppo_trl.rewards`` and its worker
processes never pay for importing torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cppo_trl.config import CPPOConfig
    from cppo_trl.trainer import CPPOTrainer

__all__ = ["CPPOConfig", "CPPOTrainer"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "CPPOConfig":
        from cppo_trl.config import CPPOConfig

        return CPPOConfig
    if name == "CPPOTrainer":
        from cppo_trl.trainer import CPPOTrainer

        return CPPOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
