"""When two answers are the same; docs/rewards.md has the conventions in one table."""

import re
from typing import Any

from mpmath import mp, mpf

from cppo_trl.rewards.expressions import UndefinedError, UnreadableError
from cppo_trl.rewards.reading import Many, Named, Relation, Scalar, close, read, region_of, same_number
from cppo_trl.rewards.regions import Region
from cppo_trl.rewards.text import normalize, squash
from cppo_trl.rewards.units import units_agree

SHOWN_CHARS = 200
_WORTH = {frozenset(["%"]): "({})/100", frozenset(["degree"]): r"({})\pi/180"}


def compare(gold_text: str, answer_text: str) -> tuple[str, str | None, str | None]:
    """Compare two answers.

    Args:
        gold_text: As from ``extract_gold``.
        answer_text: As from ``extract_answer``.

    Returns:
        Why (``"equal"`` if they are), and the gold and the answer as read.
    """
    try:
        gold, gold_shown = read(gold_text)
    except UnreadableError:
        return "unparseable_gold", None, None
    except UndefinedError:
        same = (shown := squash(normalize(gold_text))) == squash(normalize(answer_text))
        return ("equal", shown[:SHOWN_CHARS], shown[:SHOWN_CHARS]) if same else ("unparseable_gold", None, None)
    try:
        answer, answer_shown = read(answer_text)
    except (UnreadableError, UndefinedError):
        return "unparseable_answer", gold_shown[:SHOWN_CHARS], None
    why = "equal" if gold_shown == answer_shown or equal(gold, answer) else "different"
    return why, gold_shown[:SHOWN_CHARS], answer_shown[:SHOWN_CHARS]


def equal(one: Any, other: Any) -> bool:
    """Tell whether two things that were read are the same."""
    if isinstance(one, Named) and isinstance(other, Named) and one.name != other.name:
        return False
    if isinstance(one, Relation) or isinstance(other, Relation):
        one, other = _as_relation(one), _as_relation(other)
    one, other = (side.value if isinstance(side, Named) else side for side in (one, other))
    try:
        return _same(one, other)
    except (ArithmeticError, UnreadableError):
        return False


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Region) or isinstance(other, Region):
        region, another = region_of(one), region_of(other)
        return region is not None and another is not None and region.equals(another)
    if isinstance(other, Many):
        one, other = other, one
    if isinstance(one, Many):
        return _same_items(one, other) if isinstance(other, Many) else _same_as_one(one, other)
    if isinstance(one, Scalar) and isinstance(other, Scalar):
        return _same_scalar(one, other)
    if isinstance(one, Relation) and isinstance(other, Relation):
        return one.sign == other.sign and _proportional(one, other)
    return isinstance(one, str) and one == other


def _as_relation(side: Any) -> Any:
    """Return ``y = 2x + 3`` as a relation; ``x = 5`` is none, so that ``2x = 10`` does not solve itself."""
    if isinstance(side, Named) and isinstance(side.value, Scalar) and side.value.symbols:
        return Relation("=", Scalar(f"({side.name})-({side.value.text})"))
    return side


def _same_items(one: Many, other: Many) -> bool:
    """Compare item by item; the order counts in brackets, and where only one side has names."""
    if len(one.items) != len(other.items):
        return False
    if one.kind in ("{}", ",") and other.kind in ("{}", ","):
        named = [all(isinstance(item, Named) for item in many.items) for many in (one, other)]
        names = [item.name for item in (one if named[0] else other).items] if named[0] != named[1] else []
        if len({re.sub("_.*", "", name) for name in names}) < 2:  # x_1 = 1, x_2 = 2 against 2, 1, but not x = 1, y = 2
            left = list(other.items)
            for item in one.items:
                match = next((place for place, candidate in enumerate(left) if equal(item, candidate)), None)
                if match is None:
                    return False
                del left[match]
            return True
    elif one.kind != other.kind and {one.kind, other.kind} != {",", "()"}:
        return False
    return all(map(equal, one.items, other.items))


def _same_as_one(many: Many, single: Any) -> bool:
    if not isinstance(single, Scalar):
        return False
    if many.kind == ":" and len(many.items) == 2:  # 2:30 may be a time, or the ratio 1:15
        return _same_scalar(Scalar(f"({many.items[0].text})/({many.items[1].text})"), single)
    return many.kind == "{}" and len(many.items) == 1 and equal(many.items[0], single)


def _same_scalar(one: Scalar, other: Scalar) -> bool:
    if not units_agree(one.unit, other.unit):
        return False
    if len(one.text) == len(other.text) == 1 and one.text.lower() == other.text.lower():
        return True  # choices: A and a
    forms = []
    for mine, theirs in ((one, other), (other, one)):
        worth = _WORTH.get(mine.unit) if mine.unit and theirs.unit is None else None
        forms.append([mine, Scalar(worth.format(mine.text))] if worth else [mine])
    return any(same_number(a, b) or _rounds_to(a, b) or _rounds_to(b, a) for a in forms[0] for b in forms[1])


def _rounds_to(exact: Scalar, rounded: Scalar) -> bool:
    """Tell whether a decimal of at least six places, or of five digits and an ellipsis, is what a number rounds to."""
    if not rounded.decimal or exact.symbols:
        return False
    digits, places = rounded.decimal
    if exact.decimal and exact.decimal[1] < places:
        return False  # 1 is not what 1.0000001 rounds to
    with mp.workdps(50):
        error = (exact.value() - rounded.value()) * mpf(10) ** places
    if rounded.cut:
        return digits >= 5 and mp.im(error) == 0 and 0 <= error * mp.sign(rounded.value()) < 1
    return digits >= 4 and places >= 6 and mp.im(error) == 0 and abs(error) <= 0.5


def _proportional(one: Relation, other: Relation) -> bool:
    """Tell whether two differences vanish together: their ratio is one number, positive for inequalities."""
    left, right = one.difference, other.difference
    if left.symbols != right.symbols:
        return False
    ratios = [left.value(place=place) / right.value(place=place) for place in range(4)]
    same = abs(ratios[0]) > 1e-30 and all(close(ratio, ratios[0], 50) for ratio in ratios)
    return same and (one.sign in ("=", r"\neq") or ratios[0] > 0)
