r"""From a completion or a gold to the text that math-verify compares.

Extraction (:func:`extract_answer`, :func:`extract_gold`) runs in the trainer's process, so it takes time linear in the
text. Normalisation (:func:`normalise`) runs in the workers, under their time limit. Extraction and comparison of
mathematics stay math-verify's; each rule here names the case that made it necessary.
"""

import math
import numbers
import re
from collections.abc import Collection
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
        return None if math.isnan(gold) else str(gold)
    if not isinstance(gold, str):
        return None
    if "####" in gold:
        gold = gold.rpartition("####")[2].strip().partition("\n")[0]
    return extract_answer(gold) or (None if r"\boxed" in gold else gold.strip() or None)


def _box_content(text: str, start: int) -> str | None:
    r"""Return what the box command at ``start`` holds: ``{...}`` with its braces matched, or a bare token (``\boxed 5``)."""
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


def units_differ(gold: str | None, answer: str | None) -> bool:
    """Tell whether both have a unit and the units are known to differ."""
    return gold is not None and answer is not None and gold != answer


def normalise(text: str) -> tuple[str, str | None]:
    """Return LaTeX that math-verify reads as meant, and the unit that was taken off it."""
    return text.replace("$", ""), None
