"""`CPPOTrainer`: the narrow seam between the trust region and TRL's `GRPOTrainer`.

TRL computes -ρ_t Â_t per token, multiplies it by the result of `get_off_policy_mask` and aggregates. With its clip
range set to infinity, that hook is all a trust region needs. Four methods are wrapped, none is copied:

1. `_generate_and_score_completions`: the engine's log-probs, where there are any, become the anchor log μ.
2. `_get_per_token_logps_and_entropies`: inside the loss, log π becomes known here, and with it D_t. Over a rollout,
   Top-K is read off the trained model's pass; where vLLM gives all that is needed, that pass is left out.
3. `get_off_policy_mask`: the rule.
4. `_compute_loss`: checks that the rule was applied once, and logs what it did.

What they pass to one another lives in `cppo_trl.seam.state`, for as long as a rollout, a loss or an update.
"""

import inspect
import math
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from trl import GRPOTrainer

from cppo_trl.config import CPPOConfig
from cppo_trl.metrics import summarize
from cppo_trl.output.run_files import append_tokens
from cppo_trl.output.tokens import token_records
from cppo_trl.output.trainer import GuardedOutput
from cppo_trl.seam import checks, inputs
from cppo_trl.seam.state import Loss, Rollout, UpdateLedger, skip_zero_std_prompts
from cppo_trl.seam.topk import EngineTopK, check_kernel

_HOOKS = {  # the parts of TRL 1.16 that the seam relies on, by their first parameters
    "_compute_loss": ["self", "model", "inputs"],
    "_generate_and_score_completions": ["self", "inputs"],
    "_get_per_token_logps_and_entropies": "self model input_ids attention_mask logits_to_keep batch_size".split(),
    "get_off_policy_mask": "advantages per_token_logps sampling_per_token_logps mask off_policy_threshold".split(),
}


def check_trl() -> None:
    """Refuse a TRL that the seam was not made for, with a RuntimeError."""
    checks.check_hooks(GRPOTrainer, _HOOKS)


