"""Samples follow the requested distribution, independently of the batch and of the model's own defaults."""

import pytest
import torch
from transformers import GenerationConfig

from cppo_trl.data import arithmetic
from cppo_trl.evaluation import Sampling, evaluate
from cppo_trl.evaluation.generation import (
    Completion,
    EngineGenerator,
    TransformersGenerator,
    completion_of,
    encode,
    seed_of,
)
from tests.conftest import digit_reward, tiny_model

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}{{ sign }}{% endif %}"
GREEDY = Sampling(1, temperature=0, max_new_tokens=8)


@pytest.fixture
def tokenizer():
    return arithmetic.tokenizer()


def test_padding_and_batches_change_nothing(tokenizer):
    model = tiny_model()
    prompts = encode(tokenizer, ["1+2=", "3+4+5+6=", "7=", "8+9+1+1+1="], {})
    together = TransformersGenerator(model, tokenizer, 3)(prompts, GREEDY, [0] * 4)
    for prompt, completion in zip(prompts, together, strict=True):
        tokens = list(prompt)
        while len(tokens) < len(prompt) + 8 and tokens[-1] != tokenizer.eos_token_id:
            tokens.append(model(torch.tensor([tokens])).logits[0, -1].argmax().item())
        assert completion.tokens == tokens[len(prompt) :]
        assert completion.truncated == (tokens[-1] != tokenizer.eos_token_id)


def test_samples_follow_the_asked_distribution(tokenizer):
    model = tiny_model(seed=1)
    prompt = encode(tokenizer, ["1+2="], {})
    logits = model(torch.tensor(prompt)).logits[0, -1]
    for temperature, top_p in ((1.0, 1.0), (0.7, 0.95), (2.0, 0.5)):
        probabilities = (logits / temperature).softmax(-1)
        ranked, order = probabilities.sort(descending=True)
        kept = ranked.cumsum(-1) - ranked < top_p  # the smallest set that reaches top_p
        expected = torch.zeros_like(ranked).scatter(0, order, ranked * kept / (ranked * kept).sum())
        sampling = Sampling(4000, temperature, top_p, max_new_tokens=1)
        samples = TransformersGenerator(model, tokenizer, 4000)(prompt * 4000, sampling, [0])
        counts = torch.bincount(torch.tensor([c.tokens[0] for c in samples]), minlength=len(expected)) / 4000
        assert counts[expected == 0].sum() == 0
        assert (counts - expected).abs().max() < 4 * 0.5 / 4000**0.5


def test_the_models_own_sampling_defaults_are_not_used(tokenizer):
    plain, opinionated = tiny_model(), tiny_model()
    opinionated.generation_config = GenerationConfig(
        do_sample=True, top_k=1, min_p=0.5, repetition_penalty=5.0, num_beams=2, eos_token_id=1, pad_token_id=0
    )
    prompts = encode(tokenizer, ["1+2=", "3+4="] * 5, {})
    for sampling in (Sampling(5, 1.0, 1.0, 8), GREEDY):
        samples = [TransformersGenerator(m, tokenizer, 4)(prompts, sampling, [3, 4]) for m in (plain, opinionated)]
        assert samples[0] == samples[1]
    sampled = TransformersGenerator(plain, tokenizer, 4)(prompts[::2], Sampling(5, max_new_tokens=8), [3])
    assert len({tuple(completion.tokens) for completion in sampled}) > 1


class Engine:
    """TRL's ``VLLMGeneration`` as far as `EngineGenerator` uses it: it repeats the prompt up to its limit."""

    def __init__(self):
        self.temperature, self.top_p, self.top_k, self.min_p = 1.0, 1.0, 5, 0.1
        self.repetition_penalty, self.max_completion_length, self.logprobs = 1.1, 2, 3
        self.seen = []

    def generate(self, prompts, images, num_generations):
        self.seen.append((vars(self).copy(), num_generations))
        return None, [prompt[: self.max_completion_length] for prompt in prompts], None, None


