r"""What an answer states: a value, several of them, a set of real numbers, an equation, or words.

A text is split at its separators and relations, units are taken off, and what remains is left to
:mod:`cppo_trl.rewards.expressions`. A text that states nothing of the kind is a string, equal to itself only. So are
tasks that are not carried out (integrals, sums, limits): repeating the question earns nothing.
"""

import contextlib
import re
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise
from random import Random
from typing import Any

from mpmath import mp, mpf

from cppo_trl.rewards.expressions import GREEK, Number, UndefinedError, UnreadableError, evaluate
from cppo_trl.rewards.regions import EMPTY, REALS, Region, combined, solutions
from cppo_trl.rewards.text import NUMBER, normalize, squash
from cppo_trl.rewards.units import Unit, known_unit, unit_of
from cppo_trl.rewards.words import WORDS

POINTS = [(0.2, 3), (2, 9), (-3, -0.2), (-30, 30), (50, 500)]  # between which lie the numbers for symbols
WHOLE_POINTS = 40  # whole numbers on top, for what is rounded
MAX_DEPTH = 40  # of brackets
MAX_ITEMS = 200


@dataclass(frozen=True)
class Scalar:
    """An expression, and the unit behind it; ``cut`` is a decimal with an ellipsis behind it."""

    text: str
    unit: Unit | None = None
    cut: bool = False

    @property
    def symbols(self) -> frozenset[str]:
        """The names in the expression."""
        return _computed(self.text, 50, 0)[1]

    @property
    def decimal(self) -> tuple[int, int] | None:
        """The numbers of significant digits and of decimal places, None of what is no decimal."""
        match = _DECIMAL.fullmatch(self.text)
        return match and (len((match[1] + match[2]).lstrip("0")), len(match[2]) - int(match[3] or 0))

    def value(self, digits: int = 50, place: int = 0) -> Number:
        """Return the value at one of the points, which are numbers for the symbols; raises UndefinedError."""
        return _computed(self.text, digits, place)[0]


@dataclass(frozen=True)
class Many:
    """Several values: ``","`` (a bare list), ``"{}"``, ``"()"`` and the like, ``"matrix"``, ``"row"``, ``":"``."""

    kind: str
    items: tuple[Any, ...]


@dataclass(frozen=True)
class Named:
    """A value and the name it is given: ``x = 5``, ``f(2) = 4``."""

    name: str
    value: Any


@dataclass(frozen=True)
class Relation:
    r"""An equation or inequality that is not solved: the difference is ``=``, ``<``, ``\leq`` or ``\neq`` 0."""

    sign: str
    difference: Scalar


@lru_cache(maxsize=16384)
def _computed(text: str, digits: int, place: int) -> tuple[Number, frozenset[str]]:
    """Return the value of an expression at one of the points, and the names in it."""
    names: dict[str, Number] = {}
    return evaluate(text, lambda name: names.setdefault(name, _sample(name, place)), digits), frozenset(names)


@cache
def _sample(name: str, place: int) -> Number:
    if place >= len(POINTS):
        return mpf(place - len(POINTS) + Random(name).randint(1, 9))
    return mpf(Random(f"{name} {place}").uniform(*POINTS[place]))


@lru_cache(maxsize=16384)
def read(text: str) -> tuple[Any, str]:
    """Return what an answer states, and its text in one spelling.

    Raises:
        UnreadableError: If it is not even words: without letters and digits, or with brackets that do not match.
        UndefinedError: If it has no value, as ``1/0`` and ``2 + 2 = 5``.
    """
    text = normalize(text)
    _outside(text)  # the brackets match
    if not re.search(r"\w", text):
        raise UnreadableError
    return _statements(text), squash(text)


_PARTS = re.compile(r'"[^"]*"|\\begin\{[a-z]*\*?\}|\\end\{[a-z]*\*?\}|\\[a-zA-Z]+|\\.|.')
_BRACKETS = {**dict.fromkeys(["(", "[", "{", r"\{", r"\beg"], 1), **dict.fromkeys([")", "]", "}", r"\}", r"\end"], -1)}


