"""What the documents list is what the code has: fields, metrics, files, messages."""

import ast
import json
import re
import runpy
from pathlib import Path

import transformers.hf_argparser
import transformers.training_args
import trl.scripts.utils
import trl.trainer.grpo_config

import cppo_trl
from cppo_trl.evaluation.metrics import Record, benchmark_metrics
from cppo_trl.rewards import math

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


def test_the_generated_pages_are_what_their_script_writes():
    written = runpy.run_path(str(ROOT / "scripts/write_reference.py"))["reference"]()
    assert {name: (ROOT / "docs" / name).read_text() for name in written} == written, "make reference"


def test_the_metrics_listed_are_those_of_training(make_trainer, tmp_path):
    logged = set()
    for fields in ({"cppo_divergence": "topk_tv", "cppo_topk": 5, "log_tokens_steps": 1}, {"trust_region": "minpro"}):
        trainer = make_trainer(output_dir=str(tmp_path / fields.get("trust_region", "cppo")), max_steps=2, **fields)
        trainer.train()
        logged |= {name for log in trainer.state.log_history for name in log if name.startswith("cppo/")}
    in_no_healthy_run = {"cppo/nonfinite_losses"}
    assert set(first_column(section("metrics.md", "The trust region"))) == logged | in_no_healthy_run
    for file in ("trust_region.jsonl", "trust_region_tokens.jsonl"):
        line = json.loads((tmp_path / "cppo" / file).read_text().splitlines()[0])
        assert sorted(first_column(section("metrics.md", file))) == sorted(line)


def test_metrics_of_rewards_and_evaluation():
    assert sorted(first_column(section("metrics.md", "Rewards"))) == sorted(math._METRICS)
    records = [
        Record("b", name, "1", ["1", "2"], [1, 1], [False, False], ["1", "2"], [0, 1], [1.0, 0.0]) for name in "ab"
    ]
    logged = {re.sub(r"pass@\d+", "pass@k", re.sub(r"(avg|maj)@\d+", r"\1@n", x)) for x in benchmark_metrics(records)}
    assert set(first_column(section("evaluation.md", "The numbers"))) == logged


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
    assert len(quoted) > 5
    for text in quoted:
        pattern = re.compile(".*".join(map(re.escape, text.split("..."))), re.DOTALL)
        assert any(map(pattern.search, known)), f"nothing says {text!r}"
