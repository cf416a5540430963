import functools
import math
import string
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)
from trl import GRPOTrainer

from cppo_trl import CPPOTrainer
from cppo_trl.seam import topk as policy_topk
from cppo_trl.seam.state import Rollout
from tests.conftest import (
    COMPLETION,
    VOCABULARY,
    FakeEngine,
    character_tokenizer,
    full_log_softmax,
    full_logps,
    gradients,
    injected_batch,
    tiny_data,
    tiny_model,
    with_topk,
)
from tests.reference import algorithm_1, clipped_quantile, reduced

NOISE = 0.1  # nats, of the engine's log-prob of a sampled token
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")


def small(config_cls, model_cls, **fields):
    torch.manual_seed(1)
    shape = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "initializer_range": 0.4}
    return model_cls(config_cls(**shape, pad_token_id=0, eos_token_id=1, bos_token_id=None, **fields))


MODELS = {
    "qwen3": tiny_model,
    "qwen3-tied": lambda: tiny_model(tie_word_embeddings=True),
    "gemma2-softcap": lambda: small(Gemma2Config, Gemma2ForCausalLM, final_logit_softcapping=3.0),
    "granite-scaling": lambda: small(GraniteConfig, GraniteForCausalLM, logits_scaling=3.0),
    "cohere-scale": lambda: small(CohereConfig, CohereForCausalLM, logit_scale=0.4),
}
CASES = [(name, {}) for name in MODELS]
CASES += [
    ("qwen3", {"temperature": 0.7}),
    ("qwen3", {"peft": LORA}),
    ("qwen3", {"peft": LORA, "beta": 0.1}),
    ("qwen3", {"gradient_checkpointing": True}),
    ("qwen3", {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_iterations": 2}),
    ("qwen3", {"cppo_divergence": "topk_kl"}),
    ("qwen3", {"cppo_topk": 3, "mask_truncated_completions": True}),
    ("qwen3", {"bf16": True, "cast_lm_head_to_fp32": True}),
    ("qwen3", {"bf16": True}),
]
NOISY = {"use_vllm": True, "cppo_topk_source": "policy"}
CASES += [
    ("qwen3", NOISY),
    ("qwen3", {**NOISY, "vllm_mode": "server"}),
    ("qwen3", {**NOISY, "peft": LORA, "beta": 0.1}),
    ("qwen3", {**NOISY, "gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_iterations": 2}),
    ("qwen3", {**NOISY, "bf16": True, "cast_lm_head_to_fp32": True}),
    ("qwen3", {**NOISY, "rollout_func": True}),
    ("qwen3", {"cppo_topk_source": "policy"}),
]


class NoisyEngine(FakeEngine):
    """Random responses with noise on the log-probs; it is asked for the sampled token's alone."""

    def __init__(self, model=None, **kwargs):
        super().__init__(model, None)
        self.g, self.vllm_client = torch.Generator().manual_seed(0), self

    def get_server_info(self):
        return {"model_config": {"logprobs_mode": "processed_logprobs", "max_logprobs": 0}}

    def sync_weights(self):
        pass

    def random(self, high, size=()):
        return torch.randint(2, high, size, generator=self.g)

    def respond(self, prompts):
        return [self.random(VOCABULARY, (self.random(COMPLETION),)).tolist() for _ in prompts]

    def generate(self, prompts, **kwargs):
        assert self.logprobs == 0
        self.completions = self.respond(prompts)
        *answers, logps, ids = super().generate(prompts)
        noisy = [[[p + NOISE * torch.randn((), generator=self.g).item() for p in x] for x in row] for row in logps]
        return *answers, noisy, ids

    def rollout_func(self, prompts, trainer):
        ids, answers, logps, _ = self.generate([trainer.processing_class(p)["input_ids"] for p in prompts])
        return {"prompt_ids": ids, "completion_ids": answers, "logprobs": [[p for (p,) in row] for row in logps]}


class AgainstFullLogits(CPPOTrainer):
    """Keeps D_t of each token, that of two models run in full, and what is wrong with the token's log ratio."""

    def __init__(self, *args, **kwargs):
        self.tokens = []
        super().__init__(*args, **kwargs)

    @torch.no_grad()
    def log_softmax(self, batch):
        args = self.args
        return full_log_softmax(self.model, batch, args.temperature, args.bf16, args.cast_lm_head_to_fp32)

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        return {**output, "mu": self.log_softmax(output)}  # travels with its response

    def _compute_loss(self, model, inputs):
        self.batch = inputs
        return super()._compute_loss(model, inputs)

    def get_off_policy_mask(self, **inputs):
        pi, mu, ids = self.log_softmax(self.batch), self.batch["mu"], self.batch["completion_ids"].unsqueeze(-1)
        anchor = self.batch["old_per_token_logps"] if self.args.use_vllm else mu.gather(-1, ids).squeeze(-1)
        k, kind = self.args.cppo_topk, self.args.cppo_divergence.removeprefix("topk_")
        for b, t in inputs["mask"].nonzero().tolist():
            sampled = ids[b, t].item()
            expected = reduced(pi[b, t].double().tolist(), mu[b, t].double().tolist(), sampled, k, kind)
            error_of_ratio = self._loss.log_ratio[b, t] - pi[b, t, sampled] + anchor[b, t]
            self.tokens.append((self._loss.divergence[b, t].item(), expected, error_of_ratio.item()))
        return super().get_off_policy_mask(**inputs)


@pytest.mark.parametrize(("name", "fields"), CASES, ids=lambda x: x if isinstance(x, str) else "-".join(x))
def test_divergence_equals_that_of_full_logits(make_trainer, monkeypatch, name, fields):
    """Through rollout, shuffle, split, accumulation and updates, against two models run in full.

    With an engine that is noisy, the divergence is still from the trained model; the ratio is from the engine.
    """
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", NoisyEngine)
    model, noisy = MODELS[name](), "use_vllm" in fields
    fields = {"cppo_divergence": "topk_tv", "learning_rate": 1e-2, "per_device_train_batch_size": 4, **fields}
    fields = {"cppo_topk": 5, **fields} if "cppo_topk" not in fields else fields
    fields = {"steps_per_generation": 4, **fields} if "steps_per_generation" not in fields else fields
    own = {"rollout_func": NoisyEngine(model).rollout_func} if fields.pop("rollout_func", False) else {}
    peft = fields.pop("peft", None)
    k = fields["cppo_topk"]
    trainer = make_trainer(AgainstFullLogits, model=model, max_steps=6, trainer={"peft_config": peft, **own}, **fields)
    trainer.train()
    seen, compared, errors_of_ratio = zip(*trainer.tokens, strict=True)
    assert max(compared) > (0.003 if peft else 0.02)
    # logits of a bf16 head are rounded, in the reference as well
    tolerance = 2e-2 if fields.get("bf16") and not fields.get("cast_lm_head_to_fp32") else 3e-6
    errors = [abs(a - b) for a, b in zip(seen, compared, strict=True)]
    assert max(errors) < tolerance
    assert sum(errors) / len(errors) < tolerance / 10
    history = [h for h in trainer.state.log_history if "cppo/divergence/mean" in h]
    assert history[0]["cppo/rollout_mismatch"] < 1e-6  # right after the rollout, with unchanged weights
    assert "cppo/rollout_mismatch" not in history[1]
    assert max(abs(x) for x in errors_of_ratio) < (0.1 if fields.get("bf16") else 1e-5)
    expected = NOISE * math.sqrt(2 / math.pi) if noisy else 0.0
    assert history[0]["cppo/rollout_mismatch_nats"] == pytest.approx(expected, rel=0.2, abs=1e-6)
    assert history[0]["cppo/masked"] == 0
    assert k / VOCABULARY < history[0]["cppo/topk_mass"] <= 1 + 1e-5


@pytest.mark.parametrize("compact", [False, True])
def test_mask_loss_and_gradient_with_topk(make_trainer, monkeypatch, compact):
    """With every position scored, as TRL does on a CPU, and with the valid ones only, as on a GPU."""
    monkeypatch.setattr(policy_topk.host, "_use_triton", lambda device: compact)
    trainer = make_trainer(cppo_divergence="topk_tv", cppo_topk=4, cppo_delta=0.1)
    batch, mu = with_topk(trainer.model, injected_batch(trainer.model), k=4)
    mask, advantages = batch["completion_mask"], batch["advantages"]
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], mask], 1)
    pi = trainer.model(input_ids=ids, attention_mask=attention).logits[:, 4:-1].log_softmax(-1).detach()
    keep = torch.zeros(8, COMPLETION)
    for b, length in enumerate(mask.sum(1).tolist()):
        tokens = batch["completion_ids"][b].tolist()
        at = [(pi[b, t].double().tolist(), mu[b, t].double().tolist(), tokens[t], 4, "tv") for t in range(length)]
        divergences = [reduced(*x) for x in at]
        ratios = [math.exp(p[y] - m[y]) for p, m, y, _, _ in at]
        delta_b = clipped_quantile(divergences, 0.02, 0.9, 2.0)
        row, _, margin = algorithm_1(ratios, [advantages[b].item()] * length, divergences, 0.1, delta_b, 0.8)
        assert margin > 1e-6
        keep[b, :length] = torch.tensor(row, dtype=torch.float32)
    assert 0.05 < 1 - keep.sum() / mask.sum() < 0.95
    logps = full_logps(trainer.model, batch)
    coefficient = -advantages[:, None] * (logps - batch["old_per_token_logps"]).exp().detach() * keep
    trainer.model.zero_grad()
    (coefficient * logps * mask).sum().div(mask.numel()).backward()
    expected = {n: p.grad.clone() for n, p in trainer.model.named_parameters()}
    loss, found = gradients(trainer, batch)
    torch.testing.assert_close(loss, (coefficient * mask).sum().div(mask.numel()).detach(), rtol=1e-5, atol=1e-7)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("batch_size", [8, 3])
