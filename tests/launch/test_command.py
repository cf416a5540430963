import runpy
import sys
from dataclasses import dataclass

import pytest

from cppo_trl.config import CPPOConfig
from cppo_trl.launch.command import one_line_errors
from cppo_trl.launch.parsing import parse
from cppo_trl.output.checkpoints import checkpoint_to_resume, saving
from tests.conftest import RECIPE, ROOT


@dataclass
class Fields:
    size: int = 1
    name: str = "x"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "--config: cannot read .*FILE.yaml .No such file"),
        ("size: [1", "--config: not valid YAML: .*line 1"),
        ("- 1", "must contain a YAML mapping"),
        ("size: big", "argument --size: invalid int value: 'big'"),
        ("szie: 2", "Unknown field: szie. Did you mean size"),
    ],
)
def test_a_wrong_recipe_is_refused_in_one_line(text, message, tmp_path):
    path = tmp_path / "FILE.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message) as refused:
        parse((Fields,), ["--config", str(path)])
    assert "\n" not in str(refused.value)
    assert "usage" not in str(refused.value)


def test_the_command_line_takes_precedence_and_its_typos_are_named(tmp_path):
    (tmp_path / "FILE.yaml").write_text("size: 2\n")
    assert parse((Fields,), ["--config", str(tmp_path / "FILE.yaml"), "--name", "y"]) == (Fields(2, "y"),)
    assert parse((Fields,), ["--config", str(tmp_path / "FILE.yaml"), "--size", "3"]) == (Fields(3),)
    with pytest.raises(ValueError, match=r"Unknown field: nmae\. Did you mean name"):
        parse((Fields,), ["--nmae", "y"])


def fail_to_save():
    with saving("."):
        raise OSError("disk full")


@pytest.mark.parametrize(
    ("refuse", "message"),
    [
        (lambda: CPPOConfig("x", cppo_w_min=2), "cppo_w_min must be"),
        (lambda: checkpoint_to_resume("x", "nowhere", True), "'nowhere' does not exist"),
        (fail_to_save, "disk full"),
    ],
)
def test_errors_on_purpose_end_a_script_in_one_line(refuse, message):
    with pytest.raises(SystemExit, match=message), one_line_errors(""):
        refuse()


def reward_with_a_bug():
    raise ValueError("of a user's reward")


@pytest.mark.parametrize(
    ("bug", "kind"),
    [
        (reward_with_a_bug, ValueError),
        (lambda: checkpoint_to_resume(None, None, True), TypeError),  # a call within the package goes wrong
        (lambda: parse((int,), []), TypeError),
    ],
)
def test_unexpected_errors_keep_their_traceback(bug, kind):
    with pytest.raises(kind), one_line_errors(""):
        bug()


def test_an_interruption_says_how_to_go_on(capsys):
    with pytest.raises(SystemExit) as ended, one_line_errors("Repeat the command."):
        raise KeyboardInterrupt
    assert ended.value.code == 130
    assert capsys.readouterr().err.endswith("interrupted. Repeat the command.\n")


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("train.py", ["--config", "nowhere.yaml"], "cannot read nowhere.yaml"),
        ("train.py", ["--config", RECIPE, "--trust_region", "ppo"], "Did you mean 'dppo'"),
        ("train.py", ["--config", RECIPE, "--max_steps", "many"], "invalid int value: 'many'"),
        ("train.py", ["--config", RECIPE, "--reward_funcs", "nowhere.reward"], "cannot import 'nowhere.reward'"),
        ("train.py", ["--config", RECIPE, "--resume_from_checkpoint", "nowhere"], "'nowhere' does not exist"),
        ("evaluate.py", ["--samples", "many"], "invalid int value: 'many'"),
        ("evaluate.py", [], "model must name a model"),
        ("prepare_data.py", ["--sources", "nowhere", "--output_dir", "x"], "nowhere"),
        ("quickstart.py", ["--config", "nowhere.yaml"], "cannot read nowhere.yaml"),
    ],
)
def test_scripts_report_mistakes_in_one_line(script, arguments, message, tmp_path, monkeypatch):
    if script == "train.py":
        arguments = [*arguments, "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr("datasets.disable_progress_bars", lambda: None)
    monkeypatch.setattr("transformers.utils.logging.disable_progress_bar", lambda: None)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
    (line,) = str(ended.value.code).strip().splitlines()
    assert line.startswith(f"{script}: ")
    assert message in line
