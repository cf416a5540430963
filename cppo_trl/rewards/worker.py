"""The process that parses and compares answers: one JSON line in per chunk, one JSON line out per answer.

It is started by :mod:`cppo_trl.rewards.checker`, imports math-verify and sympy but never torch, and may be killed at
any moment. Three things end it without its parent's help: end of file on its socket, the death of the parent
(Linux), and an alarm with the default action, which works even while C code holds the interpreter.
"""

import json
import logging
import os
import resource
import signal
import sys
from functools import lru_cache
from typing import Any

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


@lru_cache(maxsize=4096)
def _parsed(text: str) -> tuple[list[Any], str | None, str | None]:
    """Parse normalised text: math-verify's list (empty if there is no expression), its unit, and how it reads."""
    latex, unit = normalise(text)
    found = parse(f"${latex}$", _LATEX, parsing_timeout=None)
    if not found or isinstance(found[0], str):
        return [], unit, None
    return found, unit, str(found[0])[:SHOWN_CHARS]


def compare(gold: str, answer: str) -> tuple[str, str | None, str | None]:
    """Compare two answers; returns why (``"equal"`` if they are), the parsed gold and the parsed answer."""
    gold_expr, gold_unit, gold_shown = _parsed(gold)
    if not gold_expr:
        return "unparseable_gold", None, None
    answer_expr, answer_unit, answer_shown = _parsed(answer)
    if not answer_expr:
        return "unparseable_answer", gold_shown, None
    same = not units_differ(gold_unit, answer_unit) and verify(gold_expr, answer_expr, timeout_seconds=None)
    return "equal" if same else "different", gold_shown, answer_shown


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
    channel.write(b'"ready"\n')
    channel.flush()
    for line in sys.stdin.buffer:
        for gold, answer, limit in json.loads(line):
            signal.setitimer(signal.ITIMER_REAL, limit + GRACE_S)
            try:
                result = compare(gold, answer)
            except MemoryError:
                os._exit(1)  # a heap this full is not worth keeping: the parent starts another
            except Exception as error:
                result = ("error:" + type(error).__name__, None, None)
            signal.setitimer(signal.ITIMER_REAL, 0)
            channel.write(json.dumps(result).encode() + b"\n")
            channel.flush()
