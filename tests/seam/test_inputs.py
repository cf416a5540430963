"""What users hand to a trainer; their mistakes on the command line are in tests/launch/test_mistakes.py."""

import warnings
from types import SimpleNamespace

import datasets
import pytest
import torch
from peft import LoraConfig

from cppo_trl import CPPOConfig
from cppo_trl.seam.inputs import check_model, checked, missing_packages, require_columns
from tests.conftest import (
    digit_reward,
    tiny_data,
    tiny_model,
)


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


@pytest.mark.parametrize(
    ("data", "reward", "message"),
    [
        (tiny_data(16).select([]), digit_reward, "has 0 rows"),
        (tiny_data(16).remove_columns("solution"), lambda completions, solution: [], "reads the column 'solution'"),
        (tiny_data(16), [digit_reward, 3], "reward_funcs: 3 is not callable"),
        (datasets.Dataset.from_dict({"prompt": [["1+1="]] * 16}), digit_reward, "must hold a text, or messages"),
    ],
)
def test_wrong_data_from_python(data, reward, message, make_trainer):
    with pytest.raises(ValueError, match=message):
        make_trainer(data=data, reward=reward)


def test_missing_packages_from_python(make_trainer, monkeypatch):
    monkeypatch.setattr("cppo_trl.seam.inputs.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="vllm is not installed here"):
        make_trainer(use_vllm=True)


def test_rewards_may_be_tensors_and_arrays(make_trainer):
    make_trainer(reward=lambda completions, **kwargs: torch.ones(len(completions)), max_steps=1).train()


def test_attention_dropout_is_named(make_trainer):
    with pytest.warns(UserWarning, match="attention_dropout=0.3"):
        make_trainer(model=tiny_model(attention_dropout=0.3))


def test_models_and_coroutines_are_handed_on_as_rewards():
    async def reward(completions, **kwargs):
        raise AssertionError

    class Coroutine:
        async def __call__(self, completions, **kwargs):
            raise AssertionError

    model = tiny_model()
    rewards = [model, reward, Coroutine(), "org/reward-model"]
    for given, wrapped in zip(rewards[:3], checked(rewards), strict=False):
        assert given is wrapped
    assert checked(rewards)[3] == "org/reward-model"
    assert checked([digit_reward])[0] is not digit_reward


def test_the_head_is_looked_up_as_the_model_is_loaded(make_trainer, monkeypatch):
    seen = []

    def found(name, **kwargs):
        seen.append((name, kwargs))
        return tiny_model(tie_word_embeddings=True).config

    monkeypatch.setattr("cppo_trl.seam.inputs.AutoConfig.from_pretrained", found)
    fields = {"cast_lm_head_to_fp32": True, "model_init_kwargs": {"revision": "main", "trust_remote_code": True}}
    with pytest.raises(ValueError, match="cast_lm_head_to_fp32=True with a peft_config"):
        make_trainer(model="org/model", trainer={"peft_config": LoraConfig(target_modules=["q_proj"])}, **fields)
    assert seen == [("org/model", {"revision": "main", "trust_remote_code": True})]
