r"""From a completion or a gold to the text that math-verify compares.

Extraction (:func:`extract_answer`, :func:`extract_gold`) runs in the trainer's process, so it takes time linear in the
text. Normalisation (:func:`normalise`) runs in the workers, under their time limit. Extraction and comparison of
mathematics stay math-verify's; each rule here names the case that made it necessary.
"""

import numbers
import re
from collections.abc import Callable, Collection
from typing import Any

SOURCES = ("boxed", "answer_line")

_BOX_END = re.compile(r"\\.|[{}]", re.DOTALL)
_BARE_BOX = re.compile(r"\s*([^\s{}$]+)")
_ANSWER_LINE = re.compile(r"^[^\w\n]*(?:the )?(?:final )?answer[ \t*_]*[:：]", re.IGNORECASE | re.MULTILINE)
_LINE_BODY = re.compile(r"[\s*_]*(?:\$\$(.*?)\$\$|\\\[(.*?)\\\]|([^\n]*))", re.DOTALL)
_DELIMITED = re.compile(r"(?<!\\)\$([^$]+)(?<!\\)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)


def extract_answer(completion: str, sources: Collection[str] = SOURCES) -> str | None:
    r"""Return the answer a completion ends with, or None if it gives none.

    Only what follows the last ``</think>`` counts where there are thinking tags. Of the last ``\boxed{}`` and the last
    line that starts with ``Answer:``, the later one is the answer; an unfinished box is no answer.
    """
    if "</think>" in completion:
        completion = completion.rpartition("</think>")[2]
    completion = completion.partition("<think>")[0]
    box_at = max(completion.rfind(r"\boxed"), completion.rfind(r"\fbox")) if "boxed" in sources else -1
    line_end = -1
    if "answer_line" in sources:
        for match in _ANSWER_LINE.finditer(completion):
            line_end = match.end()
    if box_at > line_end:
        answer = _box_content(completion, box_at)
    elif line_end >= 0:
        answer = _answer_line(completion, line_end)
    else:
        return None
    return (answer or "").strip() or None


def extract_gold(gold: Any) -> str | None:
    r"""Return the answer that a dataset's gold holds, or None if there is none.

    Args:
        gold: A number, or a text: a bare answer, one in ``$...$`` or ``\boxed{}``, or a worked solution that ends in
            ``#### 42`` or holds its answer in a box or an ``Answer:`` line.
    """
    if isinstance(gold, numbers.Real) and not isinstance(gold, bool):
        try:
            return str(gold) if gold == gold else None  # noqa: PLR0124  (NaN is no answer)
        except ValueError:  # more digits than Python writes
            return None
    if not isinstance(gold, str):
        return None
    if "####" in gold:
        gold = gold.rpartition("####")[2].strip().partition("\n")[0]
    return extract_answer(gold) or (None if r"\boxed" in gold else gold.strip() or None)


def _box_content(text: str, start: int) -> str | None:
    r"""Return what the box command at ``start`` holds, in braces or as in ``\boxed 5``; None if it is not closed."""
    start += len(r"\boxed" if text.startswith(r"\boxed", start) else r"\fbox")
    bare = _BARE_BOX.match(text, start)
    if bare:
        return bare[1].rstrip(".,;")
    depth = 0
    opened = text.find("{", start)
    for match in _BOX_END.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth <= 0:
            return text[opened + 1 : match.start()] if match[0] == "}" else None
    return None


def _answer_line(text: str, start: int) -> str:
    """Return the rest of an ``Answer:`` line, or of the next line if it is empty."""
    match = _LINE_BODY.match(text, start)
    return next(filter(None, match.groups()), "").strip("*_ \t") if match else ""


_SYMBOLS = str.maketrans(
    {
        "–": "-", "—": "-", "−": "-", "‑": "-", "﹣": "-", "，": ",", "．": ".", "：": ":", "％": "%", "＝": "=",
        "（": "(", "）": ")", "\N{NO-BREAK SPACE}": " ", "\N{NARROW NO-BREAK SPACE}": " ", "\N{THIN SPACE}": " ",
        "×": r"\times ", "⋅": r"\cdot ", "·": r"\cdot ", "÷": r"\div ", "√": r"\sqrt ", "∞": r"\infty ", "π": r"\pi ",
        "²": "^2", "³": "^3", "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
        "⅔": r"\frac{2}{3}", "°": r"^\circ ", "≤": r"\leq ", "≥": r"\geq ", "≠": r"\neq ", "∪": r"\cup ",
        "∩": r"\cap ", "∅": r"\emptyset ", "∈": r"\in ", "ℝ": r"\mathbb{R}", "±": r"\pm ", "⁄": "/",
    }
)  # fmt: skip
_NUMBER = r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
_STYLED = r"\\(?:text(?:bf|rm|it|normal)?|math(?:rm|bf|it|sf)|mbox|boldsymbol|bm|operatorname)\s*"
_REWRITES: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    # The case that made a rule necessary stands behind it: what was read wrongly, and as what.
    (r"\\(?:left|right)\.|\\(?:displaystyle|textstyle|left|right)(?![a-zA-Z])\s*", ""),  # \displaystyle 5
    (r"(?<!\\)\\[()]|(?<!\\)\\[\[\]]|\\?\$", ""),  # \(5\) inside a box
    (
        r"(?<![_^])(?<!\\frac)(\d)(?:\\[,!;: ]|\{,\}|,\\!|\s)(?=\d{3}(?!\d))",
        r"\1,",
    ),  # 1\,234 was 235, 100 000 was 0
    (r"(?<!\\)\\[,;:! ]|\\q?quad(?![a-zA-Z])|~", " "),
    (r"\\(?:bf|rm|it|underline|(?:text)?color\s*\{\w+\})(?![a-zA-Z])\s*", ""),  # \underline{17} was no mathematics
    (r"^\{([^{}]*)\}$", r"\1"),  # {\bf 17} was no mathematics
    (rf"^{_STYLED}\{{\s*({_NUMBER}[^{{}}]*?)\s*\}}$", r"\1"),  # \text{12} was a word
    (r"\\varnothing(?![a-zA-Z])", r"\\emptyset "),  # was a symbol of that name
    (r"\\lbrace(?![a-zA-Z])", r"\\{"),  # \lbrace 1,2 \rbrace was no mathematics
    (r"\\rbrace(?![a-zA-Z])", r"\\}"),
    (r"\\langle(?![a-zA-Z])", "("),  # \langle 1,2 \rangle was no mathematics
    (r"\\rangle(?![a-zA-Z])", ")"),
    (r"\\mathbb\s*([A-Z])", r"\\mathbb{\1}"),  # \mathbb R was no mathematics
    (r"(?<![\\a-zA-Z])(pi|sqrt|sin|cos|tan|ln|log)(?![a-zA-Z])", r"\\\1 "),  # 2pi was 2*p*i
    (r"(?<![\\a-zA-Z])(?:infinity|infty)(?![a-zA-Z])", r"\\infty "),  # infinity was a word
    (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),  # \sqrt(13) was no mathematics
    (r"\\sqrt\s*(\d+)", r"\\sqrt{\1}"),  # \sqrt 13 was 3
    (r"\*\*", "^"),  # 2**10 was no mathematics
    (r"\^\s*(-\d+)", r"^{\1}"),  # 10^-3 was no mathematics
    (r"(\d)\s*[xX*]\s*10\s*\^", r"\1\\times 10^"),  # 1.5x10^3 had a variable x
    (r"^(" + _NUMBER + r")[eE]([-+]?\d+)$", r"\1\\times 10^{\2}"),  # 6.02e23 was 6.02*E*23
    # 60.2 \times 10^{22} was not 6.02 \times 10^{23}: floating point numbers are compared to six decimals
    (r"(\d+)\.(\d+)(?=\s*\\(?:times|cdot)\s*10\s*\^)", lambda m: rf"\frac{{{m[1]}{m[2]}}}{{1{'0' * len(m[2])}}}"),
    (r"^([-+]?\d+)\s+(\d+)\s*/\s*(\d+)$", r"\1\\frac{\2}{\3}"),  # 1 3/4 was 1
    (r"(?<![_^]\d)(?<!\\frac\d)(?<=\d)\s+(?=\d)", ","),  # 2 3 was 5
    (r"^([-+]?\d+)_\{?(\d+)\}?$", r"\1\\text{base \2}"),  # 101_2 was 101, and so was 101_3
    (r"(?<=\d)\.$", ""),  # 5. was no mathematics
    (rf"^(?:{_STYLED}\{{)?\s*[aA]ll real(?:s| numbers)\s*\}}?$", r"\\mathbb{R}"),  # was a word
    (rf"^(?:{_STYLED}\{{)?\s*[nN]o (?:real )?solutions?\s*\}}?$", r"\\emptyset"),  # was a word
    (
        rf"^(\d{{1,2}}:\d\d)\s*(?:{_STYLED}\{{)?\s*([aApP])\.?\s?[mM]\.?\s*\}}?$",
        r"\\text{\1 \2m}",
    ),  # 2:30 PM was 2/30*P*M
    (r"\.(\d*?)(\d)\2\2+\s*(?:\.{3}|\\[lc]?dots)$", r".\1\\overline{\2}"),  # 0.333\ldots was 0.333
    (r"(?<![a-zA-Z])C\((\d+),\s*(\d+)\)", r"\\binom{\1}{\2}"),  # C(5,2) was an unknown function
    (r"^\\approx\s*", ""),  # \approx 3.14 was no mathematics
]
_RULES = [(re.compile(pattern), replacement) for pattern, replacement in _REWRITES]
_REPEATING = re.compile(r"([-+]?)(\d*)\.(\d*)\\(?:overline|bar)\s*\{?(\d+)\}?")
_TRIG = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
_DEGREES = re.compile(r"\s*\^\s*\{?\s*\\circ\s*\}?|\\degree(?![a-zA-Z])")
_DEGREES_TAIL = re.compile(rf"(?<=[\d}}])(?:{_DEGREES.pattern})\s*(?:{_STYLED}\{{)?\s*([CF]?)\s*\}}?$")
_THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?!\d|,\d)")
_CURRENCIES = {
    "$": "dollar",
    "USD": "dollar",
    "€": "euro",
    "EUR": "euro",
    "£": "lb",
    "GBP": "lb",
    "₹": "rupee",
    "Rs": "rupee",
}
_MONEY = re.compile(r"\\?(\$|€|£|₹|\b(?:USD|EUR|GBP|Rs)\b)\.?\s*(?=[-+.\d])")
_NUMERALS = {word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())}
_PERCENT_TAIL = re.compile(rf"(?<!%)\s*(?:(?:{_STYLED}\{{\s*)?(?:\bper\s?cent(?:age)?|\bpct|\\?%)\s*\}}?)$")
_STYLED_TAIL = re.compile(r"(?<=[\w})])\s*" + _STYLED + r"\{\s*([^{}]*?)\s*\}((?:\^\{?\d\}?)?)$")
_WORD_TAIL = re.compile(
    rf"((?:^|=\s*)(?:{_NUMBER}|[-+]?\d+\s*/\s*\d+|[-+]?\d*\\[dt]?frac\{{\d+\}}\{{\d+\}}))"
    r"(\s*)([a-zA-Z]+(?:[ ./]+[a-zA-Z]+){0,2}\.?)((?:\^\{?\d\}?)?)$"
)
_WORDS = re.compile(rf"(?:{_STYLED}\{{\s*)?([A-Za-z][A-Za-z0-9 ,.'-]*?)\s*\}}?")
_UNITS = {
    alias: names.split()[0]
    for names in (
        "mm millimeter millimetre|cm centimeter centimetre|m meter metre|km kilometer kilometre|inch inche in|"
        "ft foot feet|yd yard|mi mile|mg milligram|g gram|kg kilogram|lb pound|oz ounce|s second sec|min minute|"
        "h hour hr|day|week|month|year yr|l liter litre|ml milliliter millilitre|dollar|euro|rupee|cent|degree|"
        "mi/h mph|km/h kmh"
    ).split("|")
    for alias in names.split()
}


