"""What the trust region costs: both sides of every comparison alternate in one process.

    python scripts/benchmark.py --shape small --rows 8 --length 256  # on a CPU
    python scripts/benchmark.py --shape 1.7b --bf16 --checkpointing --length 8192 16384  # on a GPU

Parts, all of them unless named after --parts:

state     what the dry run says of weights, gradients and AdamW, against what is held; the peak of a whole update
step      forward, loss and backward of one batch: CPPO (Binary, Top-K) against TRL's GRPO, time and peak memory
rollout   the pass that scores a rollout, Top-K against Binary
policy    the same pass as cppo_topk_source: policy adds it to an engine's rollout, against the step on its tokens
rule      the rule alone on 64 x 16,384 tokens, against a plain copy of its inputs and against a loop over responses
length    the rule and its record for one token, by response length
topk      a Top-K step by K, and by the two ways to score the listed tokens
accuracy  what two equal policies seem to differ by, by precision

state, step, rollout, policy and topk use a model of Qwen3's kind with random weights, in one of SHAPES, and repeat for
each --length.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from scipy.stats import quantile_test
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from cppo_trl import CPPOConfig, CPPOTrainer
from cppo_trl.data import arithmetic
from cppo_trl.divergence import binary_tv, topk_tv
from cppo_trl.launch.plan import Layout, state_bytes
from cppo_trl.metrics import loss_record
from cppo_trl.rules import RULES
from cppo_trl.seam import state
from cppo_trl.seam.topk import HeadTap
from cppo_trl.trust_region import cppo_mask, masked_quantile, prefix_budget

K = 20
SHAPES = {  # layers, size of the hidden states, heads, vocabulary
    "tiny": (2, 128, 2, 1000),
    "small": (4, 512, 4, 32_768),
    "deep": (28, 512, 4, 32_768),  # a head of the same share as 1.7b's
    "0.6b": (28, 1024, 16, 151_936),
    "1.7b": (28, 2048, 16, 151_936),
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FIELDS: Any = {"delta": 0.15, "w_min": 0.8, "delta_b": 0.02, "delta_b_quantile": 0.9, "delta_b_max_multiple": 2.0}
Row = dict[str, Any]


class ProductTap(HeadTap):
    """The alternative way: the listed tokens' logits by one more product over the whole vocabulary."""

    @staticmethod
    def chosen(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
        """Logits of ``ids``, gathered from all."""
        return (hidden @ weight.to(hidden.dtype).t()).gather(-1, ids.long())


def wait() -> None:
    """Until the device has done what it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def compare(part: str, variants: Mapping[str, Callable[[], Any]], repeats: int, memory: bool = False) -> list[Row]:
    """Median seconds of each variant, and its ratio to the first one, taken round by round.

    The interval is the exact 95 % one of the median ratio, from the binomial distribution.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for work in variants.values():  # gradients and buffers are there before anything is measured
        work()
    peaks = {name: peak_bytes(work) for name, work in variants.items()} if memory else {}
    for _ in tqdm(range(repeats), desc=part, leave=False):
        for name, work in variants.items():
            wait()
            start = time.perf_counter()
            work()
            wait()
            seconds[name].append(time.perf_counter() - start)
    first = next(iter(variants))
    rows = []
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds[first], strict=True)]
        low, high = quantile_test(ratios, p=0.5).confidence_interval(0.95) if name != first else (1.0, 1.0)
        row = {"part": part, "variant": name, "seconds": statistics.median(times), "ratio": statistics.median(ratios)}
        row |= {"ratio_low": float(low), "ratio_high": float(high)}
        rows.append(row | ({"peak_bytes": peaks[name], "peak_ratio": peaks[name] / peaks[first]} if peaks else {}))
    return rows


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most that ``work`` holds beyond what was held before it, in bytes, by the allocator's own account."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - held
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def qwen3(layers: int, hidden: int, heads: int, vocabulary: int, tied: bool = True) -> Qwen3ForCausalLM:
    """Random weights in a shape of SHAPES; the same at each call."""
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            head_dim=128,
            tie_word_embeddings=tied,
        )
    )