def test_rollout_side_is_the_same_where_only_valid_tokens_are_scored(make_trainer, monkeypatch, batch_size):
    trainer = make_trainer(cppo_divergence="topk_tv", cppo_topk=4)
    batch = injected_batch(trainer.model)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    read = []
    for compact in (False, True):
        monkeypatch.setattr(policy_topk.host, "_use_triton", lambda device, compact=compact: compact)
        trainer._rollout = Rollout(trainer.args, 0, 0)
        with torch.no_grad():
            trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, COMPLETION, batch_size)
        read.append(trainer._rollout._scored[1])
    valid = batch["completion_mask"].bool()
    assert torch.equal(read[0].ids[valid], read[1].ids[valid])
    torch.testing.assert_close(read[0].logps, read[1].logps)
    full = trainer.model(ids, attention_mask=attention).logits[:, 4:-1].log_softmax(-1)
    torch.testing.assert_close(read[0].logps[valid], full.topk(4).values[valid])
    assert (read[1].logps[~valid] == -torch.inf).all()


def test_where_trl_skips_the_rollout_pass_so_do_we(make_trainer):
    trainer = make_trainer(cppo_divergence="topk_tv", steps_per_generation=1, max_steps=2)
    trainer.train()
    assert "topk_ids" not in trainer._buffered_inputs[0]
    assert all(h["cppo/divergence/max"] == 0 for h in trainer.state.log_history if "loss" in h)