def _outside(text: str) -> str:
    """Return a text with what is inside brackets blotted out; raises UnreadableError if they do not match."""
    outside, depth = "", 0
    for part in _PARTS.findall(text):
        before, depth = depth, depth + _BRACKETS.get(part[:4], 0)
        if not 0 <= depth <= MAX_DEPTH:
            raise UnreadableError
        outside += "\0" * len(part) if before and depth else part
    if depth:
        raise UnreadableError
    return outside


def _split(text: str, separators: str) -> tuple[list[str], list[str]]:
    """Split at separators outside all brackets; returns the pieces and the separators between them."""
    signs = list(re.finditer(separators, _outside(text))) if re.search(separators, text) else []
    starts, ends = [0, *(sign.end() for sign in signs)], [*(sign.start() for sign in signs), len(text)]
    pieces = [text[start:end].strip() for start, end in zip(starts, ends, strict=True)]
    return pieces, [sign[0].strip() for sign in signs]


def _statements(text: str) -> Any:
    pieces, separators = _split(text, r"[,;]|\b(?:and|or)\b")
    try:
        return _together([_statement(piece) for piece in pieces if piece], set(separators))
    except UnreadableError:
        return _words(text)


def _words(text: str) -> str:
    plain = text.replace('"', "").strip(" .,;:!")
    return squash(plain if re.search(r"[\\^_=<>]", plain) else re.sub(r"^(?:the|an?) ", "", plain.lower()))


def _known_words(text: str) -> Any:
    """Return the value of words that have one."""
    plain = text.replace('"', "").strip(" .()").lower()
    if plain in WORDS["numerals"]:
        return Scalar(str(WORDS["numerals"].index(plain)))
    if re.fullmatch(r"(?:there (?:is|are) )?no (?:real )?solutions?|(?:the )?empty set|\\emptyset", plain):
        return EMPTY
    return REALS if re.fullmatch(r"ℝ|(?:the )?(?:set of )?(?:all )?reals?(?: numbers)?", plain) else None


def _together(values: list[Any], separators: set[str]) -> Any:
    """Return what several statements state together."""
    items = _flat(values)
    if len(items) == 1:
        return items[0]
    if not 0 < len(items) <= MAX_ITEMS:
        raise UnreadableError
    names = {item.name if isinstance(item, Named) else isinstance(item, Scalar) or None for item in items}
    regions = [item.value for item in items if isinstance(item, Named) and isinstance(item.value, Region)]
    if len(regions) == len(items) and len(names) == 1:
        if separators == {"or"}:
            return Named(items[0].name, combined(regions, any))
        if separators == {"and"} or all(region.cells() == [False, True, True] for region in regions):  # x != 1, x != 2
            return Named(items[0].name, _not_empty(combined(regions, all)))
    if not regions and isinstance(items[0], Named) and names <= {items[0].name, True}:  # x = 1, 2 and x = 1 or x = 2
        items = [item.value if isinstance(item, Named) else item for item in items]
    return Many(",", tuple(items))


def _flat(values: list[Any]) -> list[Any]:
    """Return the values, those of bare lists one by one."""
    lists = [value.items if isinstance(value, Many) and value.kind == "," else [value] for value in values]
    return [item for items in lists for item in items]


_TASKS = re.compile(r"\\(?:int|iint|oint|sum|prod|lim|equiv|begin\{cases\}|begin\{vmatrix\})")
_MIRRORED = {"<": ">", ">": "<", r"\leq": r"\geq", r"\geq": r"\leq", r"\neq": r"\neq"}
_IN_BARS = re.compile(r"\|\s*([^|]+)\|\s*(<|>|\\leq|\\geq)(.+)")


