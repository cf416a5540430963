"""What vLLM's server loads into its worker on a CPU, where TRL's way for weights (NCCL) does not exist."""

import vllm._custom_ops

from cppo_trl.asynchronous.file_transfer import LoadFromFile

vllm._custom_ops._supports_onednn = False  # before the model is loaded: packed weights take no new ones


class WeightsFromFile(LoadFromFile):
    """Mixed into the worker by ``--worker-extension-cls``."""
