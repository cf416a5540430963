"""`cppo_trl.fields`: each field is described once, in its dataclass's docstring."""

from dataclasses import fields

import pytest
from trl import GRPOConfig, TrlParser

from cppo_trl import CPPOConfig
from cppo_trl.data.prepare import PrepareArguments
from cppo_trl.evaluation.command import EvaluationArguments
from cppo_trl.launch.training import CPPOScriptArguments


def test_a_parser_of_trl_shows_what_the_docstring_says_of_a_field():
    helps = {action.dest: action.help for action in TrlParser((CPPOConfig,))._actions}
    assert helps["cppo_w_min"] == "weight of the last token in (0, 1]; 1 switches the position weight off."
    assert helps["cppo_topk"].startswith("K of the Top-K estimators, 1 to the vocabulary; 20 in the paper, and ")
    assert helps["loss_type"] == "sum over tokens divided by a constant, the authors' seq-mean-token-sum-norm."
    assert helps["beta"] == {f.name: f for f in fields(GRPOConfig)}["beta"].metadata["help"]


@pytest.mark.parametrize("kind", [CPPOConfig, CPPOScriptArguments, PrepareArguments, EvaluationArguments])
def test_every_field_is_described(kind):
    assert [f.name for f in fields(kind) if not f.metadata.get("help")] == []