@pytest.mark.parametrize("wanted", [{"k": 3}, {"ids": torch.zeros(1, 2, 3, dtype=torch.int32, device="meta")}])
def test_what_is_read_off_stays_on_the_device_of_the_batch(wanted):
    call = {"attention_mask": torch.ones(1, 5, device="meta"), "logits_to_keep": 2}
    tap = policy_topk.HeadTap(call, **wanted)
    assert (tap.ids.device.type, tap.logps.device.type) == ("meta", "meta")


def test_likeliest_merges_tiles_of_the_vocabulary(monkeypatch):
    monkeypatch.setattr(policy_topk, "_VOCABULARY", 7)
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(11, 8), torch.randn(40, 8), torch.randn(40)
    values, ids = policy_topk.likeliest(hidden, weight, bias, 9)
    expected = (hidden @ weight.t() + bias).topk(9)
    torch.testing.assert_close(values, expected.values)
    assert torch.equal(ids.long(), expected.indices)


@pytest.mark.parametrize("side", ["ids", "k"])
def test_logits_are_rounded_to_the_dtype_of_the_pass_as_those_of_trl_are(side):
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 16), torch.randn(VOCABULARY, 16)
    call = {"attention_mask": torch.ones(2, 2), "logits_to_keep": 2}
    ids = torch.arange(VOCABULARY, dtype=torch.int32).expand(2, 2, -1).clone()
    tap = policy_topk.HeadTap(call, **({"ids": ids} if side == "ids" else {"k": VOCABULARY}))
    with torch.autocast("cpu", torch.bfloat16):
        tap._read(hidden, torch.zeros(4), weight, None, torch.zeros(4), 1.0, 0, None, 1.0, None)  # log Z = 0
    exact = (hidden.double() @ weight.double().t()).view(2, 2, -1).gather(-1, tap.ids.long())
    rounding = (tap.logps - exact).abs() / exact.abs().clamp(min=1)
    assert torch.equal(tap.logps, tap.logps.bfloat16().float())
    assert 1e-3 < rounding.max() < 3e-2


