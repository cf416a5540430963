import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, load_from_disk
from trl import TrlParser

from cppo_trl.data import arithmetic
from cppo_trl.data.prepare import PrepareArguments, prepare
from cppo_trl.data.sources import SourceUnavailableError, load_source
from cppo_trl.launch.training import parse_arguments, train
from tests.conftest import SMALL_RUN, tiny_model
from tests.data.conftest import write_rows

ROOT = Path(__file__).parents[2]
LONG = "Find the number of ordered pairs of positive integers whose sum is 2024."


def test_every_drop_is_counted_and_the_rest_is_written(hub, tmp_path):
    mine = str(tmp_path / "mine.jsonl")
    write_rows(
        Path(mine),
        [
            {"question": "Made up for 2024!", "answer": "73"},  # is in AIME 2024
            {"question": "Area?", "answer": r"9 \pi"},  # is in MATH
            {"question": "A word.", "answer": r"\frac{1}{"},
            {"question": "Tom owes $5. What has he?", "answer": "-5"},  # is in the test split
            {"question": LONG, "answer": "2023"},
            {"question": LONG, "answer": "2023"},
        ],
    )
    summary = prepare(
        PrepareArguments(
            output_dir=str(tmp_path / "data/all"),
            sources=["math", "dapo-math-17k", mine],
            test_sources=["gsm8k-test"],
            columns=["prompt=question", "solution=answer"],
            template="boxed",
        )
    )
    train, test = summary["train"], summary["test"]
    assert train.read == {"math": 3, "dapo-math-17k": 200, mine: 6}
    assert train.dropped == {"repeated": 200, "unusable gold answer": 2, "evaluation problem": 2}
    assert train.examples["unusable gold answer"][0] == "math/1 unparseable_gold: None"
    assert train.examples["evaluation problem"] == [f"{mine}/0 is aime24/60", f"{mine}/3 is gsm8k-test/0"]
    assert train.compared == {"aime24": 1, "aime25": 2, "aime26": 1, "math-500": 1, "test split": 1}
    assert (test.read, test.dropped) == ({"gsm8k-test": 1}, {"repeated": 0, "unusable gold answer": 0})
    data = load_from_disk(tmp_path / "data/all")
    assert isinstance(data, DatasetDict)
    assert data["train"]["problem"] == [
        *("Let $f$ be even.", "Area?", "What is $1+1$?", "Find $x$ if $x^2=9$ and $x<0$.", LONG)
    ]
    assert data["test"]["problem"] == ["Tom owes $5. What has he?"]
    for split in ("train", "test"):
        lost = sum(summary[split].dropped.values())
        assert summary[split].kept == len(data[split]) == sum(summary[split].read.values()) - lost
    assert data["train"][2]["prompt"] == load_source("dapo-math-17k", template="boxed")[0]["prompt"]
    assert [file.name for file in (tmp_path / "data").iterdir()] == ["all"]

    record = json.loads((tmp_path / "data/all/summary.json").read_text())
    assert record["arguments"]["template"] == "boxed"
    assert record["sources"]["aime26"]["license"] == "CC-BY-NC-SA-4.0"
    assert record["splits"]["train"]["kept"] == 5
    assert f"evaluation problem: 2 ({mine}/0 is aime24/60; " in train.report()
    assert "209 rows read, 5 kept" in train.report()


def test_all_missing_sources_are_named_and_nothing_is_written(cached, tmp_path):
    cached("gsm8k")
    with pytest.raises(SourceUnavailableError) as refused:
        prepare(PrepareArguments(output_dir=str(tmp_path / "out"), sources=["gsm8k", "math"]))
    commands = re.findall("`hf download (.*?) ", str(refused.value))
    assert commands == [
        "HuggingFaceH4/aime_2024",
        "math-ai/aime25",
        "MathArena/aime_2026",
        "HuggingFaceH4/MATH-500",
        "EleutherAI/hendrycks_math",
    ]
    assert len(str(refused.value).splitlines()) == 5
    assert not (tmp_path / "out").exists()


def test_no_comparison_is_made_only_if_none_is_asked_for(cached, tmp_path):
    cached("gsm8k")
    cached("math-500")
    some = {"sources": ["gsm8k"], "decontaminate": ["math-500"]}
    assert prepare(PrepareArguments(str(tmp_path / "a"), **some))["train"].compared == {"math-500": 1}
    summary = prepare(PrepareArguments(str(tmp_path / "b"), **{**some, "decontaminate": ["none"]}))["train"]
    assert summary.compared == {}
    assert "compared with: no evaluation problems" in summary.report()


