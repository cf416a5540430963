"""A whole evaluation from its arguments: interrupted, resumed, refused, compared."""

import json
import os
import runpy
import signal
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from cppo_trl.data import arithmetic
from cppo_trl.evaluation import command
from cppo_trl.evaluation.command import EvaluationArguments, evaluate_command
from cppo_trl.evaluation.grading import Evaluator
from tests.conftest import tiny_model

ROOT = Path(__file__).parents[2]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A directory with a model and two sets of problems, of five and three rows."""
    monkeypatch.chdir(tmp_path)
    save_model(tiny_model(), "model")
    arithmetic.problems(5, 3, 0).to_json("sums.jsonl")
    arithmetic.problems(3, 2, 0).to_json("pairs.jsonl")
    return tmp_path


def save_model(model, directory):
    model.save_pretrained(directory)
    arithmetic.tokenizer().save_pretrained(directory)


def arguments(**fields):
    defaults = {"model": "model", "benchmarks": ["sums.jsonl", "pairs.jsonl"], "output_dir": "out", "samples": 4}
    return EvaluationArguments(**{**defaults, "max_new_tokens": 10, "batch_size": 8, **fields})


def results(directory="out"):
    return json.loads(Path(directory, "results.json").read_text())


def lines(directory):
    return [json.loads(line) for line in Path(directory, "generations.jsonl").read_text().splitlines()]


def killed_after(parts, args):
    """Run in a child process that is killed by SIGKILL when its next part begins."""
    child = os.fork()
    if child == 0:
        answer, done = Evaluator.__call__, []

        def answer_some(self, problems):
            if len(done) == parts:
                os.kill(os.getpid(), signal.SIGKILL)
            done.append(None)
            return answer(self, problems)

        Evaluator.__call__ = answer_some
        try:
            evaluate_command(args)
        finally:
            os._exit(1)  # the child must not go on with the tests
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def test_a_killed_run_resumes_to_the_same_results(here, monkeypatch):
    table = evaluate_command(arguments(output_dir="whole"))
    args = arguments(samples=4)
    killed_after(1, args)
    assert len(lines("out")) == 2
    torch.manual_seed(7)  # another process would be in another random state
    killed_after(1, args)  # each time two more problems of eight
    whole = (here / "out/generations.jsonl").read_text()
    assert len(whole.splitlines()) == 4
    *first, last = whole.splitlines(keepends=True)
    (here / "out/generations.jsonl").write_text("".join(first) + last[: len(last) // 2])  # killed while writing
    assert evaluate_command(args) == table
    assert lines("out") == lines("whole")
    evaluate_command(arguments(output_dir="other", seed=1))
    assert lines("other") != lines("whole")
    assert results("out")["benchmarks"] == results("whole")["benchmarks"]
    monkeypatch.setattr(command, "_evaluator", None)  # finished: no model is loaded
    assert evaluate_command(args) == table


def test_a_finished_run_leaves_its_samples_and_their_metrics(here):
    table = evaluate_command(arguments(temperature=1.0, top_p=1.0))
    written = results()
    rows = lines("out")
    assert (here / "out/table.md").read_text().strip() == table
    assert [(r["benchmark"], r["id"]) for r in rows] == [("sums", i) for i in "01234"] + [("pairs", i) for i in "012"]
    assert len({text for r in rows for text in r["completions"]}) > 16
    assert list(written["benchmarks"]) == ["sums", "pairs", "mean"]
    for name, count in (("sums", 5), ("pairs", 3)):
        mine = [r for r in rows if r["benchmark"] == name]
        metrics = written["benchmarks"][name]
        assert metrics["problems"] == count
        for key, column in (("avg@4", "scores"), ("response_length", "lengths"), ("truncated", "truncated")):
            assert metrics[key] == pytest.approx(sum(sum(r[column]) for r in mine) / (4 * count))
    assert written["benchmarks"]["sums"]["truncated"] > 0
    assert written["settings"]["samples"] == 4
    assert {"torch", "transformers", "cppo-trl"} <= written["versions"].keys()
    assert "± " in table
    both = evaluate_command(EvaluationArguments(compare=["out", "out"]))
    assert both.splitlines()[:5] == table.splitlines()
    assert len(both.splitlines()) == 8


def test_another_evaluation_is_not_mixed_in(here):
    evaluate_command(arguments())
    with pytest.raises(ValueError, match=r"other settings: temperature 0.7 there, 0.9 here; seed 0 there, 3 here\."):
        evaluate_command(arguments(temperature=0.9, seed=3))
    arithmetic.problems(5, 3, 1).to_json("sums.jsonl")
    with pytest.raises(ValueError, match=r"problems .* there"):
        evaluate_command(arguments())
    arithmetic.problems(5, 3, 0).to_json("sums.jsonl")
    save_model(tiny_model(seed=1), "model")
    with pytest.raises(ValueError, match=r"weights .* there"):
        evaluate_command(arguments())
    (here / "other").mkdir()
    (here / "other/thesis.txt").write_text("")
    with pytest.raises(ValueError, match="holds no evaluation"):
        evaluate_command(arguments(output_dir="other"))


def test_one_process_writes_at_a_time(here, monkeypatch):
    def meanwhile(args):
        child = os.fork()
        if child == 0:
            try:
                evaluate_command(args)
            except ValueError as error:
                os._exit("is in use by" not in str(error))
            finally:
                os._exit(2)
        assert os.waitpid(child, 0)[1] == 0
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_evaluator", meanwhile)
    with pytest.raises(KeyboardInterrupt):
        evaluate_command(arguments())


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
