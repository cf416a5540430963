"""What rollouts by a real vLLM cost, on a CPU. `make test-vllm` sets the environment up.

    .venv-vllm/bin/python scripts/benchmark_vllm.py --json outputs/benchmark_vllm.json
    PYTHONPATH=. .venv-vllm/bin/python scripts/benchmark_vllm.py --part transport \
        --layers 1 --hidden 64 --rows 4 --length 2048

update     A rollout and the update on it: CPPO against TRL's default, alternating in one process. One update each
           (aligned steps), the same model, data and batch. TRL's default scores each rollout again with the trained
           model, to correct for the engine; CPPO takes the engine's log-probs for the rollout policy's and does not.
           Each side has a colocated engine of its own.
transport  What a token's log-probs cost on their way from vLLM through TRL's lists to our tensors, by K, colocated and
           from a server: bytes of the reply, time of each step, bytes of the Python objects that are held. Vocabulary
           of Qwen3, so that ids have as many digits.

Time is CPU time of the process, on one thread, so other work on the machine hardly counts.
"""

import argparse
import gc
import json
import os
import pickle
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import torch
import trl.generation.vllm_generation as host
import vllm
import vllm._custom_ops
from transformers import Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.generation import vllm_client

from cppo_trl import CPPOConfig, CPPOTrainer
from cppo_trl.data import arithmetic
from cppo_trl.seam.topk import EngineTopK

STEPS = 2  # timed in a round; one more before them is not
PARTS = ("whole", "rollout", "second pass")


class Stopwatch(TrainerCallback):
    """CPU seconds of each update, of vLLM's part in it (with the weight sync), and of passes without a gradient."""

    def __init__(self, trainer: GRPOTrainer) -> None:
        self.rows: list[dict[str, float]] = []
        for method, part in (("_generate_single_turn", 1), ("_get_per_token_logps_and_entropies", 2)):
            setattr(trainer, method, partial(self._timed, getattr(trainer, method), PARTS[part]))
        trainer.add_callback(self)

    def _timed(self, method: Any, part: str, *args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        result = method(*args, **kwargs)
        if part == "rollout" or not torch.is_grad_enabled():
            self.rows[-1][part] += time.process_time() - start
        return result

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.rows.append(dict.fromkeys(PARTS, 0.0))
        self._start = time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.rows[-1]["whole"] = time.process_time() - self._start

    def take(self) -> dict[str, float]:
        """Mean CPU seconds of the updates since the last call, without the first."""
        rows, self.rows = self.rows[1:], []
        return {part: statistics.fmean(row[part] for row in rows) for part in PARTS}


def make_trainer(
    trainer: type[GRPOTrainer], config: type[GRPOConfig], model: str, args: argparse.Namespace, **fields: Any
) -> GRPOTrainer:
    """One update a rollout, fp32, with a colocated engine."""
    settings = {
        "output_dir": f"{model}/output",
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_max_model_length": 32 + args.length,
        "per_device_train_batch_size": args.rows,
        "num_generations": 8,
        "steps_per_generation": 1,
        "max_completion_length": args.length,
        "max_steps": STEPS + 1,
        "learning_rate": 1e-6,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    return trainer(
        model,
        lambda completions, **kwargs: [float(len(text)) for text in completions],
        config(**{**settings, **fields}),
        train_dataset=arithmetic.problems(64, terms=3, seed=0),
        processing_class=arithmetic.tokenizer(),
    )


def save_model(directory: str, args: argparse.Namespace, vocabulary: int) -> None:
    """A model of Qwen3's kind with random weights, so that responses seldom end early."""
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 128),
        head_dim=64,
        pad_token_id=arithmetic.tokenizer().pad_token_id,
        eos_token_id=arithmetic.tokenizer().eos_token_id,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)
    arithmetic.tokenizer().save_pretrained(directory)


def updates(args: argparse.Namespace) -> dict[str, Any]:
    """Time whole updates of the variants in turn, and print the table."""
    host.LLM = partial(vllm.LLM, dtype="float32", enforce_eager=True)
    with tempfile.TemporaryDirectory() as model:
        save_model(model, args, vocabulary=8192)
        trainers = {
            "TRL's default": make_trainer(GRPOTrainer, GRPOConfig, model, args),
            "CPPO, Binary": make_trainer(CPPOTrainer, CPPOConfig, model, args),
            "CPPO, Top-K": make_trainer(CPPOTrainer, CPPOConfig, model, args, cppo_divergence="topk_tv"),
        }
        watches = {name: Stopwatch(trainer) for name, trainer in trainers.items()}
        seconds: dict[str, list[dict[str, float]]] = {name: [] for name in trainers}
        for _ in range(args.rounds):
            for name, trainer in trainers.items():
                trainer.train()
                seconds[name].append(watches[name].take())
    baseline = [row["whole"] for row in next(iter(seconds.values()))]
    report = {}
    print("| | CPU seconds | rollout | second pass | time / TRL's default (range) |\n|---|---|---|---|---|")
    for name, rows in seconds.items():
        ratios = [row["whole"] / base for row, base in zip(rows, baseline, strict=True)]
        median = {part: statistics.median(row[part] for row in rows) for part in PARTS}
        report[name] = {**median, "ratio": statistics.median(ratios), "ratios": ratios}
        cells = " | ".join(f"{value:.2f}" for value in median.values())
        print(
            f"| {name} | {cells} | {report[name]['ratio']:.3f} ({min(ratios):.3f} to {max(ratios):.3f}) |", flush=True
        )
    return report


