"""`CPPOTrainer`: the narrow seam between the trust region and TRL's `GRPOTrainer`.

TRL computes -ρ_t Â_t per token, multiplies it by the result of `get_off_policy_mask` and aggregates. With its clip
range set to infinity, that hook is all a trust region needs. Four methods are wrapped, none is copied:

1. `_generate_and_score_completions`: the engine's log-probs, where there are any, become the anchor log μ.
2. `_get_per_token_logps_and_entropies`: inside the loss, once log π is known, the anchor is made safe to divide by.
   Top-K is read off here, and with vLLM TRL's own pass over the rollout is left out.
3. `get_off_policy_mask`: the rule; its weight and its metrics.
4. `_compute_loss`: hands the batch to the two above, checks that the rule was applied once, logs its record.
"""

import inspect
import math
import textwrap
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from trl import GRPOTrainer

from cppo_trl.config import CPPOConfig
from cppo_trl.divergence import anchor_logps, binary_kl, binary_tv, topk_kl, topk_tv
from cppo_trl.metrics import (
    add_records,
    count_nonfinite_loss,
    loss_record,
    position_profile,
    summarize,
    total_over_processes,
)
from cppo_trl.output.checkpoints import ExactResume, saving
from cppo_trl.output.model_card import complete_card
from cppo_trl.output.nonfinite import require_finite, stop
from cppo_trl.output.run_files import append_profile, append_tokens, write_run
from cppo_trl.output.tokens import token_records, token_table
from cppo_trl.seam.checks import EngineCheck, check_arguments, check_hooks, check_server, require_rows
from cppo_trl.seam.topk import EngineTopK, HeadTap, check_kernel

ESTIMATORS = {"binary_tv": binary_tv, "binary_kl": binary_kl, "topk_tv": topk_tv, "topk_kl": topk_kl}


