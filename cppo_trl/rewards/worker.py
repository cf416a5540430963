"""The process that parses and compares answers: one JSON line in per chunk, one JSON line out per answer.

It is started by :mod:`cppo_trl.rewards.checker`, imports math-verify and sympy but never torch, and may be killed at
any moment. Three things end it without its parent's help: end of file on its socket, the death of the parent
(Linux), and an alarm with the default action, which works even while C code holds the interpreter.
"""

import json
import logging
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

from cppo_trl.rewards.answers import normalise, units_differ

GRACE_S = 2.0  # the parent's deadline comes first; the alarm is for when there is no parent left
SHOWN_CHARS = 200
PR_SET_PDEATHSIG = 1
_LATEX = [
    LatexExtractionConfig(
        boxed_match_priority=-1,  # boxes are opened before; units are ours (answers.py says why)
        normalization_config=NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="none"),
    )
]


_FLAT_SET = re.compile(r"\\\{[^()\[\]{}]*\\\}")
_FLAT_TUPLE = re.compile(r"[(\[][^()\[\]{}]*[)\]]")
_ASSIGNED = re.compile(r"\s*([a-zA-Z])\s*=([^=]+)")
_WORTH = {"%": sympy.Rational(1, 100), "degree": sympy.pi / 180}


@dataclass(frozen=True)
class _Parsed:
    latex: str
    unit: str | None
    found: list[Any]  # math-verify's: the expression and its text; empty if there is no expression
    shown: str | None


@lru_cache(maxsize=4096)
def _parsed(text: str) -> _Parsed:
    latex, unit = normalise(text)
    found = parse(f"${latex}$", _LATEX, parsing_timeout=None)
    if not found or isinstance(found[0], str):
        return _Parsed(latex, unit, [], None)
    if isinstance(found[0], sympy.Expr):  # (1+i)^2 was not 2i: the parser takes i for a name
        found[0] = found[0].subs({name: sympy.I for name in found[0].free_symbols if name.name == "i"})
    return _Parsed(latex, unit, found, str(found[0])[:SHOWN_CHARS])


def compare(
    gold_text: str, answer_text: str, gold_read: Callable[[], object] = bool
) -> tuple[str, str | None, str | None]:
    """Compare two answers.

    Args:
        gold_text: As from ``extract_gold``.
        answer_text: As from ``extract_answer``.
        gold_read: Called once the gold is parsed and evaluated.

    Returns:
        Why (``"equal"`` if they are), the parsed gold and the parsed answer.
    """
    try:
        gold = _parsed(gold_text)
        if gold.found and isinstance(gold.found[0], sympy.Expr):
            gold.found[0].doit()
    except (ValueError, ArithmeticError, RecursionError, TypeError):
        gold = _Parsed("", None, [], None)
    gold_read()
    if not gold.found:
        return "unparseable_gold", None, None
    answer = _parsed(answer_text)
    if not answer.found:
        return "unparseable_answer", gold.shown, None
    return "equal" if _equal(gold, answer) else "different", gold.shown, answer.shown


def _equal(gold: _Parsed, answer: _Parsed) -> bool:
    if units_differ(gold.unit, answer.unit):
        return False
    gold, answer = _in_order(gold, answer), _in_order(answer, gold)
    if _FLAT_SET.fullmatch(gold.latex) and _FLAT_TUPLE.fullmatch(answer.latex):
        return False  # \{1,2\} was (1,2) and (2,1)
    if _FLAT_TUPLE.fullmatch(gold.latex) and _FLAT_SET.fullmatch(answer.latex):
        return False
    golds, answers = gold.found[:1], answer.found[:1]
    for mine, other, values in ((gold, answer, golds), (answer, gold, answers)):
        if mine.unit in _WORTH and other.unit is None and isinstance(values[0], sympy.Expr):
            values.append(values[0] * _WORTH[mine.unit])  # 33.3\% against 33.3 and 0.333
    for one, other in product(golds, answers):
        if verify(one, other, allow_set_relation_comp=True, timeout_seconds=None):
            digits = _leading_zeros(one, other)
            # 0.0000001 was 0.0000002, both 0 to six decimals
            return digits < 3 or verify(
                one, other, float_rounding=digits + 4, numeric_precision=digits + 15, timeout_seconds=None
            )
    return False


def _in_order(system: _Parsed, other: _Parsed) -> _Parsed:
    """Read x=1, y=2 as (1, 2) if the other side names no variables: it was equal to (2, 1)."""
    parts = [_ASSIGNED.fullmatch(part) for part in system.latex.split(",")]
    if "=" in other.latex or len(parts) < 2 or len({part and part[1] for part in parts} - {None}) < len(parts):
        return system
    return _parsed("(" + ", ".join(part[2] for part in parts if part) + ")")


def _leading_zeros(*values: Any) -> int:
    """Return how many zeros follow the decimal point of the smallest number that is not zero."""
    sizes = [abs(value.evalf(5)) for value in values if isinstance(value, sympy.Expr) and value.is_number]
    return max([0, *(int(-sympy.log(size, 10).evalf(5)) for size in sizes if size.is_real and 0 < size < 1)])


def _bound_this_process(memory_bytes: int) -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # a parent's blocked signals are inherited
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def serve(parent_pid: int, memory_bytes: int) -> None:
    """Answer chunks from standard input until it ends."""
    _bound_this_process(memory_bytes)
    if sys.platform == "linux":
        import ctypes  # noqa: PLC0415

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        return
    logging.disable()
    channel = os.fdopen(os.dup(1), "wb")
    quiet = os.open(os.devnull, os.O_RDWR)
    for standard in (1, 2):  # nothing a library prints may reach the socket or the trainer's screen
        os.dup2(quiet, standard)
    parse("$1$", _LATEX, parsing_timeout=None)  # builds the grammar's tables before the first deadline runs

    def say(message: Any) -> None:
        channel.write(json.dumps(message).encode() + b"\n")
        channel.flush()

    say("ready")
    for line in sys.stdin.buffer:
        for gold, answer, limit in json.loads(line):
            signal.setitimer(signal.ITIMER_REAL, limit + GRACE_S)
            try:
                result = compare(gold, answer, lambda: say("gold_read"))
            except MemoryError:
                os._exit(1)  # a heap this full is not worth keeping: the parent starts another
            except Exception as error:
                result = ("error:" + type(error).__name__, None, None)
            signal.setitimer(signal.ITIMER_REAL, 0)
            say(result)
