r"""The value of a scalar expression in LaTeX, to any number of digits.

Nothing here runs for long: values and factorials have bounds, and past them an expression is undefined.
"""

import re
from collections.abc import Callable
from operator import add, mul, sub, truediv
from typing import Any

from mpmath import mp, mpf

from cppo_trl.rewards.words import WORDS

Number = Any  # mpf, or mpc where it is not real
GREEK = set(WORDS["greek"].split())
ACCENTS = set(WORDS["accents"].split())
FUNCTIONS: dict[str, Callable[..., Number]] = {name: getattr(mp, its) for name, its in WORDS["functions"].items()}
INFINITY = r"\infty"
_CONSTANTS = {r"\pi": mp.pi, "e": mp.e, "i": mp.mpc(0, 1), INFINITY: mp.inf}
_HEADS = {"frac", "binom", "sqrt", "pi", "infty", "lfloor", "lceil", *FUNCTIONS, *GREEK, *ACCENTS}
_TOKEN = re.compile(r"[0-9]+\.?[0-9]*|\.[0-9]+|\\[a-zA-Z]+|\\.|\S")
_CLOSING = {"(": ")", "[": "]", "{": "}", "|": "|", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}
_NO_ARGUMENT = {"(", "[", *("\\" + name for name in FUNCTIONS)}  # sin x (y): the product of sin x and y
_UNKNOWN_FUNCTIONS = set("fghFGH")
_MAX_BITS = 3000  # of a value; answers are compared to 1,000 digits
_MAX_FACTORIAL = 400


class UnreadableError(Exception):
    """The text is no expression."""


class UndefinedError(ArithmeticError):
    """The expression has no finite value, or one too large to work with."""


def _power(base: Number, exponent: Number) -> Number:
    with mp.workprec(53):
        if base != 0 and abs(exponent * mp.log(abs(base), 2)) > _MAX_BITS:
            raise UndefinedError
    return base**exponent


def _root(value: Number, degree: Number) -> Number:
    if mp.im(value) == 0 > mp.re(value) and mp.isint((degree - 1) / 2):
        return -_power(-value, 1 / degree)  # the real one
    return _power(value, 1 / degree)


def _factorial(value: Number) -> Number:
    if abs(value) > _MAX_FACTORIAL or (mp.dps > 100 and not mp.isint(value)):  # which would take seconds
        raise UndefinedError
    return mp.factorial(value)


def _binomial(top: Number, bottom: Number) -> Number:
    return _factorial(top) / _factorial(bottom) / _factorial(top - bottom)


def _floor(value: Number) -> Number:
    nearest = mp.nint(value)
    return nearest if abs(nearest - value) < mpf(10) ** (10 - mp.dps) else mp.floor(value)


_SUMS = {"+": add, "-": sub}
_PRODUCTS = {"*": mul, r"\cdot": mul, r"\times": mul, "/": truediv, r"\div": truediv}
_OF_TWO = {r"\frac": truediv, r"\binom": _binomial}
_OF_GROUPS = {"|": abs, r"\lfloor": _floor, r"\lceil": lambda value: -_floor(-value)}


