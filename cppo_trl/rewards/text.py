r"""From the LaTeX and the plain text that people and models write to one spelling.

In the result words stand in double quotes, except bare ones: ``5\text{ cm}`` becomes ``5 "cm"``, ``5 apples`` stays.
"""

import re
from collections.abc import Callable

from cppo_trl.rewards.expressions import FUNCTIONS
from cppo_trl.rewards.units import known_unit
from cppo_trl.rewards.words import WORDS

NUMBER = r"(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
_SPELLINGS = {alias: spelling for spelling, aliases in WORDS["spellings"].items() for alias in aliases.split()}
_SIGNS = str.maketrans({alias: spelling for alias, spelling in _SPELLINGS.items() if not re.match("[a-zA-Z]", alias)})
_UNIT_LETTERS = set("mgshLlNJWVAK")  # a unit only in a style or behind a space: 5 m
_CURRENCY = r"\\?(\$|€|£|₹|¥|\b(?:USD|EUR|GBP|Rs)\b)\.?"
_STYLES = "|".join(WORDS["styles"].split())
_STYLE = re.compile(rf"\\(?:(?:{_STYLES})\*?|(?:text)?color\{{\w+\}})\s*\{{([^{{}}]*)\}}")
_DELIMITED = re.compile(r"(?<!\\)\$\$?([^$]+)(?<!\\)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]")
_LEAD_IN = re.compile(rf"(?i)[^\d:]*(?:\b(?:{'|'.join(WORDS['lead-ins'])})|[:=])\s*|\W*")
_DOUBT = re.compile(rf"(?i)n't\b|\b(?:{'|'.join(WORDS['doubts'])})\b")
_UNIT_BEHIND = re.compile(r"\s*(?!(?:is|are|was|if|and|or|not|but|for|when|where)\b)(?:[a-zA-Z.]+\s*){0,3}[.\s]*")


def _styled(match: re.Match[str]) -> str:
    words = match[1].strip(" ~")
    if words in ("and", "or", *FUNCTIONS):
        return f" {words} "
    before = match.string[: match.start()].rstrip(" ~\\,")[-1:]
    if len(words) < 2 or re.match(r"[-+.\d(]", words) or re.search(r"[\\+=^_<>]", words):
        return f' "{words}" ' if words in _UNIT_LETTERS and re.match(r'[\d})"/]', before) else words
    return f' "{words}" '


def _repeating(match: re.Match[str]) -> str:
    whole, fixed, repeated = match.groups()
    over = int(whole + fixed + repeated) - int(whole + fixed or 0)
    return rf"{{\frac{{{over}}}{{{'9' * len(repeated)}{'0' * len(fixed)}}}}}"


