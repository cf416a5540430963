"""Sets of real numbers: what intervals, unions and solved inequalities leave."""

from collections.abc import Callable
from dataclasses import dataclass

from mpmath import mp, mpf

_CLOSE = mpf(10) ** -40  # marks nearer than this, relative to their size, are one


def _same(left: mpf, right: mpf) -> bool:
    return left == right or abs(left - right) <= _CLOSE * max(1, abs(left), abs(right))


@dataclass(frozen=True)
class Region:
    """A set of real numbers with finitely many boundaries.

    Attributes:
        marks: The boundaries, ascending.
        inside: Whether a cell belongs to the set: the gap below the first mark, the mark, the gap above it, ...
        name: The variable it is stated for, if any.
    """

    marks: tuple[mpf, ...]
    inside: tuple[bool, ...]
    name: str = ""

    def contains(self, number: mpf) -> bool:
        """Tell whether a number belongs to the set."""
        for place, mark in enumerate(self.marks):
            if _same(number, mark):
                return self.inside[2 * place + 1]
            if number < mark:
                return self.inside[2 * place]
        return self.inside[-1]

    def combine(self, other: "Region", keep: Callable[[bool, bool], bool]) -> "Region":
        """Return the numbers for which ``keep`` holds of whether they are in this set and in the other."""
        marks: list[mpf] = []
        for mark in sorted(self.marks + other.marks):
            if not marks or not _same(marks[-1], mark):
                marks.append(mark)
        probes = [marks[0] - 1] if marks else [mpf(0)]
        for mark, above in zip(marks, [*marks[1:], marks[-1] + 2] if marks else [], strict=True):
            probes += [mark, (mark + above) / 2]
        inside = [keep(self.contains(probe), other.contains(probe)) for probe in probes]
        for place in reversed(range(len(marks))):  # a mark between like cells is none
            if inside[2 * place] == inside[2 * place + 1] == inside[2 * place + 2]:
                del marks[place], inside[2 * place : 2 * place + 2]
        return Region(tuple(marks), tuple(inside), self.name)

    def equals(self, other: "Region") -> bool:
        """Tell whether both hold the same numbers and are stated for one variable."""
        same_name = not self.name or not other.name or self.name == other.name
        return same_name and self.inside == other.inside and all(map(_same, self.marks, other.marks))


EMPTY, REALS = Region((), (False,)), Region((), (True,))


def point(number: mpf) -> Region:
    """Return the set of one number."""
    return Region((number,), (False, True, False))


def below(bound: mpf, closed: bool = False) -> Region:
    """Return the numbers below a bound, which may be infinite."""
    return Region((bound,), (True, closed, False)) if mp.isfinite(bound) else (REALS if bound > 0 else EMPTY)


def above(bound: mpf, closed: bool = False) -> Region:
    """Return the numbers above a bound, which may be infinite."""
    return below(bound, not closed).combine(EMPTY, lambda mine, _: not mine)


def union(one: Region, other: Region) -> Region:
    """Return the numbers in either set."""
    return one.combine(other, lambda a, b: a or b)


def intersection(one: Region, other: Region) -> Region:
    """Return the numbers in both sets."""
    return one.combine(other, lambda a, b: a and b)


def difference(one: Region, other: Region) -> Region:
    """Return the numbers in the first set that are not in the other."""
    return one.combine(other, lambda a, b: a and not b)