def test_a_bias_of_the_head_is_rounded_like_the_rest():
    hidden, weight, bias = torch.randn(4, 8).bfloat16(), torch.randn(9, 8), torch.randn(9)
    logits = policy_topk.HeadTap.chosen(hidden, weight, bias, torch.tensor([[1, 2]] * 4))
    best, _ = policy_topk.likeliest(hidden, weight, bias, 2)
    assert logits.dtype == best.dtype == torch.bfloat16


def test_storage_is_four_bytes_an_id_and_a_logprob(make_trainer):
    trainer = make_trainer(cppo_divergence="topk_tv", max_steps=1)
    trainer.train()
    batch = trainer._buffered_inputs[0]
    assert batch["topk_ids"].dtype == torch.int32
    assert batch["topk_logps"].dtype == torch.float32
    assert batch["topk_ids"].shape == (*batch["completion_ids"].shape, 20)


@pytest.mark.parametrize("name", ["tools", "rollout_func", "environment_factory"])
def test_rollouts_without_topk_are_refused(make_trainer, name):
    with pytest.raises(ValueError, match=f"{name} with cppo_divergence='topk_tv'"):
        make_trainer(cppo_divergence="topk_tv", trainer={name: [print]})


def test_a_rollout_func_that_says_that_it_lags_is_refused(make_trainer):
    def lagging(prompts, trainer):
        raise AssertionError

    lagging.lag = 1
    with pytest.raises(ValueError, match=r"rollout_func\.lag says that it samples from older weights"):
        make_trainer(cppo_divergence="topk_tv", cppo_topk_source="policy", trainer={"rollout_func": lagging})
    make_trainer(trainer={"rollout_func": lagging})


def plus(a: int, b: int) -> int:
    """Add.

    Args:
        a: a number.
        b: another.
    """
    return a + b


