"""Sampling completions of prompts: with transformers, with vLLM, or with the vLLM engine of a trainer."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import PeftConfig
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.peft_utils import find_adapter_config_file

from cppo_trl.evaluation.problems import Prompt
from cppo_trl.fields import documented


@documented
@dataclass
class Sampling:
    """How completions are sampled. Defaults are those of the paper's appendix D, except for the length.

    Args:
        samples: completions per problem, n.
        temperature: sampling temperature; 0 decodes greedily, with a single sample.
        top_p: nucleus sampling mass.
        max_new_tokens: longest completion in tokens; 8192 is the training limit of the paper's dense models.
        seed: random seed of the samples.

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
            (self.temperature > 0 or self.samples == 1, "samples", "1 at temperature 0, where all are equal"),
        ):
            if not holds:
                raise ValueError(f"{name} must be {expected}; got {getattr(self, name)!r}.")


@dataclass(frozen=True)
class Completion:
    """Generated tokens, including the end-of-sequence token, and whether the token limit cut them off."""

    tokens: list[int]
    truncated: bool


Generator = Callable[[Sequence[list[int]], Sampling, Sequence[int]], list[Completion]]
"""Completes each prompt, given as token ids and with a seed of its own, once."""


def seed_of(seed: int, *names: str) -> int:
    """Derive a seed in [0, 2³¹) from all arguments, the same in every process."""
    digest = hashlib.blake2b(repr((seed, *names)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


def encode(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], template_kwargs: Mapping[str, Any]
) -> list[list[int]]:
    """Tokenize plain prompts as they are and conversations with the chat template.

    Raises:
        ValueError: If a prompt is a conversation and the tokenizer has no chat template.
    """
    if not tokenizer.chat_template and not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("The prompts are conversations, but the tokenizer has no chat template: set one.")
    chat = {"add_generation_prompt": True, "return_dict": True, **template_kwargs}
    return [
        (tokenizer(prompt) if isinstance(prompt, str) else tokenizer.apply_chat_template(prompt, **chat))["input_ids"]
        for prompt in prompts
    ]


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | list[int] | None:
    """End-of-sequence tokens: those of the model's ``generation_config``, else the tokenizer's."""
    ends = model.generation_config.eos_token_id
    return tokenizer.eos_token_id if ends is None else ends


def completion_of(tokens: list[int], ends: int | Sequence[int] | None) -> Completion:
    """Cut tokens after the first end-of-sequence token; without one, they were truncated."""
    known = [ends] if isinstance(ends, int) else ends or ()
    for place, token in enumerate(tokens):
        if token in known:
            return Completion(tokens[: place + 1], False)
    return Completion(tokens, True)


@contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Switch to evaluation mode without gradients, and restore modes and torch's random state afterward."""
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
        model: A causal language model. Of its ``generation_config``, only end-of-sequence tokens are used.
        tokenizer: Its tokenizer.
        batch_size: Completions generated at a time.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int):
        self.model, self.batch_size = model, batch_size
        self.ends = end_tokens(model, tokenizer)
        self.pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def __call__(self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int]) -> list[Completion]:
        """See `Generator`; the first seed applies to the whole call."""
        completions: list[Completion] = []
        with undisturbed(self.model):
            torch.manual_seed(seeds[0])
            for start in range(0, len(prompts), self.batch_size):
                completions += self._batch(prompts[start : start + self.batch_size], sampling)
        return completions

    def _batch(self, rows: Sequence[list[int]], sampling: Sampling) -> list[Completion]:
        ids = [torch.tensor(row, device=self.model.device) for row in rows]
        options: dict[str, Any] = {"pad_token_id": self.pad, "eos_token_id": self.ends}
        options |= {"max_new_tokens": sampling.max_new_tokens, "do_sample": sampling.temperature > 0}
        options |= {"num_beams": 1, "repetition_penalty": 1.0}
        if sampling.temperature > 0:
            options |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0, "min_p": 0.0}
        output: Any = self.model.generate(
            input_ids=pad_sequence(ids, True, self.pad, "left"),  # (B, T)
            attention_mask=pad_sequence([torch.ones_like(row) for row in ids], True, 0, "left"),
            **options,
        )
        return [completion_of(row, self.ends) for row in output[:, max(map(len, rows)) :].tolist()]


class VLLMGenerator:
    """A vLLM engine.

    Args:
        model: Path or Hub name of a model, or directory of a PEFT adapter.
        dtype: As in ``vllm.LLM``.
        **engine: Further arguments of ``vllm.LLM``, such as ``tensor_parallel_size``.
    """

    def __init__(self, model: str, dtype: str = "auto", **engine: Any):
        from vllm import LLM  # noqa: PLC0415  (an optional package, slow to import)
        from vllm.lora.request import LoRARequest  # noqa: PLC0415

        self.adapter = None
        if (base := adapter_base(model)) is not None:
            engine = {"enable_lora": True, "max_lora_rank": PeftConfig.from_pretrained(model).r, **engine}
            self.adapter, model = LoRARequest("adapter", 1, model), base
        self.engine = LLM(model, dtype=dtype, **engine)

    def __call__(self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int]) -> list[Completion]:
        """See `Generator`."""
        from vllm import SamplingParams  # noqa: PLC0415

        options = {"temperature": sampling.temperature, "top_p": sampling.top_p, "max_tokens": sampling.max_new_tokens}
        results = self.engine.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            [SamplingParams(seed=seed, detokenize=False, **options) for seed in seeds],
            lora_request=self.adapter,
        )
        outputs = [result.outputs[0] for result in results]
        return [Completion(list(output.token_ids), output.finish_reason == "length") for output in outputs]


class EngineGenerator:
    """The vLLM engine of a trainer, with other sampling parameters for the duration of a call.

    Seeds are not used: TRL seeds its engine as a whole, and with tensor parallelism all processes must draw alike.

    Args:
        engine: TRL's ``VLLMGeneration``, with the current weights.
        ends: End-of-sequence tokens, as from `end_tokens`.
    """

    def __init__(self, engine: Any, ends: int | Sequence[int] | None):
        self.engine, self.ends = engine, ends

    def __call__(self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int]) -> list[Completion]:
        """See `Generator`, except for seeds; every process must call it."""
        most = max(gather_object([len(prompts)]))  # TRL takes the number of prompts to be the same on all processes
        rows = [prompts[at % len(prompts)] for at in range(most)]
        ours = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0, "min_p": None}
        ours |= {"repetition_penalty": 1.0, "max_completion_length": sampling.max_new_tokens, "logprobs": 0}
        theirs = {name: getattr(self.engine, name) for name in ours}
        vars(self.engine).update(ours)
        try:  # the class's method: CPPOTrainer wraps that of the instance, to keep the Top-K of rollouts
            _, completions, _, _ = type(self.engine).generate(self.engine, rows, None, sampling.samples)
        finally:
            vars(self.engine).update(theirs)
        return [completion_of(list(tokens), self.ends) for tokens in completions[: len(prompts)]]


def adapter_base(model: str) -> str | None:
    """Return the base model that a PEFT adapter (directory or Hub repository) names; None for any other model."""
    is_adapter = find_adapter_config_file(model) is not None
    return PeftConfig.from_pretrained(model).base_model_name_or_path if is_adapter else None
