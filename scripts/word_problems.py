r"""Word problems in two steps, generated: the task of ``scripts/quickstart_llm.py``.

"Tom has 23 apples and gives 2 to each of 4 friends. How many are left?" is answered by
``2 * 4 = 8. 23 - 8 = 15. \boxed{15}``.
"""

import operator
import random
from typing import Any

from datasets import Dataset

NAMES = "Tom Anna Ben Clara David Emma Felix Grace Henry Ida Jack Kate Leo Mia Noah Olga".split()
THINGS = "apples marbles stickers pencils cookies shells cards stamps balloons buttons".split()
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}

# text; ranges of a, b and c; both steps, the second of which may use the first one's result x
STORIES: tuple[tuple[Any, ...], ...] = (
    ("{n} has {a} {t} and buys {b} bags of {c} {t} each. How many {t} now?",
     (2, 9), (2, 5), (2, 5), "b*c", "a+x"),
    ("{n} has {a} {t}, loses {b} and finds {c}. How many {t} now?",
     (6, 15), (2, 5), (2, 9), "a-b", "x+c"),
    ("{n} has {a} {t}. {m} has {b} more. How many {t} together?",
     (2, 9), (2, 6), (1, 1), "a+b", "a+x"),
    ("{n} earns {a} dollars a day for {b} days and spends {c}. How many are left?",
     (3, 7), (2, 5), (2, 5), "a*b", "x-c"),
    ("{n} has {a} {t} and gives {b} to each of {c} friends. How many are left?",
     (12, 30), (2, 4), (2, 4), "b*c", "a-x"),
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