def _statement(text: str) -> Any:
    """Read an equation, an inequality or a value."""
    if _TASKS.search(text):
        raise UnreadableError
    if text.count(r"\pm") == 1 or (r"\mp" in text and text.count(r"\pm") < 2):
        both = [text.replace(r"\pm", sign).replace(r"\mp", other) for sign, other in ("+-", "-+")]
        return _together([_statement(one) for one in both], {","})
    if (bars := _IN_BARS.fullmatch(text)) and _name(bars[1].strip()):  # |x| < 3
        name, sign, bound = bars.groups()
        beyond = f"{name} {_MIRRORED[sign]} -({bound}) or {name} {sign} {bound}"
        return _statements(beyond if sign in (">", r"\geq") else f"-({bound}) {sign} {name} {sign} {bound}")
    sides, signs = _split(text, r"<|>|=|\\(?:leq|geq|neq|approx|in)(?![a-zA-Z])")
    if not signs:
        return _item(text)
    if signs == [r"\in"]:
        name, value = _name(sides[0]), _item(sides[1])
        return Named(name, value) if name and isinstance(value, Region) else value
    return _equation(sides, signs) if set(signs) <= {"=", r"\approx"} else _inequality(sides, signs)


def _equation(sides: list[str], signs: list[str]) -> Any:
    name = _name(sides[0])
    if name is None and len(sides) == 2 and (name := _name(sides[1])):
        sides = sides[::-1]
    values = [_item(side) for side in sides[bool(name) :]]
    if name:
        signs = signs[1:]
        if any(isinstance(value, Scalar) and name in value.symbols for value in values):
            raise UndefinedError  # x = x + 1
    elif not all(isinstance(value, Scalar) for value in values):
        raise UnreadableError
    elif len(sides) == 2 and (values[0].symbols or values[1].symbols):
        return Relation("=", Scalar(f"({values[0].text})-({values[1].text})"))
    first = signs.index(r"\approx") if r"\approx" in signs else len(signs)
    stated, rounded = values[: first + 1], values[first + 1 :]
    if len(stated) > 1 and not all(map(_is_constant, stated)):
        raise UnreadableError
    equal = all(same_number(*pair) for pair in pairwise(stated))
    if not equal or not all(_is_near(stated[-1], value) for value in rounded):
        raise UndefinedError  # 2 + 2 = 5
    return Named(name, stated[-1]) if name else stated[-1]


def _is_constant(value: Any) -> bool:
    return isinstance(value, Scalar) and not value.symbols


def _is_near(exact: Any, rounded: Any) -> bool:
    """Tell whether a decimal differs from a number by less than its last place; true of what is no decimal."""
    if not isinstance(rounded, Scalar) or not rounded.decimal or not _is_constant(exact):
        return isinstance(rounded, Scalar)
    return abs(exact.value() - rounded.value()) <= mpf(10) ** -rounded.decimal[1]


def _inequality(sides: list[str], signs: list[str]) -> Any:
    bounds = [None if _name(side) else real(_item(side)) for side in sides]
    if None not in bounds:
        raise UndefinedError  # 0 < 1
    chain = len(sides) == 3 and bounds[1] is None and set(signs) <= set(_MIRRORED)
    solved = bounds.count(None) == 1 and (len(sides) == 2 or chain)
    if solved and (name := _name(sides[bounds.index(None)])):
        parts = [
            solutions(sign, right) if left is None else solutions(_MIRRORED[sign], left)
            for left, sign, right in zip(bounds[:-1], signs, bounds[1:], strict=True)
        ]
        return Named(name, _not_empty(combined(parts, all)))
    values = [_item(side) for side in sides]
    if len(values) > 2 or not all(isinstance(value, Scalar) for value in values):
        raise UnreadableError
    if signs[0] in (">", r"\geq"):
        signs, values = [_MIRRORED[signs[0]]], values[::-1]
    return Relation(signs[0], Scalar(f"({values[0].text})-({values[1].text})"))


