import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, load_from_disk
from trl import TrlParser

from cppo_trl.data import arithmetic, filters
from cppo_trl.data.prepare import PrepareArguments, prepare
from cppo_trl.data.sources import SourceUnavailableError, load_source
from cppo_trl.launch.training import parse_arguments, train
from cppo_trl.rewards import AccuracyReward
from tests.conftest import SMALL_RUN, tiny_model
from tests.data.conftest import local_copy, write_rows

ROOT = Path(__file__).parents[2]
LONG = "Find the number of ordered pairs of positive integers whose sum is 2024."


def counts(summary):
    return {row.source: (row.read, row.dropped, row.kept) for row in summary.rows}


def test_every_drop_is_counted_and_the_rest_is_written(hub, tmp_path):
    write_rows(
        tmp_path / "mine.jsonl",
        [
            {"question": "Made up for 2024!", "answer": "73"},  # is in AIME 2024
            {"question": "Area?", "answer": r"9 \pi"},  # is in MATH, with an equal gold
            {"question": "Let $f$ be even.", "answer": "3"},  # is in MATH, with another gold
            {"question": "A word.", "answer": r"\frac{1}{"},
            {"question": "Tom owes $5. What has he?", "answer": "-5"},  # is in the test split
            {"question": LONG, "answer": "2023"},
            {"question": LONG, "answer": "2023"},
        ],
    )
    summary = prepare(
        PrepareArguments(
            output_dir=str(tmp_path / "data/all"),
            sources=["math", "dapo-math-17k", str(tmp_path / "mine.jsonl")],
            test_sources=["gsm8k-test"],
            columns=["prompt=question", "solution=answer"],
            template="boxed",
        )
    )
    train_reasons = ("repeated", "unusable gold", "conflicting golds", "evaluation problem")
    assert counts(summary) == {
        "math": (3, dict(zip(train_reasons, (0, 1, 1, 0), strict=True)), 1),
        "dapo-math-17k": (200, dict(zip(train_reasons, (198, 0, 0, 0), strict=True)), 2),
        str(tmp_path / "mine.jsonl"): (7, dict(zip(train_reasons, (2, 1, 1, 2), strict=True)), 1),
        "gsm8k-test": (1, dict.fromkeys(train_reasons[:3], 0), 1),
    }
    assert all(row.read - sum(row.dropped.values()) == row.kept for row in summary.rows)
    assert summary.compared == {"aime24": 1, "aime25": 2, "aime26": 1, "math-500": 1, "gsm8k-test": 1}
    data = load_from_disk(tmp_path / "data/all")
    assert isinstance(data, DatasetDict)
    assert data["train"]["problem"] == ["Area?", "What is $1+1$?", "Find $x$ if $x^2=9$ and $x<0$.", LONG]
    assert data["test"]["problem"] == ["Tom owes $5. What has he?"]
    assert data["train"][1]["prompt"] == load_source("dapo-math-17k", template="boxed")[0]["prompt"]
    assert [file.name for file in (tmp_path / "data").iterdir()] == ["all"]

    record = json.loads((tmp_path / "data/all/summary.json").read_text())
    assert record["arguments"]["template"] == "boxed"
    assert record["sources"]["aime26"]["licence"] == "CC-BY-NC-SA-4.0"
    assert [row["kept"] for row in record["rows"]] == [1, 2, 1, 1]
    report = summary.report()
    assert "| train | dapo-math-17k | 200 | 198 | 0 | 0 | 0 | 2 |" in report
    assert "| test | gsm8k-test | 1 | 0 | 0 | 0 | – | 1 |" in report
    assert "evaluation problem: " in report
    assert f"{tmp_path / 'mine.jsonl'}/0 is aime24/60" in report
    assert "conflicting golds: math/0 3, but" in report


def test_missing_evaluation_sets_are_never_passed_over(tmp_path):
    local = f"gsm8k={local_copy('gsm8k', tmp_path / 'gsm8k')}"
    with pytest.raises(SourceUnavailableError) as refused:
        prepare(PrepareArguments(output_dir=str(tmp_path / "out"), sources=[local, "math"]))
    for repository in (
        "HuggingFaceH4/aime_2024",
        "math-ai/aime25",
        "MathArena/aime_2026",
        "HuggingFaceH4/MATH-500",
        "EleutherAI/hendrycks_math",
    ):
        assert f"hf download {repository} " in str(refused.value)
    assert "--decontaminate none" in str(refused.value)
    assert not (tmp_path / "out").exists()
    some = f"math-500={local_copy('math-500', tmp_path / 'math-500')}"
    summary = prepare(PrepareArguments(output_dir=str(tmp_path / "out"), sources=[local], decontaminate=[some]))
    assert summary.compared == {some: 1}
    summary = prepare(PrepareArguments(output_dir=str(tmp_path / "no"), sources=[local], decontaminate=["none"]))
    assert summary.compared == {}
    assert "compared with: nothing; it may hold evaluation problems" in summary.report()


