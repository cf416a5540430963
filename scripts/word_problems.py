r"""Word problems in two steps, generated: the task of ``scripts/quickstart_llm.py``.

"Tom has 33 apples and gives 2 apples to each of 6 friends. How many apples are left?" is answered by
``2 * 6 = 12. 33 - 12 = 21. \boxed{21}``.
"""

import operator
import random

from datasets import Dataset

NAMES = "Tom Anna Ben Clara David Emma Felix Grace Henry Ida Jack Kate Leo Mia Noah Olga".split()
THINGS = "apples marbles stickers pencils cookies shells cards stamps balloons buttons".split()
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}

STORIES = (  # text; ranges of a, b and c; both steps, the second of which may use the first one's result x
    ("{n} has {a} {t} and gives {b} {t} to each of {c} friends. How many {t} are left?",
     (20, 60), (2, 6), (2, 6), "b*c", "a-x"),
    ("{n} has {a} {t} and buys {b} bags of {c} {t} each. How many {t} does {n} have now?",
     (5, 30), (2, 6), (2, 6), "b*c", "a+x"),
    ("{n} has {a} {t}. {m} has {b} {t} more than {n}. How many {t} do they have together?",
     (3, 20), (2, 12), (1, 1), "a+b", "a+x"),
    ("{n} has {a} {t}, loses {b} of them and then finds {c} others. How many {t} does {n} have now?",
     (15, 50), (3, 20), (3, 20), "a-b", "x+c"),
    ("{n} packs {a} {t} into bags of {b} and gives {c} bags away. How many bags are left?",
     (8, 40), (2, 5), (1, 6), "a/b", "x-c"),
    ("{n} earns {a} dollars a day for {b} days and then spends {c} dollars. How many dollars are left?",
     (3, 9), (2, 6), (2, 25), "a*b", "x-c"),
    ("{n} has {a} {t}. {m} has {b} times as many. How many {t} do they have together?",
     (3, 9), (2, 5), (1, 1), "a*b", "a+x"),
    ("A book has {a} pages. {n} reads {b} pages on Monday and {c} pages on Tuesday. How many pages are left?",
     (40, 80), (5, 25), (5, 25), "b+c", "a-x"),
    ("{n} has {a} {t} and {m} has {b} {t}. They share all of them equally. How many {t} does each of them get?",
     (4, 25), (4, 25), (1, 1), "a+b", "x/2"),
    ("A room has {a} rows of {b} chairs. {n} brings {c} more chairs. How many chairs are in the room now?",
     (2, 6), (3, 9), (3, 15), "a*b", "x+c"),
    ("{n} buys {b} books for {c} dollars each and pays with {a} dollars. How many dollars does {n} get back?",
     (20, 60), (2, 6), (3, 9), "b*c", "a-x"),
    ("{n} shares {a} {t} equally among {b} children. Each child then loses {c}. "
     "How many {t} does each child have left?",
     (8, 40), (2, 5), (1, 6), "a/b", "x-c"),
)  # fmt: skip


def word_problem(generator: random.Random) -> dict[str, str]:
    """A ``question``, its worked ``answer`` and the ``solution``; every number in between is a positive integer."""
    text, *ranges, first, second = generator.choice(STORIES)
    while True:
        values = dict(zip("abc", (generator.randint(*bounds) for bounds in ranges), strict=True), **{"2": 2})
        steps = []
        for name, (left, sign, right) in (("x", first), ("y", second)):
            one, other = values[left], values[right]
            values[name] = OPERATORS[sign](one, other)
            steps.append(f"{one} {sign} {other} = {values[name]}.")
            if values[name] < 1 or (sign == "/" and one % other):
                break
        else:
            n, m = generator.sample(NAMES, 2)
            question = text.format(n=n, m=m, t=generator.choice(THINGS), **values)
            return {
                "question": question,
                "answer": f"{' '.join(steps)} \\boxed{{{values['y']}}}",
                "solution": str(values["y"]),
            }


def word_problems(count: int, seed: int, exclude: set[str] | None = None) -> Dataset:
    """Distinct word problems as conversations.

    Args:
        count: number of problems.
        seed: of the random generator.
        exclude: questions that must not occur, such as those of another split.

    Returns:
        A dataset with ``prompt`` and ``completion`` (a message each) and ``solution``, a string.
    """
    seen, generator = set(exclude or ()), random.Random(seed)
    rows: list[dict[str, object]] = []
    while len(rows) < count:
        problem = word_problem(generator)
        if problem["question"] not in seen:
            seen.add(problem["question"])
            rows.append(
                {
                    "prompt": [{"role": "user", "content": problem["question"]}],
                    "completion": [{"role": "assistant", "content": problem["answer"]}],
                    "solution": problem["solution"],
                }
            )
    return Dataset.from_list(rows)