class CPPOTrainer(GuardedOutput, GRPOTrainer):
    """`trl.GRPOTrainer` whose loss is masked by the CPPO trust region (arXiv 2606.10968).

    The arguments are those of `trl.GRPOTrainer`, with a `CPPOConfig` as ``args``. The ratio and the divergence are
    taken against the rollout policy: the engine's log-probs where there are any (vLLM, ``rollout_func``), else
    those that the same model recomputes right after generation. ``cppo_topk_source="policy"`` takes the divergence
    against the latter in any case. A ``rollout_func`` that samples from older weights says so by an attribute
    ``lag=True``; Top-K is then refused.

    Raises:
        TypeError: if ``args`` is not a `CPPOConfig`.
        RuntimeError: if the installed TRL differs from the one that the seam was made for, or if a loss bypassed it.
        ValueError: for other arguments that do not fit (`cppo_trl.seam.inputs`), or a vLLM server that does not
            return the log-probs of the sampling distribution.
    """

    _tag_names = ["trl", "cppo"]  # noqa: RUF012
    _name = "CPPO"
    _paper = {  # noqa: RUF012
        "title": "Beyond Uniform Token-Level Trust Region in LLM Reinforcement Learning",
        "id": "2606.10968",
        "citation": textwrap.dedent("""\
            @article{mao2026beyond,
                title        = {{Beyond Uniform Token-Level Trust Region in LLM Reinforcement Learning}},
                author       = {Mao and Zhou and Tao and others},
                year         = 2026,
                eprint       = {arXiv:2606.10968},
            }"""),
    }

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: CPPOConfig | None = None, *rest: Any, **kwargs: Any
    ) -> None:
        check_trl()
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = CPPOConfig(f"{name.split('/')[-1]}-CPPO")
        if not isinstance(args, CPPOConfig):
            raise TypeError(f"args must be a cppo_trl.CPPOConfig; got {type(args).__name__} (same fields).")
        if args.uses_topk:
            check_kernel()
        given = inspect.signature(GRPOTrainer.__init__).bind(self, model, reward_funcs, args, *rest, **kwargs)
        inputs.check_arguments(args, given.arguments)
        super().__init__(model, inputs.checked(reward_funcs), args, *rest, **kwargs)
        inputs.check_model(args, self.model)
        checks.keep_fp32_outputs(self.accelerator)
        self.epsilon_low = self.epsilon_high = math.inf  # TRL's clip becomes the identity ...
        self.off_policy_mask_threshold = math.inf  # ... and its token mask, switched on, the slot for ours
        self._rollout: Rollout | None = None
        self._loss: Loss | None = None
        self._update = UpdateLedger()
        self._samples_with_engine = args.use_vllm and self.rollout_func is None  # a rollout_func may lag behind
        main = self.accelerator.is_main_process
        self._skips_pass = self._samples_with_engine and not args.topk_of_policy
        topk_of_engine = args.uses_topk and self._skips_pass
        self._engine_topk = EngineTopK(self.vllm_generation, args.cppo_topk) if topk_of_engine else None
        self._engine_check = checks.EngineCheck(args, main) if self._samples_with_engine else None
        if args.use_vllm and args.vllm_mode == "server" and main:
            info = self.vllm_generation.vllm_client.get_server_info()
            checks.check_server(info, args.cppo_topk if topk_of_engine else 0)
        self._set_up_output()
        if main:
            self._print_schedule()

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._rollout = rollout = Rollout(self.args, self.state.global_step, self.accelerator.process_index)
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            self._rollout = None
        rollout.complete(output, self._engine_topk)
        if self.args.skip_zero_std_prompts and self.model.training:
            skip_zero_std_prompts(output, self.accelerator, self.num_generations, self.loss_type)
        return output

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        compute = partial(super()._get_per_token_logps_and_entropies, model)
        if self._loss is not None:
            return self._loss.measure(compute, *args, **kwargs)
        unwrap = self.accelerator.unwrap_model
        if self._rollout is None or checks.is_reference(unwrap(model), unwrap(self.model)):
            return compute(*args, **kwargs)
        if self._skips_pass:
            return None, None, None  # the engine's log-probs are the anchor
        return self._rollout.score(compute, *args, **kwargs)

    def get_off_policy_mask(  # a static method upstream
        self,
        advantages: Tensor,
        per_token_logps: Tensor,
        sampling_per_token_logps: Tensor,
        mask: Tensor,
        off_policy_threshold: float,
    ) -> Tensor:
        """The weight of each token's surrogate -ρ_t Â_t under the trust region; ``(B, T)`` fp32, no gradient."""
        assert self._loss is not None  # inside a loss
        return self._loss.judge(advantages, mask)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        mode = "train" if self.model.training else "eval"
        self._loss = loss = Loss(inputs, self.args)
        try:
            value = super()._compute_loss(model, loss.batch)
        finally:
            self._loss = None
        self._update.add(loss.record(value, self.state.global_step))
        self._drop_clip_metrics(mode)
        if mode == "eval" or self.accelerator.sync_gradients:
            self._end_update(mode, loss)
        return value

    def _end_update(self, mode: str, last: Loss) -> None:
        """Log the metrics of an update, or of an evaluation batch."""
        total = self._update.total(self.accelerator.gather)
        self._update = UpdateLedger()
        scalars = summarize(total, self.args.theorem_bound)
        if self._engine_check is not None:
            self._engine_check(self.state.global_step, scalars)
        update, every = self.state.global_step + 1, self.args.log_tokens_steps
        if mode == "train" and self.is_world_process_zero() and every and update % every == 0:
            records = token_records(last.batch, *last.judged, self._tokenizer.batch_decode)
            append_tokens(Path(self.args.output_dir), update, records)
        self._log_update(mode, scalars, total)
