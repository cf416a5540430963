"""What users hand to a trainer; their mistakes on the command line are in tests/launch/test_mistakes.py."""

import warnings
from types import SimpleNamespace

import datasets
import pytest
from peft import LoraConfig

from cppo_trl import CPPOConfig
from cppo_trl.seam.inputs import check_model, missing_packages, require_columns
from tests.conftest import digit_reward, tiny_data, tiny_model


@pytest.mark.parametrize(
    ("dropout", "disable", "warned"),
    [
        ({"attention_dropout": 0.3}, True, True),
        ({"attention_dropout": 0.3}, False, False),
        ({"attention_dropout": 0.0}, True, False),
        ({}, True, False),
    ],
)
def test_dropout_that_stays_on_is_named_and_no_other(dropout, disable, warned):
    text = SimpleNamespace(vocab_size=23, **dropout)
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = CPPOConfig("out", use_cpu=True, bf16=False, disable_dropout=disable)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_model(config, model)
    assert [str(w.message).startswith("attention_dropout=0.3") for w in caught] == [True] * warned


def test_a_tied_head_in_fp32_with_an_adapter_is_refused(make_trainer, tmp_path):
    fields = {"cast_lm_head_to_fp32": True, "trainer": {"peft_config": LoraConfig(target_modules=["q_proj"])}}
    tied = tiny_model(tie_word_embeddings=True)
    tied.save_pretrained(tmp_path / "tied")
    for model in (tied, str(tmp_path / "tied")):
        with pytest.raises(ValueError, match="cast_lm_head_to_fp32=True with a peft_config"):
            make_trainer(model=model, **fields)


def test_what_is_lacking_is_listed(make_trainer):
    def reward(completions, answer, unit, **kwargs):
        raise AssertionError

    class Needs:
        def __call__(self, completions, unit):
            raise AssertionError

    with pytest.raises(ValueError, match=r"reward reads the column 'answer', 'unit'; the dataset has \['prompt', "):
        make_trainer(reward=reward)
    with pytest.raises(ValueError, match="Needs reads the column 'unit'"):
        make_trainer(reward=[digit_reward, Needs()])
    with pytest.raises(ValueError, match="has 1 rows and a rollout takes 4 prompts: add data, or lower"):
        make_trainer(data=tiny_data(1))


def test_what_is_not_installed_is_named_with_its_extra(monkeypatch, tmp_path):
    absent = {"vllm", "deepspeed"}
    monkeypatch.setattr("cppo_trl.seam.inputs.find_spec", lambda name: None if name in absent else name)
    config = CPPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    assert missing_packages(config, "fsdp2") == []
    (message,) = missing_packages(config, "zero3")
    assert message.startswith("deepspeed is not installed here: pip install 'cppo-trl[deepspeed]', or ")
    (message,) = missing_packages(SimpleNamespace(report_to=[]))  # as an asynchronous run's
    assert message == "vllm is not installed here: pip install 'cppo-trl[vllm]', or set asynchronous to false."
    absent.clear()
    assert missing_packages(config, "zero3") == missing_packages(SimpleNamespace(report_to=[])) == []


def test_the_first_prompt_shows_the_form_of_all():
    with pytest.raises(ValueError, match="must hold a text, or messages; got"):
        require_columns(datasets.Dataset.from_dict({"prompt": [["1+1="]]}), digit_reward)
    require_columns(datasets.Dataset.from_dict({"prompt": ["1+1="]}), digit_reward)
