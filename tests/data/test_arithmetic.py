import re

import pytest

from cppo_trl.data import arithmetic


def test_problems_are_distinct_right_and_reproducible():
    data = arithmetic.problems(500, terms=4, seed=3)
    assert len(set(data["prompt"])) == 500
    for prompt, solution in zip(data["prompt"], data["solution"], strict=True):
        assert re.fullmatch(r"([1-9]\+){3}[1-9]=", prompt)
        assert sum(map(int, re.findall(r"\d", prompt))) == int(solution)
    assert arithmetic.problems(500, terms=4, seed=3)["prompt"] == data["prompt"]
    other = arithmetic.problems(500, terms=4, seed=3, exclude=set(data["prompt"]))
    assert not set(other["prompt"]) & set(data["prompt"])
    with pytest.raises(ValueError, match="only 81 sums"):
        arithmetic.problems(82, terms=2, seed=0)


def test_demonstrations_are_wrong_as_often_as_asked():
    data = arithmetic.problems(2000, terms=5, seed=0)
    steps = wrong = right_answers = 0
    for row, solution in zip(arithmetic.demonstrations(data, 0.25, seed=1), data["solution"], strict=True):
        addends = re.findall(r"\d", row["prompt"])
        worked = re.findall(r"(\d+)\+(\d)=(\d+);", row["completion"])
        assert [b for _, b, _ in worked] == addends[1:]
        assert [a for a, _, _ in worked] == [addends[0], *(c for _, _, c in worked[:-1])]  # later steps follow on
        assert row["completion"].endswith(f"\\boxed{{{worked[-1][2]}}}")
        steps += len(worked)
        wrong += sum(int(a) + int(b) != int(c) for a, b, c in worked)
        right_answers += worked[-1][2] == solution
    assert wrong / steps == pytest.approx(0.25, abs=0.02)
    assert 0.3 < right_answers / 2000 < 0.4  # 0.75^4, and errors that cancel out
    perfect = arithmetic.demonstrations(data.select([0]), 0.0, seed=1)[0]
    assert f"boxed{{{data['solution'][0]}}}" in perfect["completion"]


def test_demonstrations_forget_the_carry_of_a_nine_as_often_as_asked():
    data = arithmetic.problems(2000, terms=5, seed=0)
    carries = forgotten = 0
    for row in arithmetic.demonstrations(data, 0.0, seed=1, forgotten_carry=0.6):
        for a, b, c in re.findall(r"(\d+)\+(\d)=(\d+);", row["completion"]):
            carry = b == "9" and int(a) + 9 >= 10 * (int(a) // 10 + 1)
            assert int(c) in ((int(a) + int(b), int(a) + int(b) - 10) if carry else (int(a) + int(b),))
            carries += carry
            forgotten += int(c) < int(a)
    assert carries > 500
    assert forgotten / carries == pytest.approx(0.6, abs=0.05)


def test_tokenizer_is_one_token_a_character_and_back():
    tokenizer = arithmetic.tokenizer()
    text = r"3+5=8;8+9=17;\boxed{17}"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.pad_token_id not in ids


def test_model_is_small_and_a_seed_makes_one_warm_start(tmp_path):
    model = arithmetic.model(arithmetic.tokenizer())
    assert sum(p.numel() for p in model.parameters()) == 223_968
    for name in ("first", "second"):  # the random state between them differs
        arithmetic.warm_start(tmp_path / name, terms=3, error_rate=0.0, seed=0, exclude=set(), steps=20)
    assert (tmp_path / "first/tokenizer.json").exists()
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second"))
    assert first == second
