import math

import pytest
import torch
from transformers import TrainerCallback

from cppo_trl.output.checkpoints import RunError, last_checkpoint
from cppo_trl.output.nonfinite import MAX_RESPONSES, save_batch
from tests.conftest import COMPLETION, digit_reward


def test_an_infinite_reward_stops_the_run_and_its_batch_is_kept(make_trainer, tmp_path):
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
    kept = torch.load(tmp_path / "nonfinite-update-5-process-0.pt")
    assert (kept["update"], kept["process"]) == (5, 0)
    assert not math.isfinite(kept["loss"])
    assert kept["metrics"]["cppo/nonfinite_losses"] >= 1
    assert kept["advantages"].abs().max() > 1e38
    for name in ("per_token_logps", "old_per_token_logps", "divergence"):
        assert kept[name].shape == kept["completion_ids"].shape == (4, COMPLETION)
        assert kept[name].isfinite().all()
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    assert weights.isfinite().all()  # the update was not made
    make_trainer(max_steps=6).train(resume_from_checkpoint=str(last_checkpoint(str(tmp_path))[0]))


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


def test_what_is_kept_is_bounded_and_begins_with_the_rows_at_fault(tmp_path):
    rows = 3 * MAX_RESPONSES
    batch = {"completion_ids": torch.arange(rows)[:, None], "divergence": torch.zeros(rows, 5), "num_items": 3}
    batch["divergence"][[7, 40], 2] = math.nan
    good, bad = (torch.tensor(0.0), batch), (torch.tensor(math.nan), batch)
    assert not save_batch(tmp_path / "none.pt", [good, good])
    assert not (tmp_path / "none.pt").exists()
    assert save_batch(tmp_path / "some.pt", [good, bad], update=3)
    kept = torch.load(tmp_path / "some.pt")
    assert kept["micro_batch"] == 1
    assert kept["rows"].tolist() == [7, 40, *range(7), *range(8, MAX_RESPONSES - 1)]
    assert kept["completion_ids"].flatten().tolist() == kept["rows"].tolist()
