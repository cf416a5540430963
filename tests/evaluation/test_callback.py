"""Evaluation during training: the right metrics at the right updates, and training unaffected."""

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback
from transformers.integrations import rewrite_logs

from cppo_trl.data import arithmetic
from cppo_trl.evaluation import EvaluationCallback, Sampling, evaluate, problems_of
from tests.conftest import digit_reward

SAMPLING = Sampling(samples=4, temperature=0.5, top_p=0.9, max_new_tokens=6, seed=3)


def right_if_short(completions, solution):
    """Tells models apart, and gives right and wrong answers."""
    return [float(len(text) % 2) for text in completions]


def training_rows(trainer):
    rows = [row for row in trainer.state.log_history if "eval_avg@4" not in row]
    return [{k: v for k, v in row.items() if "time" not in k and "per_second" not in k} for row in rows]


def problems():
    sums = problems_of("sums", arithmetic.problems(5, 3, 0))
    return sums + problems_of("pairs", arithmetic.problems(2, 2, 0))


def test_it_evaluates_on_time_and_leaves_training_unaffected(make_trainer):
    fields = {"max_steps": 5, "logging_steps": 5, "learning_rate": 1e-2}
    alone = make_trainer(**fields)
    alone.train()
    trainer = make_trainer(**fields)
    modes = []

    class Modes(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            modes.append(model.training)

    callback = EvaluationCallback(trainer, problems(), SAMPLING, every=2, reward=right_if_short)
    trainer.add_callback(callback)
    trainer.add_callback(Modes())
    assert callback.card_sections() == {}
    trainer.train()
    rows = callback.card_sections()["Evaluation"].splitlines()[2:]
    assert [row.split(" | ")[:2] for row in rows] == [
        [f"| update {step}", name] for step in (0, 5) for name in ("sums", "pairs", "mean")
    ]
    assert modes == [True] * 5
    for name, weight in alone.model.state_dict().items():
        assert torch.equal(weight, trainer.model.state_dict()[name]), name
    evaluations = [row for row in trainer.state.log_history if "eval_avg@4" in row]
    assert [row["step"] for row in evaluations] == [0, 2, 4, 5]
    # training rows are those of a run without evaluation: the mean over all five updates, and the summary
    assert training_rows(trainer) == training_rows(alone)
    assert len(training_rows(alone)) == 2
    assert len({row["eval_avg@4"] for row in evaluations}) > 1
    for row in evaluations:
        assert row["eval_avg@4"] == pytest.approx((row["eval_sums/avg@4"] + row["eval_pairs/avg@4"]) / 2)
        assert {
            "eval_avg@4_stderr",
            "eval_pass@2",
            "eval_maj@4",
            "eval_response_length",
            "eval_truncated",
        } < row.keys()
    assert {"eval/avg@4", "eval/sums/avg@4_stderr"} < rewrite_logs(evaluations[0]).keys()  # what integrations show


@pytest.mark.parametrize("peft", [None, LoraConfig(task_type="CAUSAL_LM", r=4)], ids=["full", "lora"])
def test_the_metrics_are_those_of_the_model(make_trainer, peft):
    trainer = make_trainer(gradient_checkpointing=True, trainer={"peft_config": peft}, learning_rate=3e-2)
    sums = problems_of("sums", arithmetic.problems(6, 3, 0))
    greedy = Sampling(samples=1, temperature=0, max_new_tokens=6)
    trainer.add_callback(EvaluationCallback(trainer, sums, greedy, every=4, reward=digit_reward))
    trainer.train()
    first, last = (row for row in trainer.state.log_history if "eval_avg@1" in row)
    prompts, solutions = [p.prompt for p in sums], [p.solution for p in sums]
    tokenizer = arithmetic.tokenizer()
    after = evaluate(trainer.model, tokenizer, prompts, solutions, digit_reward, k=1, max_new_tokens=6)
    assert last["eval_avg@1"] == pytest.approx(after.greedy)
    assert last["eval_avg@1"] != first["eval_avg@1"]


def test_a_resumed_training_is_not_evaluated_at_its_start(make_trainer):
    trainer = make_trainer(max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    resumed = make_trainer(max_steps=2)
    resumed.add_callback(EvaluationCallback(resumed, problems(), SAMPLING, every=10, reward=right_if_short))
    resumed.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-1")
    assert [row["step"] for row in resumed.state.log_history if "eval_avg@4" in row] == [2]