def normalise(text: str) -> tuple[str, str | None]:
    r"""Return LaTeX that math-verify reads as meant, and the unit that was taken off it.

    The unit is ``"%"``, a known one in one spelling (``"cm^2"``, ``"degree"``), ``""`` for any other
    (``5\text{ apples}``), or None. math-verify's own list of units has ``s``, ``m`` and ``h`` among them, so that it
    takes ``\pi r^2 h`` for ``\pi r^2``; a bare letter is a unit here only in ``5 m``.
    """
    text = " ".join(text.translate(_SYMBOLS).split()).strip("*_ ")
    spans = _DELIMITED.findall(text)
    if len(spans) == 1 and re.search(r"[a-zA-Z]{2}|^\W*$", _DELIMITED.sub("", text)):
        text = "".join(spans[0]).strip()  # "The total is $34$ dollars" in an Answer: line or a gold; $34$ was money
    paid = _MONEY.search(text)
    text = _MONEY.sub("", text)
    if not text.endswith("..."):
        text = text.rstrip(" .,;")
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text).strip()
    if ", " in text or not re.search(r"[(\[]|\\\{", text):  # (1,000, 2) has a thousand, (1,000) perhaps not
        text = _THOUSANDS.sub(lambda number: number[0].replace(",", ""), text)  # 1,234 m was no number
    text, unit = _without_unit(text)
    if repeating := _REPEATING.fullmatch(text):  # 0.\overline{3} was no mathematics
        sign, whole, fixed, repeated = repeating.groups()
        over = int(whole + fixed + repeated) - int(whole + fixed or 0)
        text = rf"{sign}\frac{{{over}}}{{{'9' * len(repeated)}{'0' * len(fixed)}}}"
    if _TRIG.search(text):
        text = _DEGREES.sub(r"\\cdot\\frac{\\pi}{180}", text)  # \sin 30^\circ was the sine of 30 radians
    words = _WORDS.fullmatch(text)
    if words and re.search(r"[A-Za-z]{3}", words[1]) and re.search(r"[aeiouAEIOU]", words[1]):
        parts = sorted(words[1].lower().split(" and "))  # red and blue was not blue and red
        # Evelyn was E*v*e*l*y*n, and so was every anagram; two was t*w*o
        text = _NUMERALS.get(parts[0], rf"\text{{{' and '.join(parts)}}}")
    return text, _CURRENCIES[paid[1]] if paid and unit is None else unit