def test_an_interrupted_run_leaves_nothing_behind(hub, tmp_path, monkeypatch):
    def interrupt(self, directory):
        (Path(directory) / "train").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(DatasetDict, "save_to_disk", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(PrepareArguments(sources=["math", "gsm8k"], output_dir=str(tmp_path / "out/data")))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"template": "bxed"}, "template must be one of dapo, boxed"),
        ({"sources": []}, "sources must name at least one"),
        ({"sources": ["gsm8k", "aime26"]}, "aime26, which is for evaluation only"),
        ({"decontaminate": ["aime27"]}, "'aime27' is neither a file"),
        ({"decontaminate": ["none", "aime24"]}, "'none' is neither a file"),
        ({"sources": ["gsm9k"]}, "'gsm9k' is neither a file nor one of dapo-math-17k, gsm8k"),
        ({"max_prompt_tokens": 5}, "max_prompt_tokens and tokenizer must be set together"),
        ({"tokenizer": "x"}, "max_prompt_tokens and tokenizer must be set together"),
        ({"tokenizer": "x", "max_prompt_tokens": 0}, "max_prompt_tokens must be >= 1; got 0"),
        ({"columns": ["prompt:question"]}, "columns takes KEY=COLUMN"),
        ({"columns": ["prompts=question"]}, "columns maps prompt, solution"),
        ({"output_dir": "."}, "output_dir='.' exists"),
    ],
)
def test_mistakes_are_named_before_anything_is_loaded(tmp_path, fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PrepareArguments(**{"output_dir": str(tmp_path / "out"), "decontaminate": ["none"], **fields})


def test_nothing_left_to_train_on_is_an_error(tmp_path):
    write_rows(tmp_path / "mine.jsonl", [{"prompt": "1+1?", "solution": None}, {"prompt": "2+2?", "solution": ""}])
    with pytest.raises(ValueError, match=r"no row is left to train on.*'unusable gold answer': 2"):
        prepare(
            PrepareArguments(
                output_dir=str(tmp_path / "out"), sources=[str(tmp_path / "mine.jsonl")], decontaminate=["none"]
            )
        )
    assert not (tmp_path / "out").exists()


def run_script(*arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "scripts/prepare_data.py"), run_name="__main__")
    return capsys.readouterr().out


def test_from_the_command_line_to_a_training_run(tmp_path, monkeypatch, capsys):
    model = str(tmp_path / "model")
    tokenizer = arithmetic.tokenizer()  # one token per character
    tokenizer.save_pretrained(model)
    tiny_model().save_pretrained(model)
    Dataset.from_list([*arithmetic.problems(8, 3, 0), *arithmetic.problems(4, 5, 0)]).to_json(tmp_path / "sums.jsonl")
    (tmp_path / "prepare.yaml").write_text(
        f"sources: [{tmp_path}/sums.jsonl]\ndecontaminate: [none]\ntemplate: plain\ntokenizer: {model}\n"
        "max_prompt_tokens: 100\noutput_dir: nowhere\n"
    )
    command = ["--config", tmp_path / "prepare.yaml", "--max_prompt_tokens", "6", "--output_dir", tmp_path / "data"]
    with pytest.raises(SystemExit, match=r"prepare_data\.py: tokenizer .* has no chat template"):
        run_script(*command, monkeypatch=monkeypatch, capsys=capsys)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(model)
    output = run_script(*command, monkeypatch=monkeypatch, capsys=capsys)
    assert "train: 12 rows read, 8 kept" in output
    assert "over 6 tokens: 4 (" in output
    assert f"written to {tmp_path}/data" in output
    with pytest.raises(SystemExit, match=f"output_dir='{tmp_path}/data' exists"):
        run_script(*command, monkeypatch=monkeypatch, capsys=capsys)

    fields = {**SMALL_RUN, "report_to": "none", "model_name_or_path": model, "dataset_name": tmp_path / "data"}
    fields |= {"output_dir": tmp_path / "run", "max_steps": 2, "num_generations": 4, "max_completion_length": 4}
    arguments = [str(word) for name, value in fields.items() for word in (f"--{name}", value)]
    trainer = train(*parse_arguments([*arguments, "--per_device_train_batch_size", "8"]))
    assert trainer.state.global_step == 2


def test_a_missing_configuration_is_named_without_a_traceback(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match=r"prepare_data\.py: .*nowhere\.yaml"):
        run_script("--config", tmp_path / "nowhere.yaml", monkeypatch=monkeypatch, capsys=capsys)


def test_unknown_fields_are_refused(tmp_path):
    (tmp_path / "x.yaml").write_text("output_dir: out\nsource: [gsm8k]\n")
    with pytest.raises(ValueError, match="source"):
        TrlParser(PrepareArguments).parse_args_and_config(["--config", str(tmp_path / "x.yaml")])
