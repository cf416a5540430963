"""Recipes and command lines into dataclasses."""

from dataclasses import dataclass

import pytest

from cppo_trl.launch.command import main
from cppo_trl.launch.parsing import parse


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


def test_help_shows_our_fields_and_those_of_trl_behind_a_flag(capsys):
    shown = {}
    for flag in ("--help", "--help_all"):
        with pytest.raises(SystemExit):
            main(["train", flag])
        shown[flag] = capsys.readouterr().out
    assert "--cppo_delta_b" in shown["--help"]
    assert "--log_tokens_steps" in shown["--help"]
    assert "--vllm_mode" not in shown["--help"]
    assert shown["--help_all"].index("--cppo_delta") < shown["--help_all"].index("--vllm_mode")