def _not_empty(region: Region) -> Region:
    if not any(region.cells()):
        raise UndefinedError  # x < 1 and x > 2
    return region


def same_number(left: Scalar, right: Scalar) -> bool:
    """Tell whether two expressions have one value: at the points where both are real, or else where both have one."""
    symbolic = left.symbols | right.symbols
    places = len(POINTS) + (WHOLE_POINTS if re.search(r"\\l(?:floor|ceil)", left.text + right.text) else 0)
    pairs = {}
    for place in range(places if symbolic else 1):
        with contextlib.suppress(UndefinedError):
            pairs[place] = left.value(50, place), right.value(50, place)
    real_pairs = {place: pair for place, pair in pairs.items() if mp.im(pair[0]) == 0 == mp.im(pair[1])}
    pairs = real_pairs if len(real_pairs) > 1 else pairs
    place, digits = min(pairs, default=0), 100 if symbolic else 1000
    same = bool(pairs) and all(close(*pair, 50) for pair in pairs.values())
    return same and close(left.value(digits, place), right.value(digits, place), digits)


def close(left: Number, right: Number, digits: int) -> bool:
    """Tell whether two values of so many digits are the same."""
    with mp.workdps(digits):
        if mp.isinf(left) or mp.isinf(right):
            return bool(left == right)
        small, large = sorted([abs(left), abs(right)])
        noise = mpf(10) ** (15 - digits)
        return bool(abs(left - right) <= noise * large or large <= noise * (1 if small == 0 else 1e-10))


def real(value: Any) -> Any:
    """Return the value of a real constant, None of anything else."""
    number = value.value() if _is_constant(value) else 1j
    return number if mp.im(number) == 0 else None


_SUBSCRIPT = r"(?:_(?:\{(?:[^{}]|\{[^{}]*\})*\}|\\?\w))?"
_LETTER = rf"(?:[a-zA-Z]|\\(?:{'|'.join(sorted(GREEK))})(?![a-zA-Z]))"
_NAME = re.compile(
    rf"(?:{_LETTER}|m?\s*\\(?:angle|triangle)\s*[A-Z]+|\\(?:vec|overrightarrow|hat|bar|overline|tilde)\s*(?:\{{[^{{}}]*\}}|\w)"
    rf'|[A-Z]{{2,4}}|"[^"]+"|\\frac\s*\{{\s*d\s*\w\s*\}}\s*\{{\s*d\s*\w\s*\}}|\\(?:sin|cos|tan)\s*{_LETTER}){_SUBSCRIPT}'
    rf"(?:'|\^\{{?-1\}}?)*(?P<call>\s*\([^()=<>]*\))?"
    rf"|\(\s*{_LETTER}{_SUBSCRIPT}(?:\s*,\s*{_LETTER}{_SUBSCRIPT})+\s*\)"
)
_FACTORS = "abcdeiklmnorstuvxyz"  # before parentheses a factor, unless these hold one number or t


def _name(text: str) -> str | None:
    """Return the name that a text is: a letter, a call, a segment, a derivative, words or a tuple of letters."""
    name = _NAME.fullmatch(text)
    product = name and name["call"] and text[0] in _FACTORS and not re.fullmatch(r" *\( *(?:t|\d+) *\)", name["call"])
    return re.sub(r'[\s{}"]', "", text) if name and not product else None


_SET_SIGNS = {r"\cup": any, r"\cap": all, r"\setminus": lambda held: held == [True, False]}
_END_SIGNS = {"(": ">", "[": r"\geq", ")": "<", "]": r"\leq"}


