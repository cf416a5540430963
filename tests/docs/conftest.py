"""A directory where the documents' commands and programs run: the repository, and what a reader would have there."""

import json
import shutil
from pathlib import Path

import datasets
import pytest

from cppo_trl import CPPOConfig
from cppo_trl.data import arithmetic
from tests.conftest import SMALL_RUN, tiny_model
from tests.data.conftest import *  # noqa: F403  (the fixtures of a Hub cache)

ROOT = Path(__file__).parents[2]
MODELS = ("Qwen/Qwen3-0.6B",)
"""On the Hub, for programs that load them."""
ROWS = [{"prompt": [{"role": "user", "content": f"{a}+2="}], "solution": str(a + 2), "limit": 400} for a in range(8)]
"""A dataset on the Hub, for the same."""
SMALL = {**SMALL_RUN, "max_steps": 2, "per_device_train_batch_size": 8, "max_completion_length": 8}
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


class ShortConfig(CPPOConfig):
    """Two small updates, whatever the program asks for."""

    def __init__(self, *args, **fields):
        super().__init__(*args, **{**fields, **SMALL})


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    tiny_model(tie_word_embeddings=True).save_pretrained(directory)
    tokenizer = arithmetic.tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """The directory; it becomes the current one."""
    for name in ("configs", "cppo_trl", "docs", "scripts", "tests", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    for path in ROOT.glob("constraints*.txt"):
        (tmp_path / path.name).symlink_to(path)
    for name in ("mine.jsonl", "my-problems.jsonl", "open-r1-dapo/en.parquet", "copies/gsm8k/test.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"question": "1+2?", "answer": {"final": "3"} if name == "mine.jsonl" else "One.\n#### 3"}]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("my-recipe.yaml", "FILE.yaml"):
        shutil.copy(ROOT / "configs/quickstart/cppo.yaml", tmp_path / name)
    (tmp_path / "prepare.yaml").write_text("template: boxed\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture
def trained(desk, tiny_directory, hub, monkeypatch):
    """The same after the reader's runs, with tiny models and datasets on the Hub, and training made short."""
    shutil.copytree(tiny_directory, desk / "outputs/quickstart")
    for name in MODELS:
        repository = hub / f"models--{name.replace('/', '--')}"
        shutil.copytree(tiny_directory, repository / "snapshots/0")
        (repository / "refs").mkdir()
        (repository / "refs/main").write_text("0")
    from_disk = datasets.load_dataset

    def load_dataset(name, *args, **options):
        return from_disk(name, *args, **options) if name == "json" else datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr("cppo_trl.config.CPPOConfig", ShortConfig)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return desk
