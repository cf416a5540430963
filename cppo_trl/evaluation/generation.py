"""Sampling answers: prompts as token ids in, completions out, by transformers or by vLLM."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from peft import PeftConfig
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.peft_utils import find_adapter_config_file

from cppo_trl.evaluation.problems import Prompt


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled; the defaults are the paper's, appendix D, but for the length.

    Args:
        samples: Answers to each problem, n.
        temperature: Of the samples; 0 decodes greedily.
        top_p: Smallest mass of the tokens that are sampled from.
        max_new_tokens: Longest answer in tokens. The paper does not say; 8192 is its dense models' limit in training.
        seed: Of the samples.

    Raises:
        ValueError: If a value is out of range.
    """

    samples: int = 16
    temperature: float = 0.7
    top_p: float = 0.95
    max_new_tokens: int = 8192
    seed: int = 0

    def __post_init__(self) -> None:
        for holds, name, expected in (
            (self.samples >= 1, "samples", ">= 1"),
            (self.temperature >= 0, "temperature", ">= 0"),
            (0 < self.top_p <= 1, "top_p", "in (0, 1]"),
            (self.max_new_tokens >= 1, "max_new_tokens", ">= 1"),
            (self.temperature > 0 or self.samples == 1, "samples", "1 at temperature 0, where all answers are equal"),
        ):
            if not holds:
                raise ValueError(f"{name} must be {expected}; got {getattr(self, name)!r}.")


@dataclass(frozen=True)
class Completion:
    """One answer: its tokens, the end-of-sequence token included, and whether the limit cut it off."""

    tokens: list[int]
    truncated: bool


class Generator(Protocol):
    """What answers prompts."""

    def __call__(
        self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int]
    ) -> list[list[Completion]]:
        """``sampling.samples`` completions of each prompt, given as token ids and with a seed of its own."""


def seed_of(seed: int, *names: str) -> int:
    """A seed in [0, 2³¹) that depends on all of its arguments, the same in every process."""
    digest = hashlib.blake2b(repr((seed, *names)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


def encode(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], template_kwargs: Mapping[str, Any]
) -> list[list[int]]:
    """Token ids of plain prompts, and of conversations in the tokenizer's chat template.

    Raises:
        ValueError: If a prompt is a conversation and the tokenizer has no chat template.
    """
    if not all(isinstance(prompt, str) for prompt in prompts) and not tokenizer.chat_template:
        raise ValueError(
            "The prompts are conversations, but the tokenizer has no chat template: set one, or use plain texts."
        )
    return [
        tokenizer(prompt)["input_ids"]
        if isinstance(prompt, str)
        else tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, **template_kwargs)[
            "input_ids"
        ]
        for prompt in prompts
    ]


@contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards modes and torch's random states are what they were."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        for module, training in modes.items():
            module.training = training


class TransformersGenerator:
    """Batched ``generate`` of a model in this process.

    Args:
        model: A causal language model; its own sampling defaults (``generation_config``) are not used.
        tokenizer: Its tokenizer.
        batch_size: Answers generated at once.
        progress: Whether to show a bar over batches.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, progress: bool = False
    ):
        self.model, self.batch_size, self.progress = model, batch_size, progress
        ends = model.generation_config.eos_token_id
        self.ends = tokenizer.eos_token_id if ends is None else ends
        self.pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def __call__(
        self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int]
    ) -> list[list[Completion]]:
        """As `Generator` says; the first seed is that of the whole call."""
        rows = [prompt for prompt in prompts for _ in range(sampling.samples)]
        starts = range(0, len(rows), self.batch_size)
        completions: list[Completion] = []
        with undisturbed(self.model):
            torch.manual_seed(seeds[0])
            for start in tqdm(starts, desc="generating", unit="batch", leave=False, disable=not self.progress):
                completions += self._batch(rows[start : start + self.batch_size], sampling)
        return [completions[at : at + sampling.samples] for at in range(0, len(rows), sampling.samples)]

    def _batch(self, rows: Sequence[list[int]], sampling: Sampling) -> list[Completion]:
        width = max(map(len, rows))
        ids = torch.tensor([[self.pad] * (width - len(row)) + row for row in rows])  # (B, width), padded left
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        chosen = (
            {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0, "min_p": 0.0}
            if sampling.temperature > 0
            else {"do_sample": False}
        )
        output: Any = self.model.generate(
            input_ids=ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            max_new_tokens=sampling.max_new_tokens,
            pad_token_id=self.pad,
            eos_token_id=self.ends,
            num_beams=1,
            repetition_penalty=1.0,
            **chosen,
        )
        return [completion_of(row, self.ends) for row in output[:, width:].tolist()]


def completion_of(tokens: list[int], ends: int | Sequence[int] | None) -> Completion:
    """Cut a row of tokens behind its first end-of-sequence token; without one it was truncated."""
    known = [ends] if isinstance(ends, int) else ends or ()
    for place, token in enumerate(tokens):
        if token in known:
            return Completion(tokens[: place + 1], False)
    return Completion(tokens, True)


class VLLMGenerator:
    """A vLLM engine of its own.

    Args:
        model: Path or Hub name of a model, or directory of a PEFT adapter.
        dtype: As vLLM takes it.
        progress: Whether to show vLLM's bar over prompts.
        **engine: Further arguments of ``vllm.LLM``, such as ``tensor_parallel_size``.
    """

    def __init__(self, model: str, dtype: str = "auto", progress: bool = False, **engine: Any):
        from vllm import LLM  # noqa: PLC0415  (an optional package, slow to import)
        from vllm.lora.request import LoRARequest  # noqa: PLC0415

        self.progress, self.adapter = progress, None
        base = adapter_base(model)
        if base is not None:
            engine = {"enable_lora": True, "max_lora_rank": PeftConfig.from_pretrained(model).r, **engine}
            self.adapter, model = LoRARequest("adapter", 1, model), base
        self.engine = LLM(model, dtype=dtype, **engine)

    def __call__(
        self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int]
    ) -> list[list[Completion]]:
        """As `Generator` says; vLLM gives sample i of a prompt the prompt's seed + i."""
        from vllm import SamplingParams  # noqa: PLC0415

        parameters = [
            SamplingParams(
                n=sampling.samples,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_new_tokens,
                seed=seed,
                detokenize=False,
            )
            for seed in seeds
        ]
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        results = self.engine.generate(requests, parameters, use_tqdm=self.progress, lora_request=self.adapter)
        return [
            [Completion(list(output.token_ids), output.finish_reason == "length") for output in result.outputs]
            for result in results
        ]


def adapter_base(model: str) -> str | None:
    """The base model that a PEFT adapter (directory or Hub repository) names; None for any other model."""
    is_adapter = find_adapter_config_file(model) is not None
    return PeftConfig.from_pretrained(model).base_model_name_or_path if is_adapter else None