def _item(text: str) -> Any:
    """Read one value: a scalar, brackets and what is in them, a union, a matrix or words."""
    if (known := _known_words(text)) is not None:
        return known
    pieces, signs = _split(text, r"\\(?:cup|cap|setminus)(?![a-zA-Z])")
    if signs:
        return _set_operation([_item(piece) for piece in pieces], signs)
    if r"\begin" in text:
        return _matrix(text)
    if brackets := _IN_BRACKETS.fullmatch(_outside(text)):
        opening, closing = brackets.groups()
        value = _bracketed(opening, text[len(opening) : -len(closing)].strip(), closing)
        if value is not None:
            return value
    return _words(text) if _WORDS.fullmatch(text) else _number(text)


_IN_BRACKETS = re.compile(r"(\(|\[|\\?\{)\0*(\)|\]|\\?\})")
_WORDS = re.compile(
    r"\d\w*_(?:\{\d+\}|\d+)"  # 101_2: a number in another base equals itself only
    r'|(?=[a-zA-Z"])(?:(?=.*")|[Nn]o$|(?=.*[a-zA-Z]{3})(?=.*[aeiouyAEIOUY]))[^\\^_=+*/<>|]*'
)


def _number(text: str) -> Any:
    """Read a scalar or a ratio; two numbers that may be a time stay apart."""
    pieces, signs = _split(text, ":")
    if not signs:
        return _scalar(text)
    if len(signs) == 1 and not re.fullmatch(r"\d{1,2}\s*:\s*[0-5]\d\b.*", text):
        return _scalar(f"({pieces[0]})/({pieces[1]})")
    return Many(":", tuple(_scalar(piece) for piece in pieces))


def _set_operation(values: list[Any], signs: list[str]) -> Any:
    regions = [region_of(value) for value in values]
    result = regions[0]
    for sign, region in zip(signs, regions[1:], strict=True):
        result = result and region and combined([result, region], _SET_SIGNS[sign])
    if result is None and set(signs) != {r"\cup"}:
        raise UnreadableError
    return result or Many("{}", tuple(values))


def region_of(value: Any) -> Region | None:
    """Return a value as a set of real numbers, or None if it is none."""
    if isinstance(value, Region) or not isinstance(value, Many):
        return value if isinstance(value, Region) else None
    ends = [real(item) for item in value.items]
    if not ends or None in ends:
        return None
    if value.kind == "{}" and all(map(mp.isfinite, ends)):
        return combined([solutions("=", end) for end in ends], any)
    if set(value.kind) <= set(_END_SIGNS) and len(ends) == 2 and ends[0] < ends[1]:
        halves = [solutions(_END_SIGNS[mark], end) for mark, end in zip(value.kind, ends, strict=True)]
        return combined(halves, all)
    return None


def _bracketed(opening: str, inside: str, closing: str) -> Any:
    """Read a set, an interval, a tuple; None if the brackets only group a scalar."""
    if opening in (r"\{", "{"):
        head, signs = _split(inside, r"[|:]")
        if signs and (_name(head[0]) or r"\in" in head[0]):
            condition = _statements(inside[inside.index(signs[0], len(head[0])) + 1 :].replace(",", " and "))
            solved = isinstance(condition, Named) and isinstance(condition.value, Region)
            return condition.value if solved else re.sub(r"\s", "", f"{{{inside}}}")
    pieces, signs = _split(inside, "[,;]")
    items = [_statement(piece) for piece in pieces] if signs or opening == r"\{" else []
    if opening == r"\{" or (opening == "{" and signs):
        return Many("{}", tuple(_flat(items)))
    if signs:
        return Many(opening + closing, tuple(items))
    return _item(inside) if r"\begin" in inside else None


_MATRIX = re.compile(r"\[?\s*\\begin\{([pb]?matrix|array|smallmatrix)\}(?:\s*\{[lcr|\s]*\})?(.*)\\end\{\1\}\s*\]?")


def _matrix(text: str) -> Many:
    match = _MATRIX.fullmatch(text)
    if not match or r"\begin" in match[2]:
        raise UnreadableError
    rows = [tuple(_item(cell.strip()) for cell in row.split("&")) for row in match[2].split(r"\\") if row.strip()]
    return Many("matrix", tuple(Many("row", row) for row in rows))