def test_an_interrupted_run_leaves_nothing_half_done_and_repeats_nothing(hub, tmp_path, monkeypatch):
    arguments = {"sources": ["math", "gsm8k"], "output_dir": str(tmp_path / "out/data")}

    def interrupt(self, directory):
        (Path(directory) / "train").mkdir(parents=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(DatasetDict, "save_to_disk", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(PrepareArguments(**arguments))
    assert list((tmp_path / "out").iterdir()) == []

    graded = []
    grade = AccuracyReward.grade

    def count(self, completions, *rest):
        graded.extend(completions)
        return grade(self, completions, *rest)

    monkeypatch.setattr(AccuracyReward, "grade", count)
    prepare(PrepareArguments(**arguments))
    assert graded == []  # all golds were in the cache
    monkeypatch.setattr(filters, "CODE", "of another version")
    prepare(PrepareArguments(**{**arguments, "output_dir": str(tmp_path / "other"), "sources": ["gsm8k"]}))
    assert graded == [r"\boxed{1200}"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"template": "bxed"}, "template must be one of dapo, boxed"),
        ({"sources": []}, "sources must name at least one"),
        ({"sources": ["gsm8k"], "test_sources": ["gsm8k"]}, "name gsm8k twice"),
        ({"sources": ["gsm8k=a", "gsm8k=b"]}, "name gsm8k twice"),
        ({"sources": ["aime26=x.parquet"]}, "aime26, which is for evaluation only"),
        ({"decontaminate": ["aime27"]}, "'aime27' is neither a file"),
        ({"sources": ["gsm9k"]}, "'gsm9k' is neither a file nor one of dapo-math-17k, gsm8k"),
        ({"max_prompt_tokens": 5}, "max_prompt_tokens and tokenizer go together"),
        ({"tokenizer": "x"}, "max_prompt_tokens and tokenizer go together"),
        ({"tokenizer": "x", "max_prompt_tokens": 0}, "max_prompt_tokens must be at least 1"),
        ({"decontaminate": []}, "decontaminate must name evaluation sources, or be none"),
        ({"decontaminate": ["none", "aime24"]}, "decontaminate must name evaluation sources, or be none"),
        ({"columns": ["prompt:question"]}, "columns takes KEY=COLUMN"),
        ({"columns": ["prompts=question"]}, "columns maps prompt, solution"),
        ({"output_dir": "."}, "output_dir='.' exists"),
    ],
)
def test_mistakes_are_named_before_anything_is_loaded(tmp_path, fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        prepare(PrepareArguments(**{"output_dir": str(tmp_path / "out"), "decontaminate": ["none"], **fields}))


def test_nothing_left_is_an_error(tmp_path):
    write_rows(tmp_path / "mine.jsonl", [{"prompt": "1+1?", "solution": None}, {"prompt": "2+2?", "solution": ""}])
    with pytest.raises(ValueError, match="no row is left to train on"):
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
    tokenizer = arithmetic.tokenizer()  # a token for a character
    tokenizer.save_pretrained(model)
    tiny_model().save_pretrained(model)
    Dataset.from_list([*arithmetic.problems(8, 3, 0), *arithmetic.problems(4, 5, 0)]).to_json(tmp_path / "sums.jsonl")
    (tmp_path / "prepare.yaml").write_text(
        f"sources: [{tmp_path}/sums.jsonl]\ndecontaminate: [none]\ntemplate: plain\ntokenizer: {model}\n"
        "max_prompt_tokens: 100\noutput_dir: nowhere\n"
    )
    command = ["--config", tmp_path / "prepare.yaml", "--max_prompt_tokens", "6", "--output_dir", tmp_path / "data"]
    with pytest.raises(SystemExit, match="has no chat template"):
        run_script(*command, monkeypatch=monkeypatch, capsys=capsys)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(model)
    output = run_script(*command, monkeypatch=monkeypatch, capsys=capsys)
    assert f"| train | {tmp_path}/sums.jsonl | 12 | 0 | 0 | 0 | 4 | 8 |" in output
    assert f"{tmp_path}/data: written after" in output
    with pytest.raises(SystemExit, match=f"output_dir='{tmp_path}/data' exists"):
        run_script(*command, monkeypatch=monkeypatch, capsys=capsys)

    fields = {**SMALL_RUN, "report_to": "none", "model_name_or_path": model, "dataset_name": tmp_path / "data"}
    fields |= {"output_dir": tmp_path / "run", "max_steps": 2, "num_generations": 4, "max_completion_length": 4}
    arguments = [str(word) for name, value in fields.items() for word in (f"--{name}", value)]
    trainer = train(*parse_arguments([*arguments, "--per_device_train_batch_size", "8"]))
    assert trainer.state.global_step == 2


def test_unknown_fields_are_refused(tmp_path):
    (tmp_path / "x.yaml").write_text("output_dir: out\nsource: [gsm8k]\n")
    with pytest.raises(ValueError, match="source"):
        TrlParser(PrepareArguments).parse_args_and_config(["--config", str(tmp_path / "x.yaml")])


GSM8K = ROOT / "../shared/data/gsm8k"


@pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K is not here")
def test_gsm8k_itself(tmp_path):
    summary = prepare(
        PrepareArguments(
            output_dir=str(tmp_path / "data"),
            sources=[f"gsm8k={GSM8K}/train.jsonl"],
            test_sources=[f"gsm8k-test={GSM8K}/test.jsonl"],
            decontaminate=["none"],
        )
    )
    assert [(row.source, row.read, row.kept) for row in summary.rows] == [
        ("gsm8k", 7473, 7473),
        ("gsm8k-test", 1319, 1319),
    ]
    assert list(summary.compared.values()) == [1319]
