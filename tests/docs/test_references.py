"""What the documents list is what the code has: fields, metrics, files, messages."""

import ast
import os
import re
import runpy
from pathlib import Path
from unittest import mock

import torch
import transformers.hf_argparser
import transformers.training_args
import trl.scripts.utils
import trl.trainer.grpo_config

import cppo_trl
from cppo_trl.evaluation.metrics import Record, benchmark_metrics
from cppo_trl.metrics import loss_record, position_profile, summarize
from cppo_trl.output.tokens import token_records, token_table
from cppo_trl.rewards import math
from cppo_trl.rules import RULES
from tests.conftest import parameters_of

ROOT = Path(__file__).parents[2]
OTHERS = (trl.trainer.grpo_config, trl.scripts.utils, transformers.training_args, transformers.hf_argparser)


def section(page, title):
    """The text below a heading, up to the next of its rank."""
    text = (ROOT / "docs" / page).read_text()
    rank = re.search(rf"^(#+) {re.escape(title)}$", text, re.MULTILINE)[1]
    return re.split(rf"^#{{1,{len(rank)}}} ", text.partition(f"\n{rank} {title}\n")[2], flags=re.MULTILINE)[0]


def first_column(text):
    """The code in the first column of the tables, in order."""
    rows = re.findall(r"^\| (.*?) \|", text.replace(r"\|", "¦"), re.MULTILINE)
    return [name for row in rows for name in re.findall("`([^`]+)`", row)]


def test_the_configuration_reference_is_what_its_script_writes():
    with mock.patch.dict(os.environ):  # scripts/compare.py sets some of it
        written = runpy.run_path(str(ROOT / "scripts/write_reference.py"))["reference"]()
    assert (ROOT / "docs/configuration.md").read_text() == written, "make reference"


def rows():
    """A response of two tokens, with all that a rule reads."""
    tokens = torch.full((1, 2), 0.1)
    return tokens, torch.ones(1, 1), tokens, torch.ones(1, 2)


def test_trust_region_metrics():
    verdict = RULES["cppo"].judge(*rows(), **parameters_of("cppo"))
    record = loss_record(*rows(), verdict)
    everything = summarize([1.0] * len(record), theorem_unit=1.0)
    assert sorted(first_column(section("metrics.md", "The trust region"))) == sorted(everything)
    assert first_column(section("metrics.md", "trust_region.jsonl")) == ["step", *position_profile(record.tolist())]
    batch = {"completion_ids": torch.ones(1, 2), "prompt_ids": torch.ones(1, 2), "prompt_mask": torch.ones(1, 2)}
    table = token_table(batch, *rows(), verdict)
    (written,) = token_records(table, lambda ids: [""] * len(ids))
    assert sorted(first_column(section("metrics.md", "trust_region_tokens.jsonl"))) == sorted(["step", *written])


def test_metrics_of_rewards_and_evaluation():
    assert sorted(first_column(section("metrics.md", "Rewards"))) == sorted(math._METRICS)
    records = [
        Record("b", name, "1", ["1", "2"], [1, 1], [False, False], ["1", "2"], [0, 1], [1.0, 0.0]) for name in "ab"
    ]
    logged = {re.sub(r"pass@\d+", "pass@k", re.sub(r"(avg|maj)@\d+", r"\1@n", x)) for x in benchmark_metrics(records)}
    assert set(first_column(section("metrics.md", "Evaluation"))) == logged


def messages(path):
    """The texts of a module: each string, with ... for what is put in."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_quoted_messages_are_the_programs():
    paths = [*Path(cppo_trl.__file__).parent.rglob("*.py"), *(Path(module.__file__) for module in OTHERS)]
    known = [text for path in paths for text in messages(path)]
    quoted = [text for text in first_column((ROOT / "docs/troubleshooting.md").read_text()) if " " in text]
    assert len(quoted) > 60
    for text in quoted:
        pattern = re.compile(".*".join(map(re.escape, text.split("..."))), re.DOTALL)
        assert any(map(pattern.search, known)), f"nothing says {text!r}"
