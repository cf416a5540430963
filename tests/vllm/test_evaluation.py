"""Evaluation by a real vLLM: an engine of its own, and a trainer's."""

import pytest

pytest.importorskip("vllm")

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from cppo_trl import CPPOTrainer
from cppo_trl.evaluation import EvaluationCallback, Sampling, evaluate, problems_of
from cppo_trl.evaluation.generation import TransformersGenerator, VLLMGenerator, encode
from tests.conftest import digit_reward, tiny_data
from tests.vllm.conftest import save_model, tokenizer

GREEDY = Sampling(samples=1, temperature=0, max_new_tokens=20)


def test_an_engine_answers_as_transformers_does(tmp_path):
    save_model(tmp_path, tied=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompts = encode(tokenizer(), tiny_data(40)["prompt"], {})
    engine = VLLMGenerator(str(tmp_path), "float32", enforce_eager=True, max_model_len=64)
    answers = engine(prompts, GREEDY, [0] * 40)
    assert answers == TransformersGenerator(model, tokenizer(), 40)(prompts, GREEDY, [0])
    assert len({completion.truncated for completion in answers}) == 2
    sampling = Sampling(samples=8, temperature=0.7, top_p=0.95, max_new_tokens=20)
    repeated, seeds = [prompt for prompt in prompts for _ in range(8)], list(range(320))
    first, again = engine(repeated, sampling, seeds), engine(repeated[:40], sampling, seeds[:40])
    assert first[:40] == again  # a sample depends on its seed, not on what else is asked
    samples = [{tuple(completion.tokens) for completion in first[at : at + 8]} for at in range(0, 320, 8)]
    assert sum(len(distinct) > 1 for distinct in samples) > 30


def test_an_adapter_answers_as_transformers_does(tmp_path):
    save_model(tmp_path / "base", tied=False)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = LoraConfig(
        task_type="CAUSAL_LM", init_lora_weights=False, r=8, lora_alpha=32, target_modules=["q_proj", "o_proj"]
    )
    model = get_peft_model(base, config)
    model.save_pretrained(tmp_path / "adapter")
    prompts = encode(tokenizer(), tiny_data(40)["prompt"], {})
    engine = VLLMGenerator(str(tmp_path / "adapter"), "float32", enforce_eager=True, max_model_len=64)
    answers = engine(prompts, GREEDY, [0] * 40)
    assert answers == TransformersGenerator(model, tokenizer(), 40)(prompts, GREEDY, [0])
    with model.disable_adapter():
        assert answers != TransformersGenerator(model, tokenizer(), 40)(prompts, GREEDY, [0])


@pytest.mark.parametrize("kind", ["binary_tv", "topk_tv"])
def test_a_trainers_engine_has_the_present_weights(colocate, kind):
    trainer = colocate(CPPOTrainer, cppo_divergence=kind, learning_rate=3e-2)
    problems = problems_of("sums", tiny_data(20))
    trainer.add_callback(EvaluationCallback(trainer, problems, GREEDY, every=3, reward=digit_reward))
    trainer.train()
    rows = [row for row in trainer.state.log_history if "eval_avg@1" in row]
    assert [row["step"] for row in rows] == [0, 3, 6]
    prompts, golds = [p.prompt for p in problems], [p.solution for p in problems]
    after = evaluate(trainer.model, tokenizer(), prompts, golds, digit_reward, k=1, max_new_tokens=20)
    assert rows[-1]["eval_avg@1"] == pytest.approx(after.greedy)
    assert rows[-1]["eval_avg@1"] != rows[0]["eval_avg@1"]
    assert trainer.vllm_generation.temperature == 1.0
    assert trainer.vllm_generation.max_completion_length == 12
