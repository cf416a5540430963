import json
import time
from pathlib import Path

import huggingface_hub
import pytest

from cppo_trl.data.sources import FEATURES, SOURCES, SourceUnavailableError, load_local, load_source, read_rows
from cppo_trl.data.templates import TEMPLATES
from cppo_trl.rewards import accuracy_reward
from tests.data.conftest import DAPO_PROMPT, FILES, dapo_row, write_rows

ROOT = Path(__file__).parents[2]
GSM8K = ROOT / "../shared/data/gsm8k"
# problem, gold, id, subject, difficulty
EXPECTED = {
    "dapo-math-17k": [("What is $1+1$?", "2", "9a9b-1", None, None),
                      ("Find $x$ if $x^2=9$ and $x<0$.", "-3", "9a9b-2", None, None)],
    "gsm8k": [("How many seeds in 2 bags of 600?", "1200", "0", None, None)],
    "gsm8k-test": [("Tom owes $5. What has he?", "-5", "0", None, None)],
    "math": [("Let $f$ be even.", r"\frac{1}{2}", "0", "Algebra", 5), ("Sum?", None, "1", "Algebra", None),
             ("Area?", r"9\pi", "2", "Geometry", 1)],
    "deepmath-103k": [(r"Evaluate \(\int_0^1 x\,dx\).", r"\dfrac{1}{2}", "0", "Mathematics -> Calculus", 5.5),
                      ("Is 7 prime?", "Yes", "1", "Mathematics", -1)],
    "big-math": [("Compute 3-4.", "-1", "0",
                  "Mathematics -> Algebra -> Prealgebra; Mathematics -> Number Theory", 0.25),
                 ("Compute 3-5.", "-2", "1", None, None)],
    "math-500": [("Convert $(0,3)$.", r"(3,\frac{\pi}{2})", "test/precalculus/807.json", "Precalculus", 2)],
    "aime24": [("Made up for 2024.", "73", "60", None, None)],
    "aime25": [("Made up for 2025.", "70", "0", None, None), ("An angle.", r"336^\circ", "1", None, None)],
    "aime26": [("Made up.", "277", "1", None, None)],
}  # fmt: skip


def test_evaluation_sets_are_marked():
    assert set(SOURCES) == set(EXPECTED)
    assert {name for name, source in SOURCES.items() if source.evaluation} == {
        *("gsm8k-test", "math-500", "aime24", "aime25", "aime26")
    }


def test_the_documentation_names_every_source_and_template():
    text = (ROOT / "docs/data.md").read_text()
    for name, source in SOURCES.items():
        assert f"| `{name}` | {source.repo}" in text
        assert f"| {source.license} |" in text
    for template in TEMPLATES.values():
        assert template.user in text
        assert template.system is None or template.system in text


def common(data):
    return [tuple(row[c] for c in ("problem", "solution", "id", "subject", "difficulty")) for row in data]


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_is_read_from_the_hub_cache(name, hub):
    data = load_source(name, template="boxed")
    assert data.features == FEATURES
    assert common(data) == EXPECTED[name]
    assert set(data["source"]) == {name}
    assert data[0]["prompt"] == [
        {
            "role": "user",
            "content": EXPECTED[name][0][0]
            + "\n\nPlease reason step by step, and put your final answer within \\boxed{}.",
        }
    ]
    golds = [gold for gold in data["solution"] if gold]
    assert accuracy_reward([rf"\boxed{{{gold}}}" for gold in golds], golds) == [1.0] * len(golds)