def timed(work: Callable[[], Any], rounds: int) -> float:
    """CPU seconds, the median of some rounds."""
    seconds = []
    for _ in range(rounds):
        gc.collect()
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def held(work: Callable[[], Any]) -> int:
    """Bytes of the Python objects that ``work`` returns."""
    gc.collect()
    tracemalloc.start()
    result = work()
    gc.collect()
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    del result
    return size


def ours(k: int, completions: Any, logps: Any, ids: Any) -> Callable[[], Any]:
    """The conversion of TRL's lists, as the trainer has it done."""
    if k == 0:
        return lambda: None

    def convert() -> None:
        engine = SimpleNamespace(generate=lambda: (None, completions, logps, ids))
        EngineTopK(engine, k)
        engine.generate()

    return convert


def colocated(llm: Any, prompts: list[Any], k: int, args: argparse.Namespace) -> dict[str, float]:
    """Figures of a token from an engine in this process: microseconds, and bytes held."""
    sampling = vllm.SamplingParams(max_tokens=args.length, logprobs=k, temperature=1.0, ignore_eos=True)
    start = time.process_time()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    generation = time.process_time() - start
    completions = [list(output.outputs[0].token_ids) for output in outputs]
    tokens = sum(map(len, completions))
    pickled = pickle.dumps([list(output.outputs[0].logprobs) for output in outputs])
    logps, ids = host.extract_logprobs(outputs)
    row = {
        "generation": generation * 1e6,
        "TRL's lists": timed(lambda: host.extract_logprobs(outputs), args.rounds) * 1e6,
        "ours": timed(ours(k, completions, logps, ids), args.rounds) * 1e6,
        "bytes of vLLM's objects": held(lambda: pickle.loads(pickled)),
        "bytes of TRL's lists": held(lambda: host.extract_logprobs(outputs)),
    }
    return {"tokens": tokens, **{name: value / tokens for name, value in row.items()}}


def served(address: str, prompts: list[Any], k: int, args: argparse.Namespace) -> dict[str, float]:
    """Figures of a token from a server: bytes and microseconds of the client, and bytes held on every process."""
    client = vllm_client.VLLMClient(base_url=address)
    request = {"model": client.model, "prompt": [p["prompt_token_ids"] for p in prompts], "max_tokens": args.length}
    request |= {"return_token_ids": True, "return_tokens_as_token_ids": True, "logprobs": k, "ignore_eos": True}
    text = client.session.post(f"{address}/v1/completions", json=request).text
    choices = json.loads(text)["choices"]
    completions, raw = [choice["token_ids"] for choice in choices], [choice["logprobs"] for choice in choices]
    logps, ids = vllm_client.parse_logprobs(raw)
    payload = pickle.dumps((completions, logps, ids))
    tokens = sum(map(len, completions))
    row = {
        "bytes of JSON": len(text),
        "json.loads": timed(lambda: json.loads(text), args.rounds) * 1e6,
        "parse_logprobs": timed(lambda: vllm_client.parse_logprobs(raw), args.rounds) * 1e6,
        "pickling": timed(lambda: pickle.dumps((completions, logps, ids)), args.rounds) * 1e6,
        "unpickling": timed(lambda: pickle.loads(payload), args.rounds) * 1e6,
        "ours": timed(ours(k, completions, logps, ids), args.rounds) * 1e6,
        "bytes broadcast": len(payload),
        "bytes held by each process": held(lambda: pickle.loads(payload)),
    }
    return {"tokens": tokens, **{name: value / tokens for name, value in row.items()}}


def transport(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the way of the log-probs, and print a table for each mode."""
    from tests.vllm.conftest import Server, running  # noqa: PLC0415 (the other part does without)

    report: dict[str, Any] = {}
    prompts = [{"prompt_token_ids": [10 + i, 5, 6]} for i in range(args.rows)]
    with tempfile.TemporaryDirectory() as model:
        save_model(model, args, vocabulary=151_936)
        started = Server(Path(model), f"--max-model-len {args.length + 64} --max-logprobs 20", model=model)
        with running(started):
            report["server"] = {k: served(started.address, prompts, k, args) for k in (0, 5, 20)}
        engine = {"dtype": "float32", "enforce_eager": True, "max_model_len": args.length + 64}
        llm = vllm.LLM(model, logprobs_mode="processed_logprobs", **engine)
        report["colocated"] = {k: colocated(llm, prompts, k, args) for k in (0, 5, 20)}
    for mode, by_k in report.items():
        print(f"\n| {mode}, a token | " + " | ".join(f"K = {k}" for k in by_k) + " |\n|---|" + "---|" * len(by_k))
        for name in by_k[0]:
            print(f"| {name} | " + " | ".join(f"{row[name]:,.1f}" for row in by_k.values()) + " |")
    return report


def main() -> None:
    """Measure a part, print its tables, and write them to ``--json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("update", "transport"), default="update")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--rows", type=int, default=16, help="responses of a rollout, a multiple of 8 for updates")
    parser.add_argument("--length", type=int, default=48, help="longest response, in tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    vllm._custom_ops._supports_onednn = False  # packed weights take no new ones
    report = (updates if args.part == "update" else transport)(args)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**vars(args), "json": None, "results": report}, indent=2))


if __name__ == "__main__":
    main()
