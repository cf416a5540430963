import pytest
from datasets import Dataset

from cppo_trl.data import arithmetic, filters
from cppo_trl.data.sources import FEATURES
from cppo_trl.data.templates import TEMPLATES
from cppo_trl.rewards import AccuracyReward


def problems(*rows, source="x"):
    """Rows of (problem, gold)."""
    return Dataset.from_list(
        [
            {
                "prompt": TEMPLATES["plain"].render(problem),
                "solution": gold,
                "source": source,
                "id": str(number),
                "subject": None,
                "difficulty": None,
                "problem": problem,
            }
            for number, (problem, gold) in enumerate(rows)
        ],
        features=FEATURES,
    )


def test_unusable_golds_are_those_the_reward_skips():
    golds = ["4", None, r"\frac{1}{2}", "", r"\frac{1}{", "12 apples", r"\text{(A)}"]
    reasons = filters.unusable_golds(problems(*((f"Problem {n}", gold) for n, gold in enumerate(golds))))
    reward = AccuracyReward()
    skipped = [score is None for score in reward([r"\boxed{4}"] * len(golds), golds)]
    assert [reason is not None for reason in reasons] == skipped
    assert skipped == [False, True, False, True, True, False, False]
    assert reasons[1] == "unparseable_gold: None"
    assert filters.unusable_golds(problems(("1+1?", "2")).select([])) == []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"Find $\dfrac{1}{2}$ of the Sum.", r"find \(\frac12\) of the  sum"),
        (r"Let $x=\left(\text{area}\right)^2$", r"let x = (area)²"),
        (r"$\mathrm{A}$, [asy] draw(A--B); [/asy] and B", r"$A$ and $B$"),
    ],
)
def test_spelling_does_not_hide_a_problem(one, other):
    assert filters.letters_and_digits(one) == filters.letters_and_digits(other)


@pytest.mark.parametrize(
    ("one", "other"), [("$x^2$", "$x^3$"), (r"$\alpha$", r"$\beta$"), ("你好", "您好"), (r"\leftarrow", "arrow")]
)
def test_other_problems_stay_apart(one, other):
    assert filters.letters_and_digits(one) != filters.letters_and_digits(other)


LONG = "Find the number of ordered pairs of positive integers whose sum is 2024."


def test_evaluation_problems_are_found_whole_and_inside_others():
    evaluation = [problems((LONG, "1"), ("What is 1+1?", "2"), source="aime24"), problems(("Other", "1"), source="m")]
    data = problems(
        (LONG.upper().replace(" ", "\n"), "1"),
        (f"Here is a problem. {LONG} Give it modulo 7.", "1"),
        (f"Hint: {LONG}", "1"),
        (LONG.replace("2024", "2025"), "1"),
        (LONG.removesuffix(" is 2024."), "1"),
        ("what is $1 + 1$", "2"),
        ("What is 1+1? And 2+2?", "2"),  # a short problem may stand in a long one by chance
        ("other", "1"),
    )
    assert filters.overlap(data, evaluation) == [
        "is aime24/0",
        "contains aime24/0",
        "contains aime24/0",
        None,
        None,
        "is aime24/1",
        None,
        "is m/0",
    ]


def test_the_shortest_quote_is_found_at_the_very_end():
    evaluation = [problems(("x" * 40, "1"), ("y" * 39, "1"))]
    data = problems(("a" + "x" * 40, "1"), ("a" + "y" * 39, "1"), ("a" + "x" * 39, "1"))
    assert filters.overlap(data, evaluation) == ["contains x/0", None, None]


def test_overlap_agrees_with_a_plain_search():
    texts = [f"{'word ' * 12}{number} {'tail ' * (number % 3)}" for number in range(30)]
    evaluation = problems(*((text, "1") for text in texts[::7]))
    data = problems(*((f"{'x' * (number % 4)} {text} end", "1") for number, text in enumerate(texts)))
    plain = [
        any(filters.letters_and_digits(sought) in filters.letters_and_digits(text) for sought in evaluation["problem"])
        for text in data["problem"]
    ]
    assert [reason is not None for reason in filters.overlap(data, [evaluation])] == plain
    assert 0 < sum(plain) < len(plain)


def test_prompts_are_measured_with_their_chat_template():
    tokenizer = arithmetic.tokenizer()  # a token for a character
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}{{ '==' }}{% endif %}"
    )
    data = problems(("1+1", "2"), ("1+11", "12"))
    assert filters.overlong(data, tokenizer, 5) == [None, "6 tokens"]
    assert filters.overlong(data, tokenizer, 4) == ["5 tokens", "6 tokens"]
