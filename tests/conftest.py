"""Tiny models, tokenizers and trainers made on the spot; nothing is downloaded."""

import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from cppo_trl import CPPOConfig, CPPOTrainer
from cppo_trl.data import arithmetic
from cppo_trl.rules import RULES

ROOT = Path(__file__).parents[1]
RECIPE = str(ROOT / "configs/quickstart/cppo.yaml")
PROMPTS, COMPLETION, VOCABULARY = 8, 12, 23
SMALL_RUN = {  # fields of every trainer made on the spot
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
}


def tiny_model(seed=0, **overrides):
    torch.manual_seed(seed)
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "initializer_range": 0.4,  # peaked enough that updates move the policy
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    return Qwen3ForCausalLM(Qwen3Config(**{**shape, **overrides}))


def character_tokenizer(alphabet, unknown="<pad>", **special):
    """A token for each character, after those that are longer; ``<pad>`` and ``<eos>`` are in the alphabet."""
    vocabulary = {token: index for index, token in enumerate(alphabet)}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>", **special)


def digit_reward(completions, **kwargs):
    """Share of digits in the completion: a dense signal that every tiny model can raise."""
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


def tiny_data(count=64):
    return arithmetic.problems(count, terms=3, seed=0)


def launch(*command, **environment):
    """Run a script in a process of its own, and return it completed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def task(tmp_path):
    """A directory with a tiny model in ``model`` and 32 problems in ``data``."""
    tiny_model().save_pretrained(tmp_path / "model")
    arithmetic.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    arithmetic.problems(32, 3, 0).to_json(tmp_path / "data/train.jsonl")
    return tmp_path


def flags(fields):
    """Fields as words of a command line."""
    return [str(x) for name, value in fields.items() for x in (f"--{name}", value)]


def small_run(task):
    """Command-line fields of four small updates on one rollout of the task, in its directory ``out``."""
    fields = {"model_name_or_path": task / "model", "dataset_name": task / "data", "output_dir": task / "out"}
    fields |= {"max_steps": 4, "per_device_train_batch_size": 8, "steps_per_generation": 4, "max_completion_length": 8}
    return flags(fields)


@pytest.fixture
def make_trainer(tmp_path, monkeypatch):
    """A CPPOTrainer (or ``cls``) on the CPU; keyword arguments go to its config. vLLM counts as installed."""
    monkeypatch.setattr("cppo_trl.seam.inputs.find_spec", lambda name: name)

    def make(
        cls=CPPOTrainer, config_cls=CPPOConfig, model=None, data=None, reward=digit_reward, trainer=None, **fields
    ):
        defaults = {
            "output_dir": str(tmp_path),
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": COMPLETION,
            "learning_rate": 1e-3,
            "max_steps": 4,
            **SMALL_RUN,
        }
        return cls(
            model if model is not None else tiny_model(),
            reward,
            config_cls(**{**defaults, **fields}),
            train_dataset=data if data is not None else tiny_data(),
            **{"processing_class": arithmetic.tokenizer(), **(trainer or {})},
        )

    return make


def injected_batch(model, rows=8, length=COMPLETION, seed=0, noise=0.3, prompt_length=5):
    """A minibatch as TRL's loss takes it, with rollout log-probs off the policy by ``noise`` nats per token.

    Responses have different lengths; row 1 is empty and row 2 has a single token.
    """
    g = torch.Generator().manual_seed(seed)
    prompt = torch.randint(2, VOCABULARY, (rows, prompt_length), generator=g)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sampled = model.generate(prompt, do_sample=True, top_k=0, min_new_tokens=length, max_new_tokens=length)
    completion = sampled[:, prompt_length:]
    lengths = torch.randint(2, length + 1, (rows, 1), generator=g)
    lengths[1], lengths[2], lengths[3] = 0, 1, length
    mask = (torch.arange(length) < lengths).long()
    with torch.no_grad():
        logits = model(torch.cat([prompt, completion], 1)).logits[:, prompt_length - 1 : -1]
    logps = logits.float().log_softmax(-1).gather(-1, completion[..., None])[..., 0]
    shift = torch.randn(rows, length, generator=g) * noise
    return {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": completion,
        "completion_mask": mask,
        "advantages": torch.randn(rows, generator=g),
        "old_per_token_logps": ((logps + shift).clamp(max=-1e-3)) * mask,
        "num_items_in_batch": mask.sum(),
    }


def full_log_softmax(model, batch, temperature=1.0, bf16=False, fp32_head=False):
    """log π over the whole vocabulary, (B, T, V), from full logits: independent of TRL's fused head."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        if fp32_head:
            hidden = model.model(input_ids=ids, attention_mask=attention).last_hidden_state
        else:
            logits = model(input_ids=ids, attention_mask=attention).logits
    if fp32_head:
        logits = hidden.float() @ model.lm_head.weight.T
    return (logits[:, batch["prompt_ids"].size(1) - 1 : -1].float() / temperature).log_softmax(-1)


