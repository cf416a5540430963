import math

import pytest
import torch
from transformers import TrainerCallback

from cppo_trl.output.checkpoints import RunError, last_checkpoint
from tests.conftest import digit_reward, tiny_data


def test_an_infinite_reward_stops_the_run_before_its_update(make_trainer, tmp_path):
    calls = []

    def reward(completions, **kwargs):
        calls.append(1)
        rewards = digit_reward(completions)
        return [math.inf if i % 4 == 0 else r for i, r in enumerate(rewards)] if len(calls) == 3 else rewards

    trainer = make_trainer(
        reward=reward,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=8,
        save_strategy="steps",
        save_steps=2,
    )
    with pytest.raises(RunError, match=r"loss of update 5 is not finite.*checkpoint-4"):
        trainer.train()
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    assert weights.isfinite().all()  # the update was not made
    make_trainer(max_steps=6).train(resume_from_checkpoint=str(last_checkpoint(str(tmp_path))[0]))


def test_an_infinite_reward_in_an_evaluation_is_counted_and_does_not_stop_the_run(make_trainer):
    def reward(completions, trainer_state, **kwargs):
        rewards = digit_reward(completions)
        return [math.inf, *rewards[1:]] if not trainer.model.training else rewards

    trainer = make_trainer(
        reward=reward, eval_strategy="steps", eval_steps=2, max_steps=4, trainer={"eval_dataset": tiny_data(8)}
    )
    with pytest.warns(UserWarning, match="loss of an evaluation batch is not finite; see eval_cppo/nonfinite_losses"):
        trainer.train()
    assert trainer.state.global_step == 4
    evaluations = [h for h in trainer.state.log_history if "eval_loss" in h]
    assert len(evaluations) == 2
    assert all(h["eval_cppo/nonfinite_losses"] >= 1 for h in evaluations)
    assert all("cppo/nonfinite_losses" not in h for h in trainer.state.log_history if "loss" in h)


def test_weights_that_are_not_finite_are_not_saved(make_trainer, tmp_path):
    class Overflow(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                next(model.parameters()).data[0, 0] = math.nan

    trainer = make_trainer(save_strategy="steps", save_steps=2, trainer={"callbacks": [Overflow()]})
    with pytest.raises(RunError, match="After update 2 the weights are not finite"):
        trainer.train()
    assert last_checkpoint(str(tmp_path)) == (None, [])


def test_nan_log_probs_do_not_break_the_metrics_before_the_stop(make_trainer):
    class Overflow(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            next(model.parameters()).data.fill_(math.nan)  # in the middle of a rollout: no sampling from NaN

    with pytest.raises(RunError, match="loss of update 2 is not finite"):
        make_trainer(trainer={"callbacks": [Overflow()]}).train()