def test_tools(make_trainer, monkeypatch):
    """Some responses have two turns and a tool's tokens between them: D_t is that of full logits on all but those."""
    tokenizer = character_tokenizer(["<pad>", "<eos>", *string.printable])
    tokenizer.chat_template = Path(trl.__path__[0], "chat_templates/qwen3.jinja").read_text()
    call = '<tool_call>\n{"name": "plus", "arguments": {"a": 3, "b": 4}}\n</tool_call>'
    by_tool = []

    class Engine(NoisyEngine):
        turn = 0

        def respond(self, prompts):
            self.turn += 1
            answers = super().respond(prompts)
            calls = self.turn % 2  # the second answer makes none
            return [tokenizer(call)["input_ids"] if calls and i % 3 else x for i, x in enumerate(answers)]

    class Spy(AgainstFullLogits):
        def get_off_policy_mask(self, **inputs):
            by_tool.append((self.batch["completion_mask"].sum() - inputs["mask"].sum()).item())
            return super().get_off_policy_mask(**inputs)

    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", Engine)
    trainer = make_trainer(
        Spy,
        model=tiny_model(vocab_size=len(tokenizer)),
        data=Dataset.from_list([{"prompt": [{"role": "user", "content": "3+4="}]}] * 16),
        reward=lambda completions, **kwargs: [float(len(str(x)) % 7) for x in completions],
        trainer={"tools": [plus], "processing_class": tokenizer},
        cppo_divergence="topk_tv",
        cppo_topk=5,
        cppo_topk_source="policy",
        use_vllm=True,
        vllm_mode="server",
        max_completion_length=300,
        learning_rate=1e-2,
    )
    trainer.train()
    assert trainer.state.log_history[0]["tools/call_frequency"] > 0.5
    seen, compared, _ = zip(*trainer.tokens, strict=True)
    assert min(by_tool) > 20
    assert max(abs(a - b) for a, b in zip(seen, compared, strict=True)) < 3e-6
    assert max(compared) > 0.02
    assert trainer.state.log_history[0]["cppo/rollout_mismatch"] < 1e-6


def test_more_tokens_than_the_vocabulary_has_are_refused(make_trainer):
    with pytest.raises(ValueError, match="cppo_topk=24 exceeds the model's vocabulary of 23"):
        make_trainer(cppo_divergence="topk_tv", cppo_topk=24)


def test_a_changed_head_is_loud(make_trainer, monkeypatch):
    class Moved(policy_topk.host._ChunkedLogProbFunction):
        @staticmethod
        def forward(ctx, hidden, weight, targets):
            raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr(policy_topk.host, "_ChunkedLogProbFunction", Moved)
        with pytest.raises(RuntimeError, match=r"fused LM head .*Use cppo_divergence='binary_tv', or install trl"):
            make_trainer(cppo_divergence="topk_tv")
    trainer = make_trainer(cppo_divergence="topk_tv")
    monkeypatch.setattr(
        GRPOTrainer,
        "_get_per_token_logps_and_entropies",
        lambda self, model, input_ids, attention_mask, logits_to_keep, **k: (torch.zeros(8, 12), None, None),
    )
    batch, _ = with_topk(trainer.model, injected_batch(trainer.model), k=20)
    with pytest.raises(RuntimeError, match="read for 0 of 8 responses"):
        trainer._compute_loss(trainer.model, batch)


def test_a_head_that_keeps_its_normalizer_elsewhere_is_loud(make_trainer, monkeypatch):
    class Elsewhere(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs
        ):
            logps = (hidden @ weight.t() / temperature).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
            ctx.save_for_backward(*[torch.zeros(len(hidden))] * 6)
            return logps, torch.zeros_like(logps)

    monkeypatch.setattr(policy_topk.host, "_ChunkedLogProbFunction", Elsewhere)
    with pytest.raises(RuntimeError, match="log Z among what it saves"):
        make_trainer(cppo_divergence="topk_tv")