def full_logps(model, batch, temperature=1.0):
    """log π of the completion tokens."""
    return full_log_softmax(model, batch, temperature).gather(-1, batch["completion_ids"][..., None])[..., 0]


def gradients(trainer, batch):
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    loss = trainer._compute_loss(trainer.model.train(), batch)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def random_rows(rows, width, seed):
    """Responses with holes, empty rows and single tokens; divergences from tiny to far above every limit."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, width, generator=g) < torch.rand(rows, 1, generator=g) * 1.2
    mask &= torch.arange(width) < torch.randint(0, width + 1, (rows, 1), generator=g)
    scale = 10 ** (torch.rand(rows, 1, generator=g) * 3 - 3)
    divergence = torch.rand(rows, width, generator=g) ** 3 * scale
    divergence[::7] = 0.0  # never leaves
    divergence[1::7, width // 2 :] *= 50  # leaves late
    divergence[2::7, : width // 4] *= 50  # leaves early
    advantages = torch.randn(rows, width, generator=g)
    advantages[::5] = advantages[::5, :1]
    advantages[3::11] = 0.0
    log_ratio = torch.randn(rows, width, generator=g) * 0.1
    log_ratio[:, 8::9] = 0.0
    return divergence, advantages, log_ratio, mask


LIMITS = {"delta": 0.05, "delta_b": 0.01, "w_min": 0.7}
FIELDS = {  # of the config, tight enough that every rule acts on the injected batch
    "cppo": {"cppo_delta": 0.05, "cppo_delta_b": 0.01, "cppo_w_min": 0.7, "cppo_delta_b_quantile": None},
    "cppo_soft": {"cppo_delta": 0.05, "cppo_delta_b": 0.01, "cppo_w_min": 0.7, "cppo_delta_b_quantile": None},
    "dppo": {"cppo_delta": 0.05},
    "trm_max": {"cppo_divergence": "binary_kl", "cppo_delta": 0.05},
    "trm_avg": {"cppo_divergence": "binary_kl", "cppo_delta": 0.01},
    "minpro": {"cppo_ratio_min": 0.8, "cppo_ratio_max": 1.1},
    "cispo": {"cppo_ratio_min": 0.9, "cppo_ratio_max": 1.2},
    "grpo": {"cppo_ratio_min": 0.9, "cppo_ratio_max": 1.2},
    "drpo": {"cppo_delta": 0.1},
    "ipo": {"cppo_delta": 0.05},
    "vaco": {"cppo_delta": 0.07},
    "none": {},
}


def parameters_of(rule):
    values = {"delta_b_max_multiple": 2.0, "delta_b_quantile": None, "shuffle_weights": False}
    values |= {name.removeprefix("cppo_"): value for name, value in FIELDS[rule].items()}
    return {name: values[name] for name in RULES[rule].parameters}


def with_topk(model, batch, k, seed=0):
    """The injected batch with a whole rollout policy: its Top-K ids and log-probs, and the sampled token's."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    with torch.no_grad():
        logits = model(ids).logits[:, batch["prompt_ids"].size(1) - 1 : -1].float()
    g = torch.Generator().manual_seed(seed)
    mu = (logits + 0.5 * torch.randn(logits.shape, generator=g)).log_softmax(-1)
    sampled = batch["completion_ids"].unsqueeze(-1)
    top = mu.topk(k)
    logps = top.values.masked_fill(
        (top.indices == sampled) | ~batch["completion_mask"].bool().unsqueeze(-1), -torch.inf
    )
    old = mu.gather(-1, sampled).squeeze(-1) * batch["completion_mask"]
    return {**batch, "old_per_token_logps": old, "topk_ids": top.indices.int(), "topk_logps": logps}, mu


class FakeEngine:
    """TRL's VLLMGeneration as far as it is used: sorted Top-K, the sampled token added where it is not among them."""

    def __init__(self, model, completions):
        self.model, self.completions, self.logprobs = model, completions, 0

    def generate(self, prompts, images=None, num_generations=1, profiler=None):
        all_logps, all_ids = [], []
        for prompt, tokens in zip(prompts, self.completions, strict=True):
            with torch.no_grad():
                logps = self.model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            rows = [
                list(dict.fromkeys([*row.topk(self.logprobs).indices.tolist(), y]))
                for row, y in zip(logps, tokens, strict=True)
            ]
            all_ids.append(rows)
            all_logps.append([[row[i].item() for i in ids] for row, ids in zip(logps, rows, strict=True)])
        return prompts, self.completions, all_logps, all_ids