@pytest.mark.parametrize("offline", [True, False])
def test_a_missing_source_is_named_at_once_with_its_download_command(offline, caches, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://localhost:1")
    start = time.monotonic()
    with pytest.raises(SourceUnavailableError) as missing:
        load_source("aime26", template="boxed")
    assert time.monotonic() - start < 5  # the client's own download retries for more than 20 s
    (line,) = str(missing.value).splitlines()
    assert "MathArena/aime_2026: this dataset is not in the Hub cache" in line
    assert ("OfflineModeIsEnabled" if offline else "ConnectError") in line
    assert (
        "`hf download MathArena/aime_2026 --repo-type dataset --revision 10b4e45b7a503075d4da8a0d57916a4f06ce6bd2 "
        "--include 'data/train-*.parquet'`"
    ) in line


def test_a_source_with_a_missing_file_is_not_taken_for_whole(cached):
    first, _ = FILES["deepmath-103k"].items()
    cached("deepmath-103k", dict([first]))
    with pytest.raises(SourceUnavailableError, match="zwhe99/DeepMath-103K"):
        load_source("deepmath-103k", template="boxed")


def test_only_the_columns_in_use_are_read(tmp_path):
    ((_, rows), _) = FILES["deepmath-103k"].items()
    write_rows(tmp_path / "x.parquet", rows)
    assert read_rows([tmp_path / "x.parquet"], ["question", "topic"]).column_names == ["question", "topic"]


@pytest.mark.parametrize(
    ("name", "template", "message"),
    [("gsm9k", "boxed", "source must be one of dapo-math-17k, gsm8k,"), ("gsm8k", "bxed", "template must be one of")],
)
def test_unknown_names_are_refused(hub, name, template, message):
    with pytest.raises(ValueError, match=message):
        load_source(name, template=template)


def test_a_source_whose_columns_have_changed_is_refused(cached):
    cached("math-500", {"test.jsonl": [{"question": "1+1", "answer": "2"}]})
    with pytest.raises(ValueError, match=r"test\.jsonl has no column problem, unique_id, .*; it has question, answer"):
        load_source("math-500", template="boxed")


def test_the_dapo_template_is_dapos_own_prompt():
    assert TEMPLATES["dapo"].render(r"Is $\{1\}$ {problem}?") == [
        {"role": "user", "content": DAPO_PROMPT.format(r"Is $\{1\}$ {problem}?")}
    ]


def test_a_dapo_prompt_without_the_usual_frame_is_kept_whole(cached):
    row = dapo_row("What is 2+2?", "4", "a")
    row["prompt"][0]["content"] = row["prompt"][0]["content"].removesuffix('".') + "! "
    cached("dapo-math-17k", {"data/dapo-math-17k.parquet": [row]})
    data = load_source("dapo-math-17k", template="plain")
    assert data[0]["problem"] == row["prompt"][0]["content"].strip()


def test_the_thinking_template_asks_for_what_the_format_reward_wants():
    system, user = TEMPLATES["thinking"].render("1+1?")
    assert [system["role"], user["role"]] == ["system", "user"]
    assert "<think>\n" in system["content"]
    assert user["content"] == "1+1?\n\nPut your final answer within \\boxed{}."


def test_the_first_row_of_each_problem_is_kept(tmp_path):
    rows = [{"prompt": p, "solution": s} for p, s in [("a  b", "1"), ("a\nb ", "1"), ("a b", "2"), ("A b", "1")]]
    write_rows(tmp_path / "x.jsonl", rows)
    assert [(row["problem"], row["solution"], row["id"]) for row in load_local(tmp_path / "x.jsonl")] == [
        ("a  b", "1", "0"),
        ("A b", "1", "3"),
    ]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_local_columns_are_found_by_the_column_map(tmp_path, suffix):
    rows = [{"q": "1+1?", "gold": {"value": 2}, "uid": 7, "kind": "sum", "level": 3}]
    write_rows(tmp_path / f"mine{suffix}", rows)
    columns = {"prompt": "q", "solution": "gold.value", "id": "uid", "subject": "kind", "difficulty": "level"}
    (row,) = load_local(tmp_path / f"mine{suffix}", columns=columns, template="boxed")
    assert row == {
        "prompt": TEMPLATES["boxed"].render("1+1?"),
        "solution": "2",
        "source": str(tmp_path / f"mine{suffix}"),
        "id": "7",
        "subject": "sum",
        "difficulty": 3.0,
        "problem": "1+1?",
    }


def test_local_conversations_are_kept_as_they_are(tmp_path):
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    write_rows(tmp_path / "mine.jsonl", [{"prompt": prompt, "solution": "2"}])
    (row,) = load_local(tmp_path / "mine.jsonl")
    assert row["prompt"] == prompt
    assert row["problem"] == "1+1?"
    with pytest.raises(ValueError, match="conversations: use template plain"):
        load_local(tmp_path / "mine.jsonl", template="boxed")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_wrong_column_map_is_refused(tmp_path, suffix):
    write_rows(tmp_path / f"mine{suffix}", [{"question": "1+1?", "answer": {"value": "2"}}])
    with pytest.raises(ValueError, match="has no column prompt, solution; it has question, answer"):
        load_local(tmp_path / f"mine{suffix}")
    with pytest.raises(ValueError, match=r"has no column answer\.gold; it has question, answer\.value"):
        load_local(tmp_path / f"mine{suffix}", columns={"prompt": "question", "solution": "answer.gold"})
    with pytest.raises(ValueError, match=r"columns maps prompt, solution, id.* got gold"):
        load_local(tmp_path / f"mine{suffix}", columns={"gold": "answer"})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", ""),
        ("x.jsonl", "\n"),
        ("x.jsonl", '{"prompt": '),
        ("x.json", "[]"),
        ("x.csv", ""),
        ("x.csv", "prompt,solution\n"),
        ("x.parquet", ""),
        ("x.parquet", "no parquet"),
    ],
)
def test_an_empty_or_broken_file_is_named_in_one_line(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=r"x\.\w+ is empty or not valid (json|csv|parquet): \w") as refused:
        load_local(tmp_path / name)
    assert len(str(refused.value).splitlines()) == 1


def test_a_missing_file_or_another_format_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file '.*yours\.jsonl'"):
        load_local(tmp_path / "yours.jsonl")
    (tmp_path / "x.txt").touch()
    with pytest.raises(ValueError, match=r"x\.txt is not a \.jsonl, \.json, \.csv, \.parquet file"):
        load_local(tmp_path / "x.txt")


@pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K is not here")
@pytest.mark.parametrize(("name", "count"), [("gsm8k", 7473), ("gsm8k-test", 1319)])
def test_gsm8k_itself(name, count, cached):
    split = SOURCES[name].files.split("/")[1].split("-")[0]
    rows = [json.loads(line) for line in (GSM8K / f"{split}.jsonl").read_text().splitlines()]
    cached(name, {f"main/{split}-00000-of-00001.parquet": rows})
    data = load_source(name, template="dapo")
    assert len(data) == count
    assert all(gold.lstrip("-").replace(".", "", 1).isdigit() for gold in data["solution"])
    if name == "gsm8k":
        assert (data[0]["solution"], data[0]["id"]) == ("72", "0")
        assert data[0]["problem"].startswith("Natalia sold clips to 48 of her friends")
