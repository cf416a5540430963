"""``scripts/quickstart_llm.py`` with a tiny model and a chat template made on the spot, and its word problems."""

import json
import os
import re

import pytest
import yaml

from cppo_trl.launch.plan import dry_run
from tests.conftest import ROOT, character_tokenizer, flags, launch, tiny_model
from word_problems import STORIES, THINGS, word_problems

RECIPE = ROOT / "configs/smollm2-135m/word-problems/cppo.yaml"
CHAT = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<eos>"
    "{% endgeneration %}{% else %}Q {{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} A {% endif %}"
)


def test_every_worked_answer_is_right_and_ends_in_the_solution():
    rows = word_problems(600, seed=3)
    openings = set()
    for prompt, completion, solution in zip(rows["prompt"], rows["completion"], rows["solution"], strict=True):
        question, answer = prompt[0]["content"], completion[0]["content"]
        *steps, last = re.findall(r"(\d+ [-+*/] \d+) = (\d+)\.", answer)
        for step, result in (*steps, last):
            assert eval(step) == int(result) > 0
        assert answer.endswith(f" \\boxed{{{solution}}}")
        assert solution == last[1]
        given = set(re.findall(r"\d+", question)) | {steps[0][1], "2"}  # two share equally
        assert set(re.findall(r"\d+", " ".join(step for step, _ in (*steps, last)))) <= given
        openings.add(re.sub(r"[A-Z]\w+|\d+|" + "|".join(THINGS), "", question))
    assert len(openings) == len(STORIES)


def test_problems_are_distinct_and_held_out_ones_do_not_return():
    def questions(rows):
        return [row["prompt"][0]["content"] for row in rows]

    test = questions(word_problems(100, seed=1))
    train = questions(word_problems(500, seed=1, exclude=set(test)))  # the same stream of problems
    assert len(set(test)) == 100
    assert len(set(train)) == 500
    assert not set(test) & set(train)


@pytest.fixture
def base(tmp_path):
    """A tiny model that chats, one character a token."""
    characters = "\n !,.?'+-*/=\\{}<>0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    tokenizer = character_tokenizer(["<pad>", "<eos>", *characters])
    tokenizer.chat_template = CHAT
    tiny_model(vocab_size=len(tokenizer), tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def command(tmp_path, base, *more):
    fields = {
        "config": RECIPE,
        "base_model": base,
        "task_dir": tmp_path / "task",
        "output_dir": tmp_path / "run",
        "warm_start_steps": 2,
        "train_problems": 40,
        "test_problems": 6,
        "gsm8k": tmp_path / "gsm8k.jsonl",
        "gsm8k_problems": 2,
        "comparison_rollouts": 1,
        "per_device_train_batch_size": 4,
        "steps_per_generation": 2,
        "num_generations": 4,
        "max_completion_length": 8,
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 2,
        "log_tokens_steps": 2,
        "learning_rate": 0.05,
        "reward_funcs": "tests.scripts.test_quickstart_llm.letters",
        "use_cpu": True,
    }
    return [ROOT / "scripts/quickstart_llm.py", *flags(fields), *more]


def letters(completions, **kwargs):
    """A reward that a random model can earn."""
    return [sum(c.isalpha() for c in completion[-1]["content"]) / 8 for completion in completions]


def test_quickstart_llm_end_to_end_and_again(tmp_path, base):
    rows = [{"question": f"What is {n} plus 1?", "answer": f"Add them.\n#### {n + 1}"} for n in (1, 2, 1999)]
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = launch(*command(tmp_path, base), PYTHONPATH=str(ROOT))
    assert run.returncode == 0, run.stderr
    output = tmp_path / "run"
    results = json.loads((output / "results.json").read_text())
    assert results["rollouts"] == 2
    assert results["base_model"] == str(base)
    for when in ("before", "after"):
        assert {"greedy", "avg_at_4", "avg_at_4_stderr", "gsm8k"} == set(results[when])
    counts, positions = results["both_estimators"], results["by_position"]
    assert counts["first_update"] == 3
    assert counts["tokens"] >= counts["away"] >= max(counts["topk"], counts["binary"]) >= counts["both"]
    assert counts["divergence_topk"] >= counts["divergence_binary"] > 0
    assert sum(positions["divergence_update_1"]) < 1e-5 < sum(positions["divergence_update_2"])  # rounding, movement
    assert len(positions["masked_by_budget"]) == 20
    for name in ("positions.png", "curves.png", "report.html", "adapter_config.json", "trust_region_tokens.jsonl"):
        assert (output / name).stat().st_size > 0
    assert "avg@4" in (output / "README.md").read_text()
    asked = [json.loads(line)["solution"] for line in (tmp_path / "task/gsm8k.jsonl").read_text().splitlines()]
    assert asked == ["2", "3"]
    weights = (output / "adapter_model.safetensors").stat().st_mtime_ns
    again = launch(*command(tmp_path, base), PYTHONPATH=str(ROOT))
    assert again.returncode == 0, again.stderr
    assert (output / "adapter_model.safetensors").stat().st_mtime_ns == weights
    assert "Warm start: found" in again.stdout
    assert {**json.loads((output / "results.json").read_text()), "command": 0} == {**results, "command": 0}


def test_a_missing_model_ends_in_one_line(tmp_path):
    run = launch(*command(tmp_path, "nobody/no-model"), PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1")
    assert run.returncode == 1
    assert run.stderr.strip().splitlines()[-1].startswith("quickstart_llm.py: nobody/no-model: this model is not")


def test_another_seed_does_not_pass_for_the_run(tmp_path, base):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/settings.json").write_text(json.dumps({"seed": 0, "task_dir": str(tmp_path / "task")}))
    run = launch(*command(tmp_path, base), "--seed", "1", PYTHONPATH=str(ROOT))
    assert run.returncode == 1
    message = f"quickstart_llm.py: {tmp_path / 'run'} was made with another seed. Choose another --output_dir."
    assert run.stderr.strip().splitlines()[-1] == message


def test_the_recipe_works_and_has_the_paper_s_trust_region():
    plan = dry_run(["--config", str(RECIPE)])
    assert plan.problems == []
    assert plan.rows["trust region"] == (
        "cppo, topk_tv (K = 20), delta 0.15, w_min 0.8, delta_b 0.02 to 0.04 (quantile 0.9 of each response)"
    )
    assert plan.config.updates_per_rollout == 4
    assert not {"use_cpu", "use_vllm"} & set(yaml.safe_load(RECIPE.read_text()))  # as it stands with and without a GPU


@pytest.mark.skipif("CPPO_TEST_LLM" not in os.environ, reason="make test-llm runs it")
@pytest.mark.timeout(1800)
def test_the_real_model_goes_through_every_stage(tmp_path):
    less = {"warm_start_steps": 2, "comparison_rollouts": 1, "max_steps": 4, "num_generations": 4}
    rewards = ["--reward_funcs", "tests.scripts.test_quickstart_llm.letters", "--gsm8k_problems", "0"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    run = launch(*command(tmp_path, "HuggingFaceTB/SmolLM2-135M-Instruct", *flags(less), *rewards), PYTHONPATH=path)
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["base_model"].startswith("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert results["both_estimators"]["divergence_topk"] > 0
