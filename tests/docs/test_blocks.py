"""Every code block of README.md, docs/ and the recipes' READMEs: programs run, commands parse, recipes load."""

import ast
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM

from cppo_trl.launch.training import ARGUMENT_TYPES
from tests.conftest import digit_reward
from tests.docs.blocks import KINDS, PAGES, ROOT, blocks, check_command, commands
from tests.docs.conftest import SMALL

FIELDS = {name for kind in ARGUMENT_TYPES for name in kind.__dataclass_fields__}


def run_program(text, name, names):
    """Run a program; where the comment behind an expression is a value, the expression has that value."""
    lines, body = text.splitlines(), ast.parse(text).body
    for node in body:
        comment = lines[node.end_lineno - 1].rpartition("  # ")[2]
        if isinstance(node, ast.Expr) and comment.startswith("["):
            expression = compile(ast.Expression(node.value), name, "eval")
            assert eval(expression, names) == ast.literal_eval(comment), f"{name}: {lines[node.end_lineno - 1]}"
        else:
            exec(compile(ast.Module([node], []), name, "exec"), names)


def given(page, make_trainer):
    """What a page's programs take for granted."""
    return {"trainer": make_trainer(max_steps=1)} if page.name == "evaluation.md" else {}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks(page, trained, make_trainer):
    names = {"__name__": "page", **given(page, make_trainer)}
    before = set(sys.modules)
    for block in blocks(page.read_text()):
        where = f"{page.relative_to(ROOT)}, line {block.line}"
        assert block.kind in KINDS, f"{where}: nobody knows a block of the kind {block.kind!r}"
        first, _, _ = block.text.partition("\n")
        if block.kind in ("python", "yaml") and first.removeprefix("# ").endswith((".py", ".yaml")):
            Path(first.removeprefix("# ")).write_text(block.text)  # a file of the reader's
        if block.kind == "python":
            run_program(block.text, where, names)
        elif block.kind == "yaml":
            assert set(yaml.safe_load(block.text)) <= FIELDS, where
        elif block.kind in ("bash", "console"):
            for words in commands(block):
                try:
                    check_command(words)
                except (Exception, SystemExit) as error:
                    raise AssertionError(f"{where}: {' '.join(words)}: {error}") from error
    for name in set(sys.modules) - before:
        if name.startswith("my_"):
            del sys.modules[name]


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("python scripts/train.py --config configs/quickstart/cppo.yaml --cppo_detla 1", "cppo_detla"),
        ("python scripts/train.py --config configs/quickstart/gone.yaml", "there is no configs/quickstart/gone.yaml"),
        ("cppo-trl train --config qwen3-1.7b/one-gpu --num_proceses 2", "num_proceses"),
        ("cppo-trl plan --config qwen3-1.7b/two-gpus", "cannot read qwen3-1.7b/two-gpus"),
        ("cppo-trl evaluate --model x --tempature 1", "tempature"),
        ("python scripts/evaluate.py --model x --tempature 1", "tempature"),
        ("accelerate launch --config_file configs/accelerate/ddp.yaml --cpus scripts/train.py", "unrecognized|2"),
        ("make quickstrat", "quickstrat"),
        ("pip install 'cppo-trl[extra]'", "no extra"),
        ("hf download a/b --repotype dataset", "--repotype"),
        ("frobnicate --all", "nobody knows the command 'frobnicate'"),
    ],
)
def test_a_wrong_command_fails(command, error, desk):
    with pytest.raises((Exception, SystemExit), match=error):
        check_command(commands(blocks(f"```bash\n{command}\n```")[0])[0])


def test_the_readme_example_moves_the_policy(trained, tiny_directory, monkeypatch):
    """The mean D_t reaches a tenth of the budget within ten updates; at TRL's learning rate, a thousandth."""
    config = AutoConfig.from_pretrained(tiny_directory, hidden_size=128)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(snapshot_download("Qwen/Qwen3-0.6B"))

    def digits(completions, **kwargs):  # a random model earns no other reward
        return digit_reward([completion[0]["content"] for completion in completions])

    monkeypatch.setattr("cppo_trl.rewards.accuracy_reward", digits)
    monkeypatch.setitem(SMALL, "max_steps", 10)
    monkeypatch.setitem(SMALL, "lr_scheduler_type", "constant")  # as it is over the first ten of many
    example = next(block for block in blocks((ROOT / "README.md").read_text()) if block.kind == "python")
    names = {}
    exec(example.text, names)
    trainer = names["trainer"]
    divergences = [log["cppo/divergence/mean"] for log in trainer.state.log_history if "cppo/masked" in log]
    assert len(divergences) == 10
    assert max(divergences) >= trainer.args.cppo_delta_b / 10