def test_engine_topk_is_the_union_with_the_sampled_token():
    model = tiny_model()
    completions = [[5, 6, 7, 1], [9, 1], [2, 3, 4]]
    engine = FakeEngine(model, completions)
    recorder = policy_topk.EngineTopK(engine, 3)
    prompts = [[4, 12, 5], [6, 12], [7]]
    _, _, sampled, _ = engine.generate(prompts)
    completion_ids = torch.tensor([[5, 6, 7, 1], [9, 1, 0, 0], [2, 3, 4, 0]])
    ids, logps = recorder.take(completion_ids)
    assert ids.shape == logps.shape == (3, 4, 4)
    with_rank_above_k = 0
    for b, (prompt, tokens) in enumerate(zip(prompts, completions, strict=True)):
        full = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        for t, y in enumerate(tokens):
            expected = set(full[t].topk(3).indices.tolist()) | {y}
            known = logps[b, t] > -torch.inf
            assert set(ids[b, t][known].tolist()) == expected
            torch.testing.assert_close(logps[b, t][known], full[t][ids[b, t][known].long()])
            assert sampled[b][t] == pytest.approx([full[t, y].item()])
            with_rank_above_k += len(expected) == 4
        assert (logps[b, len(tokens) :] == -torch.inf).all()
    assert with_rank_above_k > 0
    engine.generate = lambda: (prompts, [[5], []], [[[-1.0, None]], []], [[[5, 6]], []])  # a NaN, an empty response
    recorder = policy_topk.EngineTopK(engine, 3)
    engine.generate()
    _, logps = recorder.take(torch.tensor([[5], [0]]))
    assert logps[0, 0, 1].isnan()
    assert logps.flatten()[[0, 2, 3, 4]].tolist() == [-1.0, -math.inf, -math.inf, -math.inf]
    with pytest.raises(RuntimeError, match="0 of 3 responses"):
        recorder.take(completion_ids)
    engine.generate()
    assert {part.device.type for part in recorder.take(torch.zeros(2, 1, device="meta"))} == {"meta"}


@pytest.mark.parametrize("divergence", ["binary_tv", "topk_tv"])
def test_with_vllm_the_engine_is_the_anchor_and_no_pass_is_made(make_trainer, monkeypatch, divergence):
    calls = []

    class Engine(FakeEngine):
        def __init__(self, model, **kwargs):
            super().__init__(model, None)

        def sync_weights(self):
            pass

        def generate(self, prompts, **kwargs):
            self.completions = [[2 + (7 * len(calls) + 3 * i) % 20, 5 + i % 4, 1] for i in range(len(prompts))]
            return super().generate(prompts)

    class Spy(CPPOTrainer):
        def _compute_loss(self, model, inputs):
            calls.append(inputs)
            return super()._compute_loss(model, inputs)

    compute = GRPOTrainer._get_per_token_logps_and_entropies
    passes = []
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", Engine)

    @functools.wraps(compute)
    def counted(*args, **kwargs):
        passes.append(1)
        return compute(*args, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", counted)
    trainer = make_trainer(Spy, use_vllm=True, cppo_divergence=divergence, max_steps=4, learning_rate=5e-3)
    trainer.train()
    assert len(calls) == len(passes) == 4  # one pass for each loss, none for the two rollouts
    history = trainer.state.log_history
    assert [h["cppo/rollout_mismatch"] < 1e-6 for h in history if "cppo/rollout_mismatch" in h] == [True, True]
    assert history[1]["cppo/divergence/mean"] > 1e-3
    assert ("topk_ids" in calls[0]) == (divergence == "topk_tv")


def test_topk_training_raises_the_reward(make_trainer):
    fields = {"learning_rate": 5e-3, "per_device_train_batch_size": 16, "cppo_delta": 0.3, "cppo_delta_b": 0.1}
    trainer = make_trainer(max_steps=40, cppo_divergence="topk_tv", data=tiny_data(), **fields)
    trainer.train()
    rewards = [h["reward"] for h in trainer.state.log_history if "reward" in h]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2


def test_an_unknown_log_prob_adds_no_mass(make_trainer):
    trainer = make_trainer(cppo_divergence="topk_tv", cppo_topk=4)
    batch, mu = with_topk(trainer.model, injected_batch(trainer.model), k=4)
    assert batch["completion_mask"][3, 4] == 1
    batch["old_per_token_logps"][3, 4] = torch.nan
    sampled = mu.gather(-1, batch["completion_ids"].unsqueeze(-1))[..., 0].exp()
    mass = (sampled + batch["topk_logps"].exp().sum(-1)) * batch["completion_mask"]
    mass[3, 4] = 0.0
    gradients(trainer, batch)
    expected = mass.sum().item() / batch["completion_mask"].sum().item()
    assert trainer._metrics["train"]["cppo/topk_mass"] == pytest.approx([expected], rel=1e-5)
