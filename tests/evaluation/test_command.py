"""A whole evaluation from its arguments: what it loads, compares and refuses."""

import runpy
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from cppo_trl.evaluation.command import EvaluationArguments, evaluate_command
from tests.evaluation.conftest import arguments, lines, results, save_model

ROOT = Path(__file__).parents[2]


def test_an_adapter_is_loaded_with_its_base(here):
    base = AutoModelForCausalLM.from_pretrained("model")
    torch.manual_seed(0)
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, r=4, lora_alpha=64))
    adapted.peft_config["default"].base_model_name_or_path = "model"
    adapted.save_pretrained("adapter")  # without a tokenizer: the base's is taken
    save_model(adapted.merge_and_unload(), "merged")
    for model in ("model", "adapter", "merged"):
        evaluate_command(arguments(model=model, output_dir=f"out-{model}", temperature=0.0, samples=1))
    texts = {m: [r["completions"] for r in lines(f"out-{m}")] for m in ("model", "adapter", "merged")}
    assert texts["adapter"] == texts["merged"] != texts["model"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": ""}, "model must name"),
        ({"benchmarks": ["aime23"]}, "'aime23' is none of"),
        ({"backend": "sglang"}, "backend must be one of"),
        ({"dtype": "int4"}, "dtype must be one of"),
        ({"samples": 0}, "samples must be >= 1"),
        ({"batch_size": 0}, "batch_size must be >= 1"),
        ({"chat_template_kwargs": "{enable"}, "chat_template_kwargs must be a JSON object"),
        ({"backend": "transformers", "vllm_kwargs": '{"seed": 1}'}, "vllm_kwargs is set, but"),
        ({"model": "nobody/nothing"}, "`hf download nobody/nothing --local-dir DIRECTORY`"),
        ({"model": "out/gone"}, "out/gone: this model is not in the Hub cache"),
        ({"benchmarks": ["gone.jsonl"]}, "there is no file 'gone.jsonl'"),
        ({"benchmarks": ["empty.jsonl"]}, "empty.jsonl is empty or not valid json"),
        ({"compare": ["model"]}, "holds no results.json"),
    ],
)
def test_mistakes_are_named_in_one_line(here, fields, message):
    (here / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=message) as refused:
        evaluate_command(arguments(**fields))
    assert len(str(refused.value).splitlines()) == 1


def test_without_a_network_a_missing_model_is_named_at_once(here, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://localhost:1")
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"nobody/nothing: .*ConnectError"):
        evaluate_command(arguments(model="nobody/nothing"))
    assert time.monotonic() - start < 5  # transformers retries for more than 20 s


def test_a_directory_that_is_no_model_is_named(here):
    (here / "nothing").mkdir()
    with pytest.raises(ValueError, match="model 'nothing' cannot be loaded: "):
        evaluate_command(arguments(model="nothing"))


def test_the_defaults_are_the_papers_protocol():
    args = EvaluationArguments(model="Qwen/Qwen3-1.7B", backend="transformers")
    assert args.benchmarks == ["aime24", "aime25", "aime26"]
    assert (args.samples, args.temperature, args.top_p) == (16, 0.7, 0.95)
    assert args.output_dir == "outputs/evaluation/Qwen--Qwen3-1.7B"


def test_the_script_prints_the_table_and_names_mistakes(here, monkeypatch, capsys):
    def script(*options):
        line = ["evaluate.py", "--model", "model", "--benchmarks", "pairs.jsonl", "--output-dir", "out", *options]
        monkeypatch.setattr("sys.argv", [*line, "--samples", "2", "--max-new-tokens", "4"])
        runpy.run_path(str(ROOT / "scripts/evaluate.py"), run_name="__main__")

    script()
    assert "| pairs | 3 |" in capsys.readouterr().out
    assert results()["settings"]["max_new_tokens"] == 4
    with pytest.raises(SystemExit, match=r"evaluate\.py: .*seed 0 there, 1 here"):
        script("--seed", "1")
    (here / "more.yaml").write_text("temprature: 1.0\n")
    with pytest.raises(SystemExit, match="temprature"):
        script("--config", "more.yaml")
