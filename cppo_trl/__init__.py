"""CPPO (Cumulative Prefix-divergence Policy Optimization, arXiv 2606.10968) for Hugging Face TRL.

The trainers and their configs are imported on first use, so that ``cppo_trl.rewards`` and its worker
processes never pay for importing torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cppo_trl.asynchronous.config import AsyncCPPOConfig
    from cppo_trl.asynchronous.trainer import AsyncCPPOTrainer
    from cppo_trl.config import CPPOConfig
    from cppo_trl.trainer import CPPOTrainer

__all__ = ["AsyncCPPOConfig", "AsyncCPPOTrainer", "CPPOConfig", "CPPOTrainer"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room = "cppo_trl.asynchronous" if name.startswith("Async") else "cppo_trl"
    return getattr(import_module(f"{room}.{'trainer' if name.endswith('Trainer') else 'config'}"), name)