class Bench:
    """TRL's trainer and ours at equal settings, and one made-up batch."""

    def __init__(self, shape: str, rows: int, length: int, bf16: bool, checkpointing: bool) -> None:
        self.config = CPPOConfig(
            tempfile.mkdtemp(),
            cppo_divergence="topk_tv",
            per_device_train_batch_size=rows,
            generation_batch_size=8 * rows,
            max_completion_length=length,
            use_cpu=DEVICE.type == "cpu",
            bf16=bf16,
            report_to=[],
        )
        with DEVICE:  # billions of weights are drawn there
            model = qwen3(*SHAPES[shape])
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.ours, self.host = self._trainer(CPPOTrainer, model), self._trainer(GRPOTrainer, model)  # of one model
        self.vocabulary = model.config.vocab_size
        g = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, self.vocabulary, (rows, 64 + length), generator=g)
        batch = {
            "prompt_ids": tokens[:, :64],
            "prompt_mask": torch.ones(rows, 64, dtype=torch.long),
            "completion_ids": tokens[:, 64:],
            "completion_mask": torch.ones(rows, length, dtype=torch.long),
            "advantages": torch.randn(rows, generator=g),
            "old_per_token_logps": torch.full((rows, length), -12.0),
            "num_items_in_batch": torch.tensor(rows * length),
        }
        self.batch = {name: value.to(DEVICE) for name, value in batch.items()}

    def _trainer(self, kind: type[GRPOTrainer], model: Any) -> Any:
        trainer = kind(
            model,
            lambda completions, **_: [0.0] * len(completions),
            self.config,
            train_dataset=Dataset.from_dict({"prompt": ["1+1="] * 8}),
            processing_class=arithmetic.tokenizer(),
        )
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
        return trainer

    def grpo(self) -> None:
        """A step of TRL's."""
        self._step(self.host, self.batch)

    def cppo(self, divergence: str, k: int = K, tap: type[HeadTap] = HeadTap) -> Callable[[], None]:
        """A step of ours."""
        rows, length = self.batch["completion_ids"].shape
        listed = {
            "topk_ids": torch.randint(0, self.vocabulary, (rows, length, k), dtype=torch.int32, device=DEVICE),
            "topk_logps": torch.full((rows, length, k), -5.0, device=DEVICE),
        }
        batch = self.batch | (listed if divergence.startswith("topk") else {})

        def work() -> None:
            self.config.cppo_divergence, state.HeadTap = divergence, tap  # type: ignore[misc]
            self._step(self.ours, batch)

        return work

    def _autocast(self) -> torch.autocast:
        return torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.config.bf16)  # as Accelerate's around forward

    def _step(self, trainer: Any, batch: dict[str, Tensor]) -> None:
        with self._autocast():
            loss = trainer._compute_loss(trainer.model, dict(batch))
        loss.backward()
        trainer.model.zero_grad(set_to_none=False)

    def state(self) -> Row:
        """Bytes of weights, gradients and AdamW: planned, held after an update, and the most during one."""
        parameters = list(self.ours.model.parameters())
        optimizer = torch.optim.AdamW(parameters)

        def update() -> None:
            self._step(self.ours, self.batch)
            optimizer.step()

        self.config.cppo_divergence = "binary_tv"
        update()
        moments = [x for state in optimizer.state.values() for x in state.values() if x.dim()]
        held = sum(x.nbytes for x in [*parameters, *(p.grad for p in parameters if p.grad is not None), *moments])
        count = sum(p.numel() for p in parameters)
        planned = state_bytes(count, count, Layout(), 4)
        return {"planned": planned, "held": held, "peak": held + peak_bytes(update)}

    def score_rollout(self, divergence: str) -> Callable[[], None]:
        """The pass over a new rollout."""
        inputs = torch.cat([self.batch["prompt_ids"], self.batch["completion_ids"]], 1)
        length = self.batch["completion_ids"].size(1)

        def work() -> None:
            self.config.cppo_divergence = divergence
            self.ours._rollout = state.Rollout(self.config, step=0, process=0)
            with torch.no_grad(), self._autocast():
                self.ours._get_per_token_logps_and_entropies(self.ours.model, inputs, torch.ones_like(inputs), length)
            self.ours._rollout = None

        return work


