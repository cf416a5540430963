"""The paired comparison on a language model, with a tiny one made on the spot."""

import json
import sys

import pytest
import torch

import language_model
from tests.conftest import character_tokenizer, tiny_model


@pytest.fixture
def model(tmp_path):
    """A tiny model that chats, one character a token, and answers nothing but digits."""
    tokenizer = character_tokenizer(["<pad>", "<eos>", *"0123456789?"])
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tiny = tiny_model(vocab_size=len(tokenizer), tie_word_embeddings=True)
    tiny.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_units_are_paired_kept_and_ordered_as_the_estimators_are(model, tmp_path, monkeypatch, capsys):
    data, output = tmp_path / "data.jsonl", tmp_path / "units.jsonl"
    rows = [{"prompt": [{"role": "user", "content": f"{n}?"}], "solution": str(n % 10)} for n in range(10, 22)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(language_model, "LEARNING_RATE", 0.05)
    monkeypatch.setattr(language_model, "LENGTH", 6)
    monkeypatch.setattr(language_model, "K", 4)
    scores = iter(torch.tensor([1.0, 0.0]).repeat(1000).tolist())
    monkeypatch.setattr(
        language_model, "accuracy_reward", lambda completions, solution: [next(scores) for _ in solution]
    )
    arguments = ["--models", str(model), "--data", str(data), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["language_model.py", *arguments, "--units", "1"])
    language_model.main()
    (unit,) = map(json.loads, output.read_text().splitlines())
    assert unit["prompts_with_advantage"] == language_model.PROMPTS
    arms = unit["arms"]
    assert arms["none"]["masked"] == 0 < arms["dppo, Top-K"]["masked"] < 1
    for measured in arms.values():
        assert 0 < measured["binary_tv"] <= measured["topk_tv"] + 1e-6
        assert measured["kl"] > 0
    monkeypatch.setattr(sys, "argv", ["language_model.py", *arguments, "--units", "2"])
    language_model.main()
    assert [json.loads(line)["unit"] for line in output.read_text().splitlines()] == [0, 1]
    assert json.loads(output.read_text().splitlines()[0]) == unit
    assert "| tiny | dppo, Top-K | 2 |" in capsys.readouterr().out