def test_a_trainers_engine_samples_as_asked_and_is_left_as_it_was():
    engine = Engine()
    before = vars(engine).copy()
    sampling = Sampling(2, temperature=0.7, top_p=0.9, max_new_tokens=4)
    rows = [[5, 6, 1], [5, 2], [7] * 9, [7] * 9]
    assert EngineGenerator(engine, [1, 2])(rows, sampling, [0] * 4) == [
        Completion([5, 6, 1], False),
        Completion([5, 2], False),
        *[Completion([7] * 4, True)] * 2,
    ]
    ((during, samples),) = engine.seen
    assert samples == 2
    assert (during["temperature"], during["top_p"], during["max_completion_length"]) == (0.7, 0.9, 4)
    assert (during["top_k"], during["min_p"], during["repetition_penalty"]) == (0, None, 1.0)
    assert vars(engine) == before


def test_a_completion_ends_at_its_first_end_token_or_is_truncated():
    assert completion_of([5, 6, 1, 0, 0], 1) == Completion([5, 6, 1], False)
    assert completion_of([5, 6, 7], [1, 2]) == Completion([5, 6, 7], True)
    assert completion_of([5, 2, 1], [1, 2]) == Completion([5, 2], False)
    assert completion_of([1, 0], 1) == Completion([1], False)


def test_only_conversations_get_the_chat_template(tokenizer):
    conversation = [{"role": "user", "content": "1+2"}]
    with pytest.raises(ValueError, match="no chat template"):
        encode(tokenizer, ["1+2=", conversation], {})
    tokenizer.chat_template = TEMPLATE
    plain, chat = encode(tokenizer, ["1+2=", conversation], {"sign": "="})
    assert plain == chat == tokenizer("1+2=")["input_ids"]


def test_a_problems_seed_is_its_own():
    seeds = {seed_of(seed, name, i) for seed in (0, 1) for name in ("aime24", "aime25") for i in ("1", "11")}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert seed_of(0, "aime24", "1") == 1526463136  # the same in every process and version


def test_evaluate_is_reproducible_and_leaves_no_trace(tokenizer):
    model = tiny_model().train()
    model.lm_head.eval()
    seen = []

    def reward(completions, solution):
        seen.append(list(completions))
        return digit_reward(completions)

    results = []
    for ambient in range(2):
        torch.manual_seed(ambient)
        state = torch.get_rng_state()
        prompts = ["1+2=", "3+4+5="]
        results.append(evaluate(model, tokenizer, prompts, ["", ""], reward, k=3, max_new_tokens=6, batch_size=2))
        assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model.lm_head.training
    assert seen[:2] == seen[2:]
    assert [len(texts) for texts in seen[:2]] == [2, 6]  # one greedy answer each, then the samples
    assert len(set(seen[1])) > 2
    assert results[0] == results[1]


def test_evaluate_averages_over_the_problems_that_count(tokenizer):
    scores = {"a": 1.0, "b": 0.0, "c": 0.5, "d": 1.0, "e": None}

    def reward(completions, solution):
        return [scores[s] for s in solution]

    prompts = [f"{a}+2=" for a in range(1, 6)]
    result = evaluate(tiny_model(), tokenizer, prompts, list("abcde"), reward, k=4, max_new_tokens=3)
    assert result.greedy == result.avg_at_k == pytest.approx(0.625)
    assert result.avg_at_k_stderr == pytest.approx(torch.tensor([1, 0, 0.5, 1]).std().item() / 2)
    assert result.metrics["pass@4"] == 0.5  # half a point is not right
    assert result.metrics["excluded"] == 1
    assert result.as_dict().keys() == {"greedy", "avg_at_4", "avg_at_4_stderr"}
    with pytest.raises(ValueError, match="solutions has 1 gold answers for 5"):
        evaluate(tiny_model(), tokenizer, prompts, ["a"], reward)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"samples": 0}, "samples must be >= 1"),
        ({"temperature": -1}, "temperature must be"),
        ({"top_p": 0}, "top_p must be"),
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
        ({"temperature": 0}, "samples must be 1 at temperature 0"),
    ],
)
def test_sampling_out_of_range_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**fields)