class _Evaluator:
    """A recursive descent over the tokens, which computes as it reads."""

    def __init__(self, text: str, value_of: Callable[[str], Number]):
        self.tokens = _TOKEN.findall(text)
        self.at = 0
        self.in_bars = False
        self.value_of = value_of

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self) -> str:
        if not self.peek():
            raise UnreadableError
        self.at += 1
        return self.tokens[self.at - 1]

    def skip(self, token: str) -> bool:
        found = self.peek() == token
        self.at += found
        return found

    def sum(self) -> Number:
        value = self.product()
        while self.peek() in _SUMS:
            value = _SUMS[self.take()](value, self.product())
        return value

    def product(self) -> Number:
        value = self.signed()
        while self.peek() in _PRODUCTS or self.starts_factor():
            if self.peek() in _PRODUCTS:
                value = _PRODUCTS[self.take()](value, self.signed())
            else:
                value *= self.power()
        return value

    def starts_factor(self) -> bool:
        """Tell whether a factor follows without a sign of multiplication: a number only behind ``)``, not as in x2."""
        token = self.peek()
        if token[:1].isdigit():
            return self.tokens[self.at - 1] == ")"
        return token != "|" * self.in_bars and (token in _CLOSING or token.isalpha() or token[1:] in _HEADS)

    def signed(self) -> Number:
        if self.peek() in ("+", "-"):
            return -self.signed() if self.take() == "-" else self.signed()
        return self.power()

    def power(self) -> Number:
        value = self.primary()
        while self.peek() in ("!", "^"):
            if self.take() == "!":
                value = _factorial(value)
            elif self.skip(r"\circ"):
                value = value * mp.pi / 180
            else:
                value = _power(value, self.signed())
        return value

    def primary(self) -> Number:
        token = self.take()
        if re.match(r"\.?[0-9]", token):
            return self.number(token)
        if token in _CLOSING:
            return self.group(token)
        if (token.isascii() and token.isalpha()) or token[1:] in GREEK or token in _CONSTANTS:
            return self.name(token)
        return self.command(token)

    def group(self, opening: str) -> Number:
        outer, self.in_bars = self.in_bars, opening == "|"
        value = self.sum()
        if not self.skip(_CLOSING[opening]):
            raise UnreadableError
        self.in_bars = outer
        return _OF_GROUPS[opening](value) if opening in _OF_GROUPS else value

    def command(self, token: str) -> Number:
        if token in _OF_TWO:
            return _OF_TWO[token](self.argument(), self.argument())
        if token == r"\sqrt":
            degree = self.primary() if self.peek() == "[" else mpf(2)
            return _root(self.primary(), degree)
        if token[1:] in FUNCTIONS:
            return self.function(token[1:])
        if token[1:] in ACCENTS:
            return self.name(token + self.raw())
        raise UnreadableError

    def number(self, token: str) -> Number:
        value = mpf(token)
        start = self.at
        if token.isdigit() and self.skip(r"\frac"):  # a mixed number, if its fraction is one of two numbers
            top, bottom = self.argument(), self.argument()
            if all(not part.isalpha() for part in self.tokens[start + 1 : self.at]) and 0 < top < bottom:
                return value + top / bottom
            self.at = start
        return value

    def argument(self) -> Number:
        r"""Return what stands after ``\frac``: a group, or a single digit, letter or command."""
        token = self.peek()
        if token.isdigit():
            self.tokens[self.at : self.at + 1] = filter(None, [token[0], token[1:]])
            return mpf(self.take())
        return self.primary()

    def function(self, name: str) -> Number:
        base = exponent = None
        while self.peek() in ("_", "^"):
            if self.take() == "_":
                base = self.primary()
            else:
                exponent = self.signed()
        bracketed = self.peek() in _CLOSING
        argument = self.primary() if bracketed else self.signed()
        while not bracketed and self.starts_factor() and self.peek() not in _NO_ARGUMENT:
            argument *= self.power()
        if exponent == -1:
            name, exponent = "arc" + name, None
        if name not in FUNCTIONS or (base is not None and name != "log"):
            raise UnreadableError
        if name not in ("ln", "log", "lg") and abs(argument) > 2000:
            raise UndefinedError
        value = FUNCTIONS[name](argument) if base is None else mp.ln(argument) / mp.ln(base)
        return value if exponent is None else _power(value, exponent)

    def name(self, token: str) -> Number:
        letter = token
        while self.peek() in ("_", "'"):
            token += "'" if self.take() == "'" else "_" + self.raw()
        if token in _CONSTANTS:
            return +_CONSTANTS[token]
        value = self.value_of(token)
        if letter in _UNKNOWN_FUNCTIONS and self.peek() == "(":
            value = mp.cos(value * self.primary() + value)  # some number that depends on the function and the argument
        return value

    def raw(self) -> str:
        """Return the next group or token as it is written."""
        start, depth = self.at, 0
        while True:
            depth += {"{": 1, "}": -1}.get(self.take(), 0)
            if depth <= 0:
                return "".join(self.tokens[start : self.at]).strip("{}")


def evaluate(text: str, value_of: Callable[[str], Number], digits: int) -> Number:
    """Return the value of an expression.

    Args:
        text: LaTeX as from ``normalize``.
        value_of: Gives a name its value.
        digits: Decimal digits to compute with.

    Raises:
        UnreadableError: If the text is no expression.
        UndefinedError: If it has no finite value, or one that is too large. A bare infinity has one.
    """
    with mp.workdps(digits):
        evaluator = _Evaluator(text, value_of)
        try:
            value = evaluator.sum()
            if evaluator.peek():
                raise UnreadableError
            if evaluator.tokens in ([INFINITY], ["-", INFINITY], ["+", INFINITY]):
                return value
            bits = mp.mag(value)
            tiny = value != 0 and bits < -_MAX_BITS and digits < 1000  # with more, it is what a difference leaves
            if not mp.isfinite(value) or bits > _MAX_BITS or tiny:
                raise UndefinedError
            noise = mpf(10) ** (10 - digits) * (1 + abs(mp.re(value)))
            return mp.re(value) if abs(mp.im(value)) <= noise else value
        except (ArithmeticError, ValueError, TypeError, RecursionError) as error:
            raise UndefinedError from error