def rule_inputs(rows: int, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Binary D_t, advantages, log ρ_t and the mask of responses of a quarter of the length to all of it."""
    g = torch.Generator().manual_seed(0)
    rollout_logps = -2 * torch.rand(rows, length, generator=g)
    logps = (rollout_logps + 0.05 * torch.randn(rows, length, generator=g)).clamp(max=0.0)
    lengths = torch.randint(length // 4, length + 1, (rows, 1), generator=g)
    mask = (torch.arange(length) < lengths).long()  # as TRL's
    divergence, advantages = binary_tv(logps, rollout_logps), torch.randn(rows, 1, generator=g)
    log_ratio = logps - rollout_logps
    return divergence.to(DEVICE), advantages.to(DEVICE), log_ratio.to(DEVICE), mask.to(DEVICE)


def rule(repeats: int, rows: int, length: int) -> list[Row]:
    """The rule alone, against a copy of what it reads and against a loop over responses."""
    inputs = divergence, advantages, log_ratio, mask = rule_inputs(rows, length)
    verdict = RULES["cppo"].judge(*inputs, **FIELDS)

    def mask_of(*row: Tensor, delta_b: float | Tensor) -> Tensor:
        return cppo_mask(*row, delta=FIELDS["delta"], w_min=FIELDS["w_min"], delta_b=delta_b)

    def over_responses() -> None:
        for b in range(rows):
            own = mask[b].bool()
            row = (divergence[b, own][None], advantages[b : b + 1], log_ratio[b, own][None], mask[b, own][None])
            budget = torch.quantile(row[0], 0.9).clamp(0.02, 0.04).view(1, 1)
            mask_of(*row, delta_b=budget)

    variants = {
        "copy of the inputs": lambda: [x.clone() for x in inputs],
        "fixed budget": lambda: mask_of(*inputs, delta_b=0.02),
        "budget by quantile": lambda: mask_of(*inputs, delta_b=prefix_budget(divergence, mask, 0.02)),
        "of it, the quantile": lambda: masked_quantile(divergence, mask, 0.9),
        "for comparison: a sort": lambda: divergence.sort(-1),
        "loop over responses, by quantile": over_responses,
        "Binary TV": lambda: binary_tv(log_ratio, divergence),  # any two tensors of that size
        "record of the metrics": lambda: loss_record(*inputs, verdict),
    }
    return compare(f"rule alone, {rows} x {length}", variants, repeats)


def by_length(repeats: int, tokens: int) -> list[Row]:
    """Rule and record together at a constant number of tokens."""

    def both(inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> Callable[[], Any]:
        return lambda: loss_record(*inputs, RULES["cppo"].judge(*inputs, **FIELDS))

    lengths = [2**i for i in range(9, 16) if 2**i <= tokens]
    variants = {f"{tokens // n} x {n}": both(rule_inputs(tokens // n, n)) for n in lengths}
    return compare(f"rule and record, {tokens} tokens", variants, repeats)


def accuracy(rows: int = 2, length: int = 128) -> list[Row]:
    """Error of D_t by way and precision: what two equal policies seem to differ by, against fp64."""
    results: list[Row] = []
    for name, bf16, fp32_head in (("fp32", False, False), ("bf16", True, False), ("bf16, fp32 head", True, True)):
        model = qwen3(1, 512, 4, 151_936, tied=False)
        model.lm_head.weight.data *= 9  # peaked, as a trained model
        add_fused_lm_head(model, cast_lm_head_to_fp32=fp32_head, outputs=("log_probs", "entropy"))
        ids = torch.randint(0, 150_000, (rows, 8 + length))
        labels = ids.clone()
        labels[:, :8] = -100
        call = {"attention_mask": torch.ones_like(ids), "logits_to_keep": length}
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            hidden = model.model(ids).last_hidden_state[:, 7:-1]
        exact = (hidden.double() @ model.lm_head.weight.double().t()).log_softmax(-1)
        top = exact.topk(K)
        for way, tap in (("K rows and log Z", HeadTap), ("second product", ProductTap)):
            read = tap(call, ids=top.indices.int())
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16), read:
                model(ids, labels=labels, fused_lm_head=True)
            error = topk_tv(read.logps, top.values)
            worst = {"mean": error.mean().item(), "p99": error.quantile(0.99).item(), "max": error.max().item()}
            results.append({"precision": name, "way": way, **worst})
    return results


def measure(arguments: argparse.Namespace) -> tuple[list[Row], list[Row], list[Row]]:
    """The parts asked for: rows of costs, of state memory, and of accuracies."""
    parts, repeats, costs, states = arguments.parts, arguments.repeats, [], []
    tiny = arguments.shape == "tiny"
    if "rule" in parts:
        costs += rule(3 * repeats, *((8, 1024) if tiny else (64, 16_384)))
    if "length" in parts:
        costs += by_length(3 * repeats, 2**12 if tiny else 2**19)
    for length in arguments.length if {"state", "step", "rollout", "policy", "topk"} & set(parts) else ():
        bench = Bench(arguments.shape, arguments.rows, length, arguments.bf16, arguments.checkpointing)
        where = f"{arguments.rows} x {length}"
        if "state" in parts:
            states.append({"part": f"state, {where}", **bench.state()})
        if "step" in parts:
            steps = {"TRL's GRPO": bench.grpo, "CPPO, Binary": bench.cppo("binary_tv")}
            costs += compare(f"step, {where}", steps | {"CPPO, Top-K": bench.cppo("topk_tv")}, repeats, memory=True)
        if "rollout" in parts:
            passes = {"Binary": bench.score_rollout("binary_tv"), "Top-K": bench.score_rollout("topk_tv")}
            costs += compare(f"scoring a rollout, {where}", passes, repeats, memory=True)
        if "policy" in parts:
            passes = {"step": bench.cppo("topk_tv"), "pass before it": bench.score_rollout("topk_tv")}
            costs += compare(f"Top-K of the policy, {where}", passes, repeats)
        if "topk" in parts:
            steps = {f"K = {k}": bench.cppo("topk_tv", k) for k in (20, 5, 80)}
            steps |= {"K = 20, second product": bench.cppo("topk_tv", K, ProductTap)}
            costs += compare(f"step by K, {where}", steps, repeats, memory=True)
        del bench  # or two models are held
        gc.collect()
    return costs, states, accuracy() if "accuracy" in parts else []


def show(costs: list[Row], states: list[Row], accuracies: list[Row]) -> None:
    """The tables, as markdown."""
    print("| | | seconds | time, ratio to the first (95 %) | peak MiB | ratio |\n|---|---|---|---|---|---|")
    for row in costs:
        memory = f"{row['peak_bytes'] / 2**20:.0f} | {row['peak_ratio']:.3f}" if "peak_bytes" in row else "|"
        interval = f"{row['ratio']:.3f} ({row['ratio_low']:.3f} to {row['ratio_high']:.3f})"
        print(f"| {row['part']} | {row['variant']} | {row['seconds']:.4g} | {interval} | {memory} |")
    if states:
        print("\n| | dry run MiB | held MiB | peak of an update MiB |\n|---|---|---|---|")
    for row in states:
        print(f"| {row['part']} | " + " | ".join(f"{row[x] / 2**20:.1f}" for x in ("planned", "held", "peak")) + " |")
    if accuracies:
        print("\nOn the CPU:\n\n| precision | way | mean error of D_t | p99 | max |\n|---|---|---|---|---|")
    for row in accuracies:
        print(f"| {row['precision']} | {row['way']} | {row['mean']:.1e} | {row['p99']:.1e} | {row['max']:.1e} |")


def main() -> None:
    """Measure, print the tables, write JSON."""
    every_part = ["state", "step", "rollout", "policy", "rule", "length", "topk", "accuracy"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=every_part, default=every_part)
    parser.add_argument("--shape", choices=SHAPES, default="1.7b", help="of the model")
    parser.add_argument("--rows", type=int, default=1, help="responses in the batch")
    parser.add_argument("--length", type=int, nargs="+", default=[8192], help="tokens of a response after 64 others")
    parser.add_argument("--repeats", type=int, default=15, help="rounds; three times as many for rule and length")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations, as in training")
    parser.add_argument("--json", type=Path, default=Path("outputs/benchmark.json"))
    arguments = parser.parse_args()
    costs, states, accuracies = measure(arguments)
    machine = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"\n{machine}, torch {torch.__version__}; model: {arguments.shape}, {'bf16' if arguments.bf16 else 'fp32'}\n"
    )
    show(costs, states, accuracies)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine, "torch": torch.__version__, **vars(arguments)}
    report |= {"costs": costs, "state": states, "accuracy": accuracies}
    arguments.json.write_text(json.dumps(report, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
