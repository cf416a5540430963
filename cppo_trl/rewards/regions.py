"""Sets of real numbers: what intervals, unions and solved inequalities leave."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import eq, ge, gt, le, lt, ne

from mpmath import mp, mpf

_CLOSE = mpf(10) ** -40  # numbers nearer than this, relative to their size, are one


def _same(left: mpf, right: mpf) -> bool:
    return left == right or abs(left - right) < _CLOSE * max(1, abs(left), abs(right))


@dataclass(frozen=True)
class Region:
    """A set of real numbers with finitely many boundaries.

    Attributes:
        contains: Tells whether a number belongs to the set.
        marks: The boundaries, in any order; between two of them all numbers belong to the set, or none.
    """

    contains: Callable[[mpf], bool]
    marks: tuple[mpf, ...] = ()

    def cells(self) -> list[bool]:
        """Tell of each boundary, and then of each gap between them, whether it belongs to the set."""
        marks = [mark for mark in sorted(self.marks) if mp.isfinite(mark)] or [mpf(0)]
        gaps = [(low + high) / 2 for low, high in pairwise(marks)]
        ends = [marks[0] - abs(marks[0]) - 1, marks[-1] + abs(marks[-1]) + 1]
        return [self.contains(number) for number in marks + gaps + ends]

    def equals(self, other: "Region") -> bool:
        """Tell whether both hold the same numbers."""
        return not any(combined([self, other], lambda held: held[0] != held[1]).cells())


EMPTY, REALS = Region(lambda _: False), Region(lambda _: True)


_HOLDS = {"=": eq, r"\neq": ne, "<": lt, r"\leq": le, ">": gt, r"\geq": ge}


def solutions(sign: str, bound: mpf) -> Region:
    r"""Return the numbers that stand left of a sign with a bound, which may be infinite, on its right."""
    holds = _HOLDS[sign]
    return Region(lambda number: holds(bound if _same(number, bound) else number, bound), (bound,))


def combined(regions: Sequence[Region], keep: Callable[[list[bool]], bool]) -> Region:
    """Return the numbers for which ``keep`` holds of whether they are in each of some sets."""
    marks = tuple(mark for region in regions for mark in region.marks)
    return Region(lambda number: keep([region.contains(number) for region in regions]), marks)
