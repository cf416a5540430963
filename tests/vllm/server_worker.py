"""What vLLM's server loads into its worker on a CPU, where TRL's way for weights (NCCL) does not exist."""

import vllm._custom_ops
from safetensors.torch import load_file

vllm._custom_ops._supports_onednn = False  # before the model is loaded: packed weights take no new ones


class WeightsFromFile:
    """Mixed into the worker by ``--worker-extension-cls``."""

    def load_from_file(self, path):
        self.model_runner.model.load_weights(load_file(path).items())