_SPACE = r"(?<!\\)\\[,;:! ]|~"
_THOUSANDS = re.compile(r"(?<![\d,.])[1-9]\d{0,2}(?:,\d{3})+(?!\d|,\d)")
_THOUSANDS_OUTSIDE = re.compile(rf"\([^()]*\)|\[[^\[\]]*\]|\\\{{.*?\\\}}|{_THOUSANDS.pattern}")
_GAP = r"(?:\\[,;:! ]|\{,\}|,\\!|~|\s)"
_SPACED_THOUSANDS = rf"(?<![\d.,^_])(?<!\\frac)(?<!\\frac )[1-9]\d{{0,2}}(?:(?:{_GAP}\s*)\d{{3}})+(?!\d| ?/)"
_WORDS_OR_COMMAND = rf'"[^"]*"|(?<![\\a-zA-Z])({"|".join(FUNCTIONS)}|sqrt|pi|infinity|infty)(?![a-zA-Z])'
_PRICE = rf"{_CURRENCY}\s*([-+]?{NUMBER}(?:/\d+)?)(\s+(?:{'|'.join(WORDS['scales'])})\b)?"
_REWRITES: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"\\(?:left|right)\s*\.", ""),
    (_SPACED_THOUSANDS, lambda m: re.sub(r"\D", "", m[0])),
    (_SPACE, " "),
    (r"\\math(?:bb|bf)\s*\{?\s*R\s*\}?", "ℝ"),
    (r"\\mathbb\s*\{?\s*([A-Z])\s*\}?", r'"\1"'),
    (r"\\([a-zA-Z]+)\s*", lambda m: _SPELLINGS.get(m[1], m[0])),
    (r"(?<!\\)\\(\d)", r"\1"),
    (_PRICE, lambda m: f'{m[2]}{m[3] or ""} "{known_unit(m[1])}"'),
    (rf"(?<![\d,.])({NUMBER})\s*{_CURRENCY}", lambda m: f'{m[1]} "{known_unit(m[2])}"'),
    (r"(?<!\\)\\[()]|(?<!\\)\\[\[\]]|\\?\$", ""),
    (r"\\\{\s*\\\}", r"\\emptyset "),
    (r"\^ ?(?:\{ ?\\prime ?\}|\\prime(?![a-zA-Z]))", "'"),
    (r"\^ ?\{ ?\\circ ?\}", r"^\\circ "),
    (r"\*\*", "^"),
    (r"<=|=<", r"\\leq "),
    (r">=", r"\\geq "),
    (r"!=", r"\\neq "),
    (r"\.{3}", r"\\ldots "),
    (r"(?<!\d)(\d*)\.(\d*)\s*\\(?:overline|bar|dot)\s*\{?(\d+)\}?", _repeating),
    (r"(?<![\d.])(?=[\d.]+\s*\\ldots)(\d*)\.(\d*?)(\d)\3\3+\s*\\ldots(?![a-zA-Z])", _repeating),
    (r"(?<=\d)\s*[xX*]\s*10\s*\^", r"\\times 10^"),
    (r"(?<![\w.])(\d+(?:\.\d*)?|\.\d+)[eE]([-+]?\d+)(?!\w)", r"\1\\times 10^{\2}"),
    (r"(?<![\d.^_])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d.])", r"\1\\frac{\2}{\3}"),
    (r"(?<![_^]\d)(?<!\\frac \d)(?<!\\frac\d)(?<=\d)\s+(?=\d)", ", "),
    (r"(?<![a-zA-Z])C\((\d+),\s*(\d+)\)", r"\\binom{\1}{\2}"),
    (r"^\\approx\s*", ""),
    (_WORDS_OR_COMMAND, lambda m: f"\\{m[1].replace('infinity', 'infty')} " if m[1] else m[0]),
    (r"^(\d\w*)_ ?\{ ?(\d+) ?\}$", r"\1_\2"),
]


def normalize(text: str) -> str:
    """Return a text in one spelling: separators of thousands, styles, currencies and synonyms of commands resolved."""
    text = _out_of_prose(" ".join(text.translate(_SIGNS).split()).strip("*_ "))
    while (styled := _STYLE.sub(_styled, text)) != text:
        text = styled
    for pattern, replacement in _REWRITES:
        text = re.sub(pattern, replacement, text)
    thousands = _THOUSANDS if ", " in text else _THOUSANDS_OUTSIDE  # (1,000, 2) has a thousand, (1,000) perhaps not
    text = thousands.sub(lambda match: match[0] if match[0][0] in "([\\" else match[0].replace(",", ""), text)
    text = " ".join(text.split())
    return text if text.endswith(r"\.") else text.rstrip(" .,;:")


def squash(text: str) -> str:
    """Return a text without the spaces that change nothing."""
    return re.sub(r"\s*([^\w\s\\])\s*|\s+(?=\\)", r"\1", text)


def _out_of_prose(text: str) -> str:
    """Take one formula out of the sentence that gives it as the answer; no other sentence gives up its formulas."""
    formulas = list(_DELIMITED.finditer(text))
    if len(formulas) == 1:
        before, after = text[: formulas[0].start()], text[formulas[0].end() :]
        if _LEAD_IN.fullmatch(before) and not _DOUBT.search(before) and _UNIT_BEHIND.fullmatch(after):
            text = formulas[0][0] + after
    return _DELIMITED.sub(lambda m: f" {m[1] or m[2] or m[3]} ", text).strip()
