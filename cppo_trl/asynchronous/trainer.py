"""`AsyncCPPOTrainer`: the trust region on rollouts that are old by design. Experimental, as its host is.

TRL's `AsyncGRPOTrainer` trains while a vLLM server generates, so every sample is some updates old. Three methods are
wrapped, none is copied:

1. `compute_loss`: the rule (`cppo_trl.asynchronous.loss`).
2. `get_train_dataloader`: samples arrive stamped with the update that they were sampled at.
3. `_sync_weight`: which update a version of the weights is of; adapters that an earlier run left are unloaded.
"""

import math
from functools import partial
from typing import Any

import requests
from torch import Tensor
from torch.utils.data import DataLoader
from trl.experimental.async_grpo import AsyncGRPOTrainer
from trl.experimental.async_grpo.async_rollout_worker import AsyncRolloutWorker

from cppo_trl.asynchronous.config import AsyncCPPOConfig
from cppo_trl.asynchronous.loss import TOLERANCE, PackedLoss
from cppo_trl.asynchronous.samples import StampedCollator, StampedQueue, seeded, staleness_scalars
from cppo_trl.metrics import summarize
from cppo_trl.output.checkpoints import RunError
from cppo_trl.output.trainer import GuardedOutput
from cppo_trl.seam import checks
from cppo_trl.seam.state import UpdateLedger
from cppo_trl.trainer import CPPOTrainer

_HOOKS = {  # the parts of TRL 1.16 that the seam relies on, by their first parameters
    "compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
    "get_train_dataloader": ["self"],
    "_sync_weight": ["self"],
}


class AsyncCPPOTrainer(GuardedOutput, AsyncGRPOTrainer):
    """TRL's experimental `AsyncGRPOTrainer` with the CPPO trust region (arXiv 2606.10968) in place of PPO's clip.

    The arguments are those of `AsyncGRPOTrainer`, with an `AsyncCPPOConfig` as ``args``. Ratio and divergence are
    taken against the log-probs that the vLLM server reported when it sampled.

    Raises:
        TypeError: if ``args`` is not an `AsyncCPPOConfig`.
        RuntimeError: if the installed TRL differs from the one that the seam was made for, at start-up or in a loss.
        ValueError: if the server does not return the log-probs of the sampling distribution.
        RunError: if the server stops answering.
    """

    _tag_names = ["trl", "cppo", "async-grpo"]  # noqa: RUF012
    _name = "AsyncCPPO"
    _paper = CPPOTrainer._paper

    def __init__(
        self, model: str, reward_funcs: Any = None, args: AsyncCPPOConfig | None = None, *rest: Any, **kwargs: Any
    ) -> None:
        checks.check_hooks(AsyncGRPOTrainer, _HOOKS)
        if args is None:
            args = AsyncCPPOConfig(f"{model.rsplit('/', maxsplit=1)[-1]}-AsyncCPPO")
        if not isinstance(args, AsyncCPPOConfig):
            raise TypeError(f"args must be a cppo_trl.AsyncCPPOConfig; got {type(args).__name__} (same fields).")
        super().__init__(model, reward_funcs, args, *rest, **kwargs)
        checks.keep_fp32_outputs(self.accelerator)
        self.epsilon_low = self.epsilon_high = math.inf  # TRL's clip becomes the identity
        self._update = UpdateLedger()
        self._updates_at: dict[int, int] = {}  # updates made when a version of the weights was published
        # an update trains on samples of at most so many updates ago, and on what it waits for itself
        self._staleness_bins = (args.max_staleness + 1) * args.weight_sync_steps + 1
        self._engine_check = checks.EngineCheck(args, self.accelerator.is_main_process)
        self._set_up_output()
        if not self.accelerator.is_main_process:
            return
        if isinstance(self.rollout_worker, AsyncRolloutWorker):
            self.rollout_worker._loop_cls = partial(seeded, self.rollout_worker._loop_cls, args.seed)
            self.vllm_client.wait_for_server_ready()
            checks.check_server(self.vllm_client.get_server_info(), topk=0)
        self.rollout_queue = StampedQueue(
            self.rollout_queue,  # type: ignore[has-type]
            lambda version: self._updates_at.get(version, self.state.global_step),
            lambda version: self.model_version - version > args.max_staleness,
            self._metrics["train"],
        )
        self._print_schedule()

    def get_train_dataloader(self) -> DataLoader:
        """TRL's, whose batches also hold ``sampled_at``."""
        loader = super().get_train_dataloader()
        base = loader.base_dataloader
        base.collate_fn = StampedCollator(base.collate_fn)
        return loader

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """TRL's loss, each term weighted by the rule."""
        packed = PackedLoss(inputs, self.args, self.state.global_step)
        loss = super().compute_loss(partial(packed.forward, model), packed.inputs)
        accumulation = self.current_gradient_accumulation_steps
        tokens = (inputs["global_n_tokens"][0] / self.accelerator.num_processes).clamp(min=1.0) * accumulation
        aux = self.router_aux_loss_coef / accumulation if self.aux_loss_enabled else 0.0
        loss, off = packed.finish(loss, tokens, aux)
        self._update.add(packed.record(loss, off, self._staleness_bins))
        self._drop_clip_metrics("train")
        if self.accelerator.sync_gradients:
            self._end_update()
        return loss

    def _end_update(self) -> None:
        """Log the metrics of an update."""
        total, size = self._update.total(self.accelerator.gather), 5 * self._staleness_bins
        self._update = UpdateLedger()
        table, off, record = total[:size], total[size], total[size + 1 :]
        if off > TOLERANCE:
            raise RuntimeError(
                f"TRL's loss differs from the surrogate by {off:.1%}. Install trl>=1.16,<1.17 unpatched."
            )
        scalars = summarize(record, self.args.theorem_bound) | staleness_scalars(table)
        self._engine_check(self.state.global_step, scalars)
        self._log_update("train", scalars, record)

    def _sync_weight(self) -> None:
        if not self._updates_at and self._lora_sync and self.accelerator.is_main_process:
            self._unload_adapters()
        super()._sync_weight()
        self._updates_at[self.model_version] = self.state.global_step

    def _unload_adapters(self) -> None:
        """Unload the adapters that an earlier run published on the same server: it refuses a name that it holds."""
        reply = requests.get(f"{self.vllm_client.server_url}/v1/models", timeout=self.args.request_timeout)
        reply.raise_for_status()
        for model in reply.json()["data"]:
            if model["id"].startswith(f"{self._lora_name}-v"):
                self.vllm_client.unload_lora_adapter(model["id"])

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, as `AsyncGRPOTrainer`.

        Raises:
            RunError: if the vLLM server stops answering.
        """
        try:
            return super().train(*args, **kwargs)
        except Exception as error:
            if isinstance(self.rollout_worker, AsyncRolloutWorker) and not self._server_answers():
                raise RunError(
                    f"The vLLM server at {self.args.vllm_server_base_url} no longer answers, after "
                    f"{self.state.global_step} updates. Start it again, and repeat the command with "
                    f"resume_from_checkpoint set to true: {self.args.output_dir} holds the last checkpoint."
                ) from error
            raise

    def _server_answers(self) -> bool:
        try:
            return requests.get(f"{self.vllm_client.server_url}/health", timeout=5).ok
        except requests.RequestException:
            return False
