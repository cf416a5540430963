"""What lives for a rollout, for one loss and for one update."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from trl import GRPOTrainer

from cppo_trl.seam.state import Loss, skip_zero_std_prompts
from tests.conftest import gradients, injected_batch, tiny_model, with_topk


def scored_loss(config, batch, logps):
    """A loss whose model scores the tokens with ``logps``, judged with all advantages 1."""
    loss = Loss(batch, config)
    loss.measure(lambda: (logps, None, None))
    loss.judge(torch.ones(len(logps), 1), batch["completion_mask"])
    return loss


def test_a_response_keeps_its_order_of_weights_in_any_micro_batch(make_trainer):
    config = make_trainer(cppo_shuffle_weights=True, cppo_w_min=0.1).args
    batch = injected_batch(tiny_model())
    batch["response_ids"] = torch.arange(8)
    logps = batch["old_per_token_logps"] + 0.1
    whole = scored_loss(config, batch, logps).verdict.prefix.weights
    halves = [
        {k: v[rows] if torch.is_tensor(v) and v.dim() else v for k, v in batch.items()} for rows in ([5, 2], [7, 0])
    ]
    parts = [scored_loss(config, half, logps[half["response_ids"]]).verdict.prefix.weights for half in halves]
    assert torch.equal(torch.cat(parts), whole[[5, 2, 7, 0]])
    assert (whole[:, 1:] > whole[:, :-1]).any()  # shuffled


def test_arguments_of_the_pass_may_be_named(make_trainer):
    trainer = make_trainer(cppo_divergence="topk_tv", cppo_topk=3)
    batch, _ = with_topk(trainer.model, injected_batch(trainer.model), k=3)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attended = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    compute = partial(GRPOTrainer._get_per_token_logps_and_entropies, trainer, trainer.model)
    losses = [Loss(batch, trainer.args) for _ in range(2)]
    losses[0].measure(compute, ids, attended, batch["completion_ids"].size(1))
    losses[1].measure(compute, input_ids=ids, attention_mask=attended, logits_to_keep=batch["completion_ids"].size(1))
    assert torch.equal(losses[0].divergence, losses[1].divergence)
    assert losses[0].divergence.max() > 0.01


def test_a_loss_is_judged_once(make_trainer):
    config, batch = make_trainer().args, injected_batch(tiny_model())
    loss = scored_loss(config, batch, batch["old_per_token_logps"])
    with pytest.raises(RuntimeError, match="applied twice in one loss"):
        loss.judge(loss.advantages, loss.mask)
    with pytest.raises(RuntimeError, match="applied 0 times in one loss"):
        _ = Loss(batch, config).judged


def test_responses_are_numbered_by_seed_rollout_and_process(make_trainer, monkeypatch):
    def ids_of(seed, step, process):
        trainer = make_trainer(cppo_shuffle_weights=True, seed=seed)
        trainer.state.global_step = step
        monkeypatch.setattr(type(trainer.accelerator), "process_index", process)
        rows = [dict(trainer.train_dataset[0]) for _ in range(8)]
        output = trainer._generate_and_score_completions(rows)
        monkeypatch.undo()
        return set(output["response_ids"].tolist())

    first = ids_of(0, 0, 0)
    assert len(first) == 8
    assert first == ids_of(0, 0, 0)  # the same after a resume
    assert not any(first & ids_of(*others) for others in [(1, 0, 0), (0, 2, 0), (0, 0, 1)])


@pytest.mark.parametrize("loss_type", ["dr_grpo", "dapo", "grpo"])
def test_prompts_whose_responses_score_alike_leave_loss_and_normalizer(make_trainer, loss_type):
    def reward(prompts, completions, **kwargs):
        first = prompts[0]  # its four responses score alike, by a number that no mean reproduces exactly
        return [0.1 if p == first else float(i % 2) for i, p in enumerate(prompts)]

    trainers = [
        make_trainer(reward=reward, loss_type=loss_type, skip_zero_std_prompts=skip, cppo_delta=math.inf)
        for skip in (True, False)
    ]
    rows = [dict(row) for row in trainers[0].train_dataset.select(range(4)) for _ in range(4)]
    outputs = []
    for trainer in trainers:
        torch.manual_seed(0)
        outputs.append(trainer._generate_and_score_completions(rows))
    skipping, counting = outputs
    assert torch.equal(skipping["completion_ids"], counting["completion_ids"])
    assert not skipping["completion_mask"][:4].any()
    assert torch.equal(skipping["completion_mask"][4:], counting["completion_mask"][4:])
    # the same loss from a batch that never held the first prompt
    without = {k: v[4:] if torch.is_tensor(v) and v.dim() else v for k, v in counting.items()}
    without["num_items_in_batch"] = without["completion_mask"].sum()
    _, expected = gradients(trainers[1], without)
    _, found = gradients(trainers[0], skipping)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)


def test_tokens_of_tools_are_not_in_the_normalizer():
    # two prompts of two responses; the first prompt's score alike, the others have 2 and 3 tokens of their own
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 1]])
    tools = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 0, 1], [1, 1, 1]])
    batch = {"advantages": torch.tensor([0.0, 0.0, 1.0, -1.0]), "completion_mask": mask, "tool_mask": tools}
    alone = SimpleNamespace(gather=lambda x: x, num_processes=1, process_index=0)
    skip_zero_std_prompts(batch, alone, 2, "grpo")
    assert batch["completion_mask"].tolist() == [[0, 0, 0], [0, 0, 0], [1, 1, 1], [1, 1, 1]]
    assert batch["num_items_in_batch"] == 5
    assert batch["advantages"].tolist() == [0.0, 0.0, 2.0, -2.0]
