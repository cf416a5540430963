r"""Where a completion or a gold has its answer. It runs in the trainer's process, in time linear in the text."""

import numbers
import re
from collections.abc import Collection
from typing import Any, NamedTuple

SOURCES = ("boxed", "answer_line")

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(\{|[^\s{}$]+)?|\\.|[{}]", re.DOTALL)
_BETWEEN_BOXES = re.compile(r"[\s$]*(?:[,;]|[,;]?\s*(?:\\text\{)?\s*(?:and|or)\s*\}?)[\s$]*")
_ANSWER_LINE = re.compile(r"^[^\w\n]*(?:the )?(?:final )?answer[ \t*_]*[:：]", re.IGNORECASE | re.MULTILINE)
_LINE_BODY = re.compile(r"[\s*_]*(?:\$\$(.*?)\$\$|\\\[(.*?)\\\]|([^\n]*))", re.DOTALL)


class _Box(NamedTuple):
    start: int  # of the command
    text: str
    end: int


def extract_answer(completion: str, sources: Collection[str] = SOURCES) -> str | None:
    r"""Return the answer a completion ends with, or None if it gives none.

    Only what follows the last ``</think>`` counts where there are thinking tags. Of the last ``\boxed{}`` that is not
    empty and the last line that starts with ``Answer:``, the later one is the answer. Boxes joined by "and", "or" or a
    comma are one answer, a list; an unfinished box is none.
    """
    completion = completion.rpartition("</think>")[2].partition("<think>")[0]
    boxes, open_at = _boxes(completion) if "boxed" in sources else ([], -1)
    lines = list(_ANSWER_LINE.finditer(completion)) if "answer_line" in sources else []
    line_end = lines[-1].end() if lines else -1
    last = boxes[-1].start if boxes else -1
    if line_end > max(last, open_at):
        rest = _LINE_BODY.match(completion, line_end)  # of the line, or of the next if it is empty
        answer = next(filter(None, rest.groups()), "").strip("*_ \t") if rest else ""
    elif last > open_at:
        answer = boxes[-1].text
        for before, after in zip(reversed(boxes[:-1]), reversed(boxes), strict=False):
            if not _BETWEEN_BOXES.fullmatch(completion, before.end, after.start):
                break
            answer = f"{before.text}; {answer}"
    else:
        return None
    return answer.strip() or None


def extract_gold(gold: Any) -> str | None:
    r"""Return the answer that a dataset's gold holds, or None if there is none.

    Args:
        gold: A number, or a text: a bare answer, one in ``$...$`` or ``\boxed{}``, or a worked solution that ends in
            ``#### 42`` or holds its answer in an ``Answer:`` line or in boxes, all of which count.
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
    boxes, open_at = _boxes(gold)
    if boxes and open_at < 0 and not _ANSWER_LINE.search(gold):
        return "; ".join(dict.fromkeys(box.text.strip() for box in boxes))
    return extract_answer(gold) or (None if r"\boxed" in gold else gold.strip() or None)


def _boxes(text: str) -> tuple[list[_Box], int]:
    """Return the boxes that hold something and no other box, and where the last one starts that is not closed."""
    boxes: list[_Box] = []
    open_groups: list[tuple[int, int]] = []  # where each starts (-1: it is no box), and its inside
    for match in _BOX.finditer(text):
        if match[0] == "{":
            open_groups.append((-1, 0))
        elif match[0] == "}":
            start, inside = open_groups.pop() if open_groups else (-1, 0)
            if start >= 0 and not (boxes and boxes[-1].start > start) and text[inside : match.start()].strip():
                boxes.append(_Box(start, text[inside : match.start()], match.end()))
        elif match[1] == "{":
            open_groups.append((match.start(), match.end()))
        elif match[1]:
            boxes.append(_Box(match.start(), match[1].rstrip(".,;"), match.end()))
    return boxes, max((start for start, _ in open_groups), default=-1)
