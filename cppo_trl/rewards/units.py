"""Units behind a value: what is one, and when two of them agree."""

import re

Unit = frozenset[str]  # the unit in one spelling, or the words of a phrase (red apples) in the singular

SCALES = {"dozen": 12, "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_NAMES = {
    alias: names.split()[0]
    for names in (
        "m meter metre|inch inche in|ft foot feet|yd yard|mi mile|g gram|lb pound|oz ounce|s second sec|min minute|"
        "h hour hr|day|week|month|year yr|L l liter litre|dollar|euro|rupee|cent|yuan|degree|gal gallon|rad radian|"
        "Hz hertz|W watt|V volt|A amp ampere|J joule|N newton|Pa pascal|eV|K kelvin|B byte|bit|mol mole|cal calorie|"
        "Ω ohm|am a.m|pm p.m|unit|rpm|mi/h mph|km/h kmh kph|%"
    ).split("|")
    for alias in names.split()
}
for _bases, _prefixes in (
    ("m g s L l Hz W V A J N Pa eV B mol cal Ω", "n μ m c d k M G T"),
    (
        "meter metre gram liter litre hertz watt volt joule newton pascal byte ampere calorie",
        "nano micro milli centi deci kilo mega giga tera",
    ),
):
    for _base in _bases.split():
        for _prefix, _short in zip(_prefixes.split(), "nμmcdkMGT", strict=True):
            _NAMES.setdefault(_prefix + _base, _short + _NAMES[_base])
_POWERS = {"square": "^2", "sq": "^2", "cubic": "^3", "cu": "^3"}
_IDLE = set("a an the of in per each total more left".split())
UNIT_LETTERS = set("mgshLlNJWVAK")  # a unit only in a style or behind a space: 5 m


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
                units.append(
                    (unit or re.sub(r"(?<=[a-z])e?s$", "", word.lower())) + ("^" + exponent if exponent else power)
                )
        words.append("·".join(dict.fromkeys(units)) if known else " ".join(units))
    return frozenset(["/".join(words)]) if known else frozenset(" ".join(words).split())


def units_agree(one: Unit | None, other: Unit | None) -> bool:
    """Tell whether two values can be of one unit: one has none, or both the same, or phrases with a common word."""
    return one is None or other is None or bool(one & other) or any(u.startswith("unit") for u in one ^ other)
