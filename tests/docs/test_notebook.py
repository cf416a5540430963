"""The notebook, on a tiny model."""

import json

import pytest

from tests.conftest import ROOT, tiny_model

NOTEBOOK = json.loads((ROOT / "configs/colab/cppo-gsm8k.ipynb").read_text())


def test_notebook_is_valid_and_runs_on_a_tiny_model(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib").use("Agg")
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids)
    code = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code")
    install, settings, *rest = code
    assert install.startswith("%pip install")

    import datasets

    from cppo_trl.data import arithmetic

    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path / "model")  # as Qwen3-0.6B
    tokenizer = arithmetic.tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}="
    tokenizer.save_pretrained(tmp_path / "model")
    rows = {"question": ["3+5", "2+4"] * 4, "answer": ["eight\n#### 1,008", "six\n#### 6"] * 4}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict(rows))
    monkeypatch.setattr(
        "cppo_trl.rewards.accuracy_reward", lambda completions, **_: [len(str(c)) for c in completions]
    )
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(settings, "settings", "exec"), names)
    names |= {"MODEL": str(tmp_path / "model"), "ROLLOUTS": 1, "COMPLETION_TOKENS": 8}
    for cell in rest:
        exec(compile(cell, "cell", "exec"), names)
    assert names["data"][0]["solution"] == "1008"
    assert names["config"].updates_per_rollout == 2
    assert "cppo/masked" in names["trainer"].state.log_history[0]
