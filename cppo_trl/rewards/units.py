"""Units behind a value: what is one, and when two of them agree."""

import re
from itertools import product

from cppo_trl.rewards.words import WORDS

Unit = frozenset[str]  # the unit in one spelling, or the words of a phrase (red apples) in the singular

_NAMES = {alias: names.split()[0] for names in WORDS["units"] for alias in names.split()}
for _bases, _prefixes in WORDS["prefixes"].items():
    for _base, (_short, _prefix) in product(_bases.split(), zip("nμmcdkMGT", _prefixes.split(), strict=True)):
        _NAMES.setdefault(_prefix + _base, _short + _NAMES[_base])
_POWERS = {"square": "^2", "sq": "^2", "cubic": "^3", "cu": "^3"}
_IDLE = set("a an the of in per each total more left".split())


def known_unit(word: str) -> str | None:
    """Return one spelling for the name of a unit, or None."""
    spellings = (word, word.removesuffix("s"), word.lower(), word.lower().removesuffix("s"))
    return next((_NAMES[spelling] for spelling in spellings if spelling in _NAMES), None)


def unit_of(phrase: str) -> Unit:
    """Return the unit that a phrase names, such as ``square cm``, ``m/s^2``, ``miles per hour``, ``red apples``."""
    words: list[str] = []
    known = True
    for part in re.split(r"\s*/\s*|\s+per\s+", phrase.strip(" .")):
        power = ""
        units = []
        for spelled in re.split(r"[\s-]+", part):
            word, _, exponent = spelled.strip(".").partition("^")
            if word.lower() in _POWERS:
                power = _POWERS[word.lower()]
            elif word.lower() not in _IDLE or word == "in":
                unit = known_unit(word)
                known = known and unit is not None
                name = unit or re.sub(r"(?<=[a-z])e?s$", "", word.lower())
                units.append(name + ("^" + exponent if exponent else power))
        words.append("·".join(dict.fromkeys(units)) if known else " ".join(units))
    return frozenset(["/".join(words)]) if known else frozenset(" ".join(words).split())


def units_agree(one: Unit | None, other: Unit | None) -> bool:
    """Tell whether two values can be of one unit: one has none, or both the same, or phrases with a common word."""
    return one is None or other is None or bool(one & other) or any(u.startswith("unit") for u in one ^ other)
