"""The model card."""

from huggingface_hub import ModelCard
from transformers import TrainerCallback

from cppo_trl.output.run_files import command_line
from tests.conftest import tiny_data
from tests.output.conftest import section


def test_model_card_names_the_method_and_its_numbers(make_trainer, tmp_path):
    class Evaluated(TrainerCallback):
        def card_sections(self):
            return {"Evaluation": "| before | after |\n|---|---|\n| 0.1 | 0.9 |"}

    trainer = make_trainer(trainer={"callbacks": [Evaluated()]})
    trainer.create_model_card(model_name="tiny")
    card = (tmp_path / "README.md").read_text()
    assert "https://huggingface.co/papers/2606.10968" in card
    assert "delta 0.15, w_min 0.8, delta_b 0.02" in card
    assert "| 0.1 | 0.9 |" in card
    assert "huggingface.co/None" not in card
    example = card.split("```python")[1].split("```")[0]
    trainer.save_model()
    printed = []
    exec(example.replace(', device_map="auto"', ""), {"print": printed.append})  # the card's example runs
    assert len(printed) == 1
    assert {"trl", "cppo"} <= set(trainer.model.model_tags)


def test_model_card_of_a_baseline_does_not_claim_cppo(make_trainer, tmp_path):
    make_trainer(trust_region="dppo").create_model_card(model_name="tiny")
    card = (tmp_path / "README.md").read_text()
    assert "trained with DPPO." in card
    assert "2606.10968" not in card
    assert "dppo, binary_tv, delta 0.15" in card


def test_hub_names_become_links_and_tokens_are_left_out(make_trainer, tmp_path):
    data = tiny_data()
    data.info.dataset_name = "org/data, word-problems"
    trainer = make_trainer(data=data)
    trainer.model.config._name_or_path = "org/base"
    trainer.create_model_card(dataset_name="org/data")
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.base_model, card.data.datasets) == ("org/base", "org/data")
    assert "[org/base](https://huggingface.co/org/base)" in section(card, "Run")
    assert "[org/data](https://huggingface.co/datasets/org/data), `word-problems`" in section(card, "Training data")
    assert "a fine-tuned version of [org/base]" in card.text
    words = command_line(["train.py", "--hub_token", "hf_a", "--push_to_hub_token=hf_b", "--seed", "1"])
    assert words.endswith("train.py --hub_token *** --push_to_hub_token=*** --seed 1")


def test_the_card_carries_the_license_of_the_base_model_where_it_is_known(make_trainer, tmp_path):
    def license_with(base):
        trainer = make_trainer(output_dir=str(tmp_path / "out"))
        trainer.model.config._name_or_path = str(base)
        trainer.save_model()
        trainer.create_model_card()
        return ModelCard.load(tmp_path / "out/README.md").data.license

    (tmp_path / "base").mkdir()
    assert license_with(tmp_path / "base") is None
    (tmp_path / "base/README.md").write_text("---\nlicense: gemma\n---\n# A model\n")
    assert license_with(tmp_path / "base") == "gemma"
    assert license_with("org/base") is None  # no network here