_PLAIN_VALUE = rf"[-+]?\s*(?:{NUMBER}|\d+\s*/\s*\d+|\d*\\frac\s*\{{\d+\}}\s*\{{\d+\}})\.?"
_EXPONENT = r"(?:\s*\^\s*\{?\s*-?\d\s*\}?)?"
_PERCENT = re.compile(r'(.*[\d)}.])\s*(?:\\?%|"?\s*(?:percent|per cent|pct|percentage)\s*"?)')
_DEGREE = re.compile(r'((?!.*\\(?:sin|cos|tan|cot|sec|csc)).*[\d}])\s*\^\s*\\circ\s*"?\s*([CF]?)\s*"?')
_STYLED_UNIT = re.compile(
    rf'(.*?[\w)}}!\]])\s*("[^"]+"{_EXPONENT}(?:\s*(?:(?:/|\\cdot)\s*(?:"[^"]+"|[a-zA-Z]+)|"[^"]+"){_EXPONENT})*)'
)
_WORD = r"[a-zA-Z']+(?:-[a-zA-Z]{2,})*\.?"  # 3ns-s^2 has no unit
_PHRASE = rf"{_WORD}(?:[ /.]{_WORD}){{0,4}}"
_PLAIN_UNIT = re.compile(rf'({_PLAIN_VALUE})(\s*)({_PHRASE}{_EXPONENT}(?:\s*"[^"]*")?|\(\s*["a-zA-Z][^()\\=+*^]*\))')
_NO_UNIT = re.compile(r"(?:and|or|is|if|not|but|more|less|then)\b")
_PROSE = re.compile(r"(?<![\\a-zA-Z])(?:[a-zA-Z]{2,}\s+[a-zA-Z]{2,}|[a-zA-Z]{5,})")


def _strip_unit(text: str) -> tuple[str, str]:
    """Take the unit off a value; returns the value and the words of the unit, if any."""
    if tail := _PERCENT.fullmatch(text):
        return tail[1], "%"
    if tail := _DEGREE.fullmatch(text):
        return tail[1], "degree" + tail[2]
    spaced = " "
    if tail := _PLAIN_UNIT.fullmatch(text):
        value, spaced, unit = tail.groups()
    elif tail := _STYLED_UNIT.fullmatch(text):
        value, unit = tail.groups()
    else:
        return text, ""
    unit = re.sub(r'["\s{}()]+', " ", unit.replace(r"\cdot", " ").replace(".", ""))
    unit = re.sub(r" ?\^ ?", "^", unit).strip()
    if _NO_UNIT.match(unit):
        raise UnreadableError
    word = re.split(r"[^a-zA-Z]", unit)[0]
    known = (spaced or len(word) > 1) and (known_unit(word) or word in ("st", "nd", "rd", "th"))
    word_like = re.search("[a-zA-Z]{3}" if spaced else r"\([^)]*[a-zA-Z]{4}", text)
    return (value, unit) if known or '"' in text or word_like else (text, "")


_POWER_OF_TEN = r"\\(?:times|cdot)\s*10\s*\^\s*\{?\s*([-+]?\d+)\s*\}?"
_DECIMAL = re.compile(rf"[-+]?\s*(\d*)\.?(\d*)\s*(?:\\ldots)?(?:\s*{_POWER_OF_TEN})?")


def _scalar(text: str) -> Scalar:
    value, unit = _strip_unit(text)
    if _PROSE.search(value):
        raise UnreadableError
    first, _, rest = unit.partition(" ")
    if first.lower() in WORDS["scales"]:
        value, unit = f"({value}){WORDS['scales'][first.lower()]}", rest
    cut = bool(_DECIMAL.fullmatch(value)) and r"\ldots" in value
    scalar = Scalar(value.replace(r"\ldots", "") if cut else value, unit_of(unit) if unit else None, cut)
    scalar.value()  # it has one
    return scalar