class _WriteRun(TrainerCallback):
    """Leaves the configuration beside the logs when training begins."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            write_run(Path(args.output_dir), model.config._name_or_path, args.schedule(), args.to_dict())


class CPPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` whose loss is masked by the CPPO trust region (arXiv 2606.10968).

    The arguments are those of `trl.GRPOTrainer`, with a `CPPOConfig` as ``args``. The ratio and the divergence are
    taken against the rollout policy: the engine's log-probs where there are any (vLLM, ``rollout_func``), else
    those that the same model recomputes right after generation.

    Raises:
        TypeError: if ``args`` is not a `CPPOConfig`.
        RuntimeError: if the installed TRL differs from the one that the seam was made for, or if a loss bypassed it.
        ValueError: if a vLLM server does not return the log-probs of the sampling distribution.
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
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = CPPOConfig(f"{name.split('/')[-1]}-CPPO")
        if not isinstance(args, CPPOConfig):
            raise TypeError(
                f"args must be a cppo_trl.CPPOConfig; got {type(args).__name__}. It takes the same fields."
            )
        check_hooks()
        if args.uses_topk:
            check_kernel()
        given = inspect.signature(GRPOTrainer.__init__).bind(self, model, reward_funcs, args, *rest, **kwargs)
        check_arguments(args, given.arguments)
        require_rows(given.arguments.get("train_dataset"), args)
        super().__init__(model, reward_funcs, args, *rest, **kwargs)
        self._check_model()
        if not args.trust_region.startswith("cppo"):  # the model card names the method that trained
            self._name, self._paper = args.rule.source.split(",")[0], {}
        self.epsilon_low = self.epsilon_high = math.inf  # TRL's clip becomes the identity ...
        self.off_policy_mask_threshold = math.inf  # ... and its token mask, switched on, the slot for ours
        self._loss_inputs: dict[str, Any] | None = None  # the batch of the loss being computed
        self._window: list[tuple[Tensor, dict[str, Any]]] = []  # loss and batch, each micro-batch of this update
        self._rule_calls = 0
        self._rollout_step = -1  # updates made when the last rollout was
        self._rollout_pass_due = False
        self._rollout_tap: tuple[Tensor, HeadTap] | None = None  # log-probs of the rollout pass, and their Top-K
        self._loss_topk: tuple[Tensor, Tensor] | None = None  # log π and log μ of the listed tokens
        self._engine_topk = (
            EngineTopK(self.vllm_generation, args.cppo_topk) if args.uses_topk and args.use_vllm else None
        )
        uses_engine = args.use_vllm and self.rollout_func is None  # a rollout_func may sample from older weights
        self._engine_check = EngineCheck(args, self.accelerator.is_main_process) if uses_engine else None
        self._record: Any = None  # metrics of the micro-batches since the last update
        self.add_callback(_WriteRun)
        self.add_callback(ExactResume)
        if args.use_vllm and args.vllm_mode == "server" and self.accelerator.is_main_process:
            check_server(self.vllm_generation.vllm_client.get_server_info(), args.cppo_topk if args.uses_topk else 0)
        if self.accelerator.is_main_process:
            self._print_schedule()

    def _check_model(self) -> None:
        text_config = self.model.config.get_text_config()
        if self.args.disable_dropout and getattr(text_config, "attention_dropout", None):
            warnings.warn(
                f"attention_dropout={text_config.attention_dropout} in the model's config stays on and counts as "
                'divergence from the rollout policy. Set model_init_kwargs={"attention_dropout": 0.0}.',
                stacklevel=3,
            )
        k, vocabulary = self.args.cppo_topk, text_config.vocab_size
        if self.args.uses_topk and k > vocabulary:
            raise ValueError(f"cppo_topk={k} exceeds the model's vocabulary of {vocabulary}: lower it.")

    def _print_schedule(self) -> None:
        rows = self.args.schedule()
        width = max(map(len, rows))
        print("\n".join([f"{self._name} schedule", *(f"  {name:<{width}}  {text}" for name, text in rows.items())]))

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self.model.training:
            self._rollout_step = self.state.global_step
        self._rollout_tap, self._rollout_pass_due = None, not self.args.always_on_policy
        output = super()._generate_and_score_completions(inputs)
        if "sampling_per_token_logps" in output:
            output["old_per_token_logps"] = output.pop("sampling_per_token_logps")
        if self._engine_topk is not None:
            output["topk_ids"], output["topk_logps"] = self._engine_topk.take(output["completion_ids"])
        elif self._rollout_tap is not None:
            logps, tap = self._rollout_tap
            if output["old_per_token_logps"] is not logps:
                raise RuntimeError("Top-K log-probs were read off another pass than the rollout policy's.")
            output["topk_ids"], output["topk_logps"], self._rollout_tap = tap.ids, tap.logps, None
        if "topk_ids" in output:  # the sampled token is listed apart
            is_sampled = output["topk_ids"] == output["completion_ids"].unsqueeze(-1)
            output["topk_logps"].masked_fill_(is_sampled, -math.inf)
        if self.args.cppo_shuffle_weights:
            output["weight_order"] = self._weight_order(output["completion_ids"])
        if self.args.skip_zero_std_prompts and self.model.training:
            self._skip_zero_std_prompts(output)
        return output

    def _weight_order(self, completion_ids: Tensor) -> Tensor:
        """Random keys, ``(B, T)``: the same after a resume, others for each process and rollout."""
        seed = hash((self.args.seed, self.state.global_step, self.accelerator.process_index))
        keys = torch.rand(completion_ids.shape, generator=torch.Generator().manual_seed(seed % 2**63))
        return keys.to(completion_ids.device)

    def _skip_zero_std_prompts(self, output: dict[str, Any]) -> None:
        """Take the responses to prompts that all score alike out of the masks and of the loss's normaliser."""
        advantages = self.accelerator.gather(output["advantages"])
        groups = advantages.view(-1, self.num_generations)
        alike = (groups == groups[:, :1]).all(-1, keepdim=True).expand_as(groups).flatten()
        own = alike.view(self.accelerator.num_processes, -1)[self.accelerator.process_index]
        output["completion_mask"] = output["completion_mask"] * ~own.unsqueeze(-1)
        tokens = (output["completion_mask"] * output.get("tool_mask", 1)).sum()
        output["num_items_in_batch"] = self.accelerator.gather(tokens).sum()
        if self.loss_type in ("grpo", "dr_grpo"):  # these divide by responses, not by tokens
            output["advantages"] = output["advantages"] * (len(alike) / (~alike).sum().clamp(min=1))

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        mode = "train" if self.model.training else "eval"
        batch = dict(inputs)  # a copy: the anchor is rewritten in it
        self._loss_inputs, self._rule_calls = batch, 0
        try:
            loss = super()._compute_loss(model, batch)
        finally:
            self._loss_inputs = None
        if self._rule_calls != 1:
            raise RuntimeError(
                f"The trust region was applied {self._rule_calls} times in one loss, expected once: this TRL (or a "
                "patch of it) computes the loss in another way. Install trl>=1.16,<1.17 unpatched."
            )
        count_nonfinite_loss(self._record, loss)
        self._window.append((loss.detach(), batch))
        for name in [name for name in self._metrics[mode] if name.startswith("clip_ratio/")]:
            del self._metrics[mode][name]  # TRL's clip is off
        if mode == "eval" or self.accelerator.sync_gradients:
            total = total_over_processes(self._record, self.accelerator.gather)
            scalars = summarize(total, self.args.theorem_unit)
            if self._engine_check is not None:
                self._engine_check(self.state.global_step, scalars)
            for name, value in scalars.items():
                self._metrics[mode][name].append(value)
            if mode == "train" and self.is_world_process_zero():
                append_profile(Path(self.args.output_dir), self.state.global_step + 1, position_profile(total))
            self._record = None
            window, self._window = self._window, []
            if "cppo/nonfinite_losses" in scalars:
                stop(self, window, scalars)
        return loss

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        compute, batch = super()._get_per_token_logps_and_entropies, self._loss_inputs
        if batch is None:  # over a new rollout: the pass of the rollout policy where one is due, then the reference's
            is_rollout_pass, self._rollout_pass_due = self._rollout_pass_due, False
            if is_rollout_pass and self.use_vllm and self.rollout_func is None:
                return None, None, None  # the engine's log-probs are the anchor
            if not (is_rollout_pass and self.args.uses_topk):
                return compute(*args, **kwargs)
            call = inspect.signature(compute).bind(*args, **kwargs).arguments
            with HeadTap(call, k=self.args.cppo_topk) as rollout_tap:
                result = compute(*args, **kwargs)
            self._rollout_tap = (result[0], rollout_tap)
            return result
        rollout_logps: Any = batch.get("old_per_token_logps")
        if "topk_ids" in batch:
            call = inspect.signature(compute).bind(*args, **kwargs).arguments
            with HeadTap(call, ids=batch["topk_ids"]) as tap:
                result = compute(*args, **kwargs)
            unknown = rollout_logps.isnan().unsqueeze(-1)
            self._loss_topk = tap.logps, batch["topk_logps"].masked_fill(unknown, math.nan)
        else:
            result, self._loss_topk = compute(*args, **kwargs), None
        batch["per_token_logps"] = result[0].detach()
        batch["old_per_token_logps"] = anchor_logps(result[0], rollout_logps)
        return result

    def _divergence(self, logps: Tensor, rollout_logps: Tensor) -> tuple[Tensor, Tensor | None]:
        """D_t and, for Top-K, the rollout probability of the listed tokens; ``(B, T)`` each."""
        estimator = ESTIMATORS[self.args.cppo_divergence]
        if not self.args.uses_topk:
            return estimator(logps, rollout_logps), None
        if self._loss_topk is None:  # on the rollout policy, without an engine: nothing to compare
            return torch.zeros_like(rollout_logps), None
        others, rollout_others = self._loss_topk
        listed = torch.cat([logps.detach().unsqueeze(-1), others], -1)
        rollout_listed = torch.cat([rollout_logps.unsqueeze(-1), rollout_others], -1)
        return estimator(listed, rollout_listed), rollout_listed.exp().sum(-1).nan_to_num(nan=0.0)

    @torch.no_grad()
    def get_off_policy_mask(  # a static method upstream
        self,
        advantages: Tensor,
        per_token_logps: Tensor,
        sampling_per_token_logps: Tensor,
        mask: Tensor,
        off_policy_threshold: float,
    ) -> Tensor:
        """The weight of each token's surrogate -ρ_t Â_t under the trust region; ``(B, T)`` fp32, no gradient."""
        self._rule_calls += 1
        divergence, topk_mass = self._divergence(per_token_logps, sampling_per_token_logps)
        assert self._loss_inputs is not None  # inside a loss
        self._loss_inputs["divergence"] = divergence
        log_ratio = per_token_logps.float() - sampling_per_token_logps
        verdict = self.args.rule.judge(divergence, advantages, log_ratio, mask, **self._rule_parameters())
        unmoved = not self.model.training or self._rollout_step == self.state.global_step
        record = loss_record(divergence, advantages, log_ratio, mask, verdict, topk_mass, unmoved)
        self._record = add_records(self._record, record)
        if self._tokens_due():
            rows = (divergence, advantages, log_ratio, mask, verdict)
            table = token_table(self._loss_inputs, *rows)
            records = token_records(table, self._tokenizer.batch_decode)
            append_tokens(Path(self.args.output_dir), self.state.global_step + 1, records)
        return verdict.weight

    def _tokens_due(self) -> bool:
        """Whether this is the main process's last micro-batch of an update whose tokens are to be logged."""
        every = self.args.log_tokens_steps
        due = every > 0 and (self.state.global_step + 1) % every == 0 and self.accelerator.sync_gradients
        return due and self.model.training and self.is_world_process_zero()

    def _rule_parameters(self) -> dict[str, Any]:
        parameters = self.args.rule_parameters
        if "shuffle_weights" in parameters:
            assert self._loss_inputs is not None  # inside a loss
            parameters["order"] = self._loss_inputs["weight_order"] if parameters.pop("shuffle_weights") else None
        return parameters

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Save the weights, tokenizer and arguments, unless a weight is NaN or infinite."""
        require_finite(self.model, self.state.global_step)
        super().save_model(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        checkpoint = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        with saving(self.args.output_dir, checkpoint, self.is_world_process_zero()):
            super()._save_checkpoint(*args, **kwargs)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """Write the model card: TRL's, completed by `cppo_trl.output.model_card.complete_card`.

        Args:
            model_name: None for the name of the output directory.
            dataset_name: name on the Hub of the training data.
            tags: further tags.
        """
        super().create_model_card(model_name or Path(self.args.output_dir).absolute().name, dataset_name, tags)
        if self.is_world_process_zero():
            complete_card(self)
