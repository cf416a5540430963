import math

import pytest
import torch

from cppo_trl.data import arithmetic
from cppo_trl.evaluation import evaluate
from tests.conftest import tiny_model


def test_accuracy_of_known_answers():
    tokenizer, model = arithmetic.tokenizer(), tiny_model()
    prompts = [f"{a}+2=" for a in range(1, 9)]
    solutions = list("abcdefgh")
    scores = {"a": 1.0, "b": 0.0, "c": 0.5, "d": 1.0, "e": 0.0, "f": 0.0, "g": 1.0, "h": None}
    calls = []

    def reward(completions, solution):
        calls.append(len(completions))
        assert all(isinstance(c, str) for c in completions)
        return [scores[s] for s in solution]

    result = evaluate(model, tokenizer, prompts, solutions, reward, k=4, max_new_tokens=3, batch_size=5)
    known = torch.tensor([v for v in scores.values() if v is not None])
    assert result.greedy == result.avg_at_k == pytest.approx(known.mean().item())
    assert result.avg_at_k_stderr == pytest.approx(known.std().item() / math.sqrt(7))
    assert sum(calls) == 8 + 8 * 4
    assert max(calls) == 5
    assert result.as_dict().keys() == {"greedy", "avg_at_4", "avg_at_4_stderr"}


def test_evaluation_is_reproducible_and_leaves_no_trace():
    tokenizer, model = arithmetic.tokenizer(), tiny_model().train()
    seen = []

    def reward(completions, solution):
        seen.append(list(completions))
        return [0.0] * len(completions)

    state = torch.get_rng_state()
    for _ in range(2):
        evaluate(model, tokenizer, ["1+2=", "3+4+5="], ["", ""], reward, k=3, max_new_tokens=6)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert seen[:2] == seen[2:]
    assert len(set(seen[1])) > 2  # samples differ, greedy answers are one each
    assert len(seen[0]) == 2