def units_differ(gold: str | None, answer: str | None) -> bool:
    """Tell whether both sides name a unit and the two are known to differ, as ``5 cm`` and ``5 m`` do."""
    return bool(gold and answer and gold != answer)


def _without_unit(text: str) -> tuple[str, str | None]:
    """Take a trailing unit off."""
    if tail := _PERCENT_TAIL.search(text):
        return text[: tail.start()], "%"
    if (tail := _DEGREES_TAIL.search(text)) and not _TRIG.search(text):
        return text[: tail.start()], "degree" + tail[1].upper()
    if tail := _STYLED_TAIL.search(text):
        value, name, power = text[: tail.start()], tail[1], tail[2]
        is_unit = len(name.split()) < 5 and (
            len(name) > 1 or _canonical_unit(name) != ""
        )  # not 2\mathrm{e}, 2\text{i}
    elif tail := _WORD_TAIL.search(text):
        value, name, power = text[: tail.end(1)], tail[3], tail[4]
        known = (tail[2] or len(name) > 1) and _canonical_unit(name)
        is_unit = bool(known or (tail[2] and re.search(r"[a-z]{3}", name)))  # not 2ab, 3xy, 5m
    else:
        return text, None
    if not is_unit or re.match(r"(?:and|or|is|if|not|but)\b", name):
        return text, None
    return value.strip(), _canonical_unit(name + power.replace("{", "").replace("}", ""))


def _canonical_unit(name: str) -> str:
    """Return one spelling for a known unit, ``""`` for any other."""
    if name.startswith("base "):
        return name
    name = re.sub(
        r"^(square|sq\.?|cubic|cu\.?) (.*)", lambda m: m[2] + ("^2" if m[1][0] == "s" else "^3"), name.lower()
    )
    units = []
    for part in re.split(r"\s*/\s*|\s+per\s+", name.strip(" .")):
        word, caret, power = part.partition("^")
        unit = _UNITS.get(word) or _UNITS.get(word.removesuffix("s"))
        if unit is None:
            return ""
        units.append(unit + caret + power)
    return "/".join(units)
