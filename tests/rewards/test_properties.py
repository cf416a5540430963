r"""Answers whose truth comes from how they are made: a value is built first and written second.

Every kind below draws a value, writes it in one of several ways, and changes it to another value. An answer that
restates the gold's value is to be accepted, one that states a changed value is not. Half of the cases are of
each sort; ``make test-rewards`` has 200,000.
"""

import math
import os
import random
from collections import Counter
from fractions import Fraction

import pytest

from cppo_trl.rewards import accuracy_reward

CASES = int(os.environ.get("REWARD_CASES", "4000"))
SEED = int(os.environ.get("REWARD_SEED", "0"))
LETTERS = "abkmnpqrstuvwxyz"
pytestmark = pytest.mark.timeout(1800)


def fraction(value, rng, separators=True):
    """Write a rational number, with separators of thousands or without."""
    sign, value = "-" * (value < 0), abs(value)
    top, bottom = value.numerator, value.denominator
    if bottom == 1:
        forms = [f"{top}", f"{top}.0", rf"\frac{{{2 * top}}}{{2}}", f"{top}.", rf"\text{{{top}}}"]
        if top >= 1000 and separators:
            forms += [f"{top:,}", f"{top:,}".replace(",", r"\,"), f"{top:,}".replace(",", "{,}"), f"{top:,}.00"]
    else:
        k = rng.randint(2, 5)
        forms = [rf"\frac{{{top}}}{{{bottom}}}", f"{top}/{bottom}", rf"\dfrac{{{top}}}{{{bottom}}}"]
        forms += [rf"\frac{{{k * top}}}{{{k * bottom}}}", rf"\tfrac {{{top}}} {{{bottom}}}", f"{top} / {bottom}"]
        if top < 10 and bottom < 10:
            forms += [rf"\frac{top}{bottom}", rf"\frac {top} {bottom}"]
        if top > bottom:
            whole, rest = divmod(top, bottom)
            forms += [rf"{whole}\frac{{{rest}}}{{{bottom}}}", f"{whole} {rest}/{bottom}"]
        forms += [f"{top / bottom:.10f}"] if abs(top / bottom) < 1e4 else []
    return sign + rng.choice(forms)


def draw_number(rng):
    kind = rng.random()
    if kind < 0.4:
        return Fraction(rng.choice([rng.randint(-50, 50), rng.randint(-(10**6), 10**6), 10 ** rng.randint(1, 12)]))
    if kind < 0.6:
        return Fraction(rng.randint(-9999, 9999), 10 ** rng.randint(1, 3))
    return Fraction(rng.randint(-60, 60), rng.randint(2, 40))


def change_number(value, rng):
    changes = [value + 1, value - 1, -value, 2 * value, value / 10, value * 10, value + Fraction(1, 7), value * value]
    changes += [
        1 / value if value else value + 2,
        Fraction(value.denominator, value.numerator or 1),
        value + Fraction(1, 1000),
    ]
    return rng.choice([other for other in changes if other != value])


def write_decimal_or_fraction(value, rng):
    scaled = value * 1000
    if scaled.denominator == 1 and rng.random() < 0.4:
        text = f"{float(value):.3f}"
        return rng.choice([text, text.rstrip("0") if not text.endswith(".000") else text, text + "0"])
    return fraction(value, rng)


def squarefree(number):
    """Return (a, b) with number = a² b, b without a square factor."""
    outside = 1
    for factor in range(2, math.isqrt(number) + 1):
        while number % factor**2 == 0:
            number //= factor**2
            outside *= factor
    return outside, number


def draw_radical(rng):
    """A value (a + b √c) / d with c squarefree and above 1."""
    inside = squarefree(rng.choice([2, 3, 5, 6, 7, 10, 11, 13, 15, 21, 30]))[1]
    return (
        Fraction(rng.randint(-9, 9)),
        Fraction(rng.choice([-5, -3, -2, -1, 1, 2, 3, 4]), rng.choice([1, 1, 2, 3])),
        inside,
    )


def write_radical(value, rng):
    a, b, c = value
    k = rng.choice([1, 1, 2, 3])
    root = rng.choice(
        [
            rf"\sqrt{{{c * k * k}}}",
            rf"\sqrt {{{c * k * k}}}",
            f"({c * k * k})^{{1/2}}",
            rf"{{{c * k * k}}}^{{\frac12}}",
        ]
    )
    b /= k
    if a == 0 and b.numerator == 1 and rng.random() < 0.3:
        return rf"\frac{{{root}}}{{{b.denominator}}}" if b.denominator > 1 else root
    top = abs(b.numerator)
    part = (f"{top}" if top > 1 else "") + rng.choice(["", r"\cdot ", " "] if top > 1 else [""]) + root
    part = rf"\frac{{{part}}}{{{b.denominator}}}" if b.denominator > 1 else part
    if a == 0:
        return ("-" if b < 0 else "") + part
    if rng.random() < 0.5:
        return f"{a}" + ("-" if b < 0 else "+") + part
    return ("-" if b < 0 else "") + part + f"{int(a):+}"


def change_radical(value, rng):
    a, b, c = value
    return rng.choice(
        [
            (a + 1, b, c),
            (a, -b, c),
            (a, b + 1 or Fraction(2), c),
            (a, b, {2: 3, 3: 5}.get(c, 2)),
            (a, 2 * b, c),
            (-a - 1, b, c),
        ]
    )


def draw_interval(rng):
    low = rng.choice([None, *range(-9, 9)])
    high = rng.choice([None, *range(10, 20)]) if low is not None else rng.randint(10, 20)
    return low, low is not None and rng.random() < 0.5, high, high is not None and rng.random() < 0.5


def write_interval(value, rng):
    low, low_in, high, high_in = value
    left, right = ("\\leq" if low_in else "<"), ("\\leq" if high_in else "<")
    a, b = r"-\infty" if low is None else str(low), r"\infty" if high is None else str(high)
    x = "x"
    forms = [f"{'[' if low_in else '('}{a}, {b}{']' if high_in else ')'}"]
    forms += [rf"\left{forms[0][0]}{a},{b}\right{forms[0][-1]}", f"x \\in {forms[0]}"]
    if low is None:
        flipped = ">" if right == "<" else r"\ge"
        forms += [f"{x} {right} {b}", f"{b} {flipped} {x}", rf"\{{{x} \mid {x} {right} {b}\}}"]
    elif high is None:
        flipped = ">" if left == "<" else r"\geq"
        forms += [f"{a} {left} {x}", f"{x} {flipped} {a}", rf"\{{{x} : {a} {left} {x}\}}"]
    else:
        forms += [f"{a} {left} {x} {right} {b}", rf"\{{ {x} \,|\, {a} {left} {x} {right} {b} \}}"]
    return rng.choice(forms[:3]) if rng.random() < 0.5 else rng.choice(forms)


def change_interval(value, rng):
    low, low_in, high, high_in = value
    changes = [(low + 1, low_in, high, high_in), (low, not low_in, high, high_in)] if low is not None else []
    changes += [(low, low_in, high + 1, high_in), (low, low_in, high, not high_in)] if high is not None else []
    changes += [(None, False, high, high_in)] if low is not None and high is not None else []
    return rng.choice(changes)


def draw_union(rng):
    a, b, c = sorted(rng.sample(range(-20, 20), 3))
    return (None, False, a, rng.random() < 0.5), (b, rng.random() < 0.5, c, rng.random() < 0.5)


def write_union(value, rng):
    parts = [write_interval_only(part) for part in rng.sample(value, 2)]
    return rng.choice([r" \cup ", r"\cup "]).join(parts)


def write_interval_only(value):
    low, low_in, high, high_in = value
    ends = ["-\\infty" if low is None else low, "\\infty" if high is None else high]
    return f"{'[' if low_in else '('}{ends[0]},{ends[1]}{']' if high_in else ')'}"


def change_union(value, rng):
    (_, _, a, a_in), (b, b_in, c, c_in) = value
    first, second = (None, False, a, a_in), (b, b_in, c, c_in)
    changes = [((None, False, a - 1, a_in), second), ((None, False, a, not a_in), second)]
    changes += [(first, (b, not b_in, c, c_in)), (first, (b, b_in, c + 1, c_in)), (first, (b, b_in, c, not c_in))]
    return rng.choice(changes)


def draw_items(rng):
    return [draw_number(rng) for _ in range(rng.randint(2, 4))]


def draw_set(rng):
    return frozenset([*draw_items(rng), Fraction(77), Fraction(78)])


def write_set(value, rng):
    items = [fraction(item, rng, separators=False) for item in rng.sample(sorted(value), len(value))]
    last = rng.choice([", ", r" \text{ and } ", " and ", ", and "])
    bare = ", ".join(items[:-1]) + last + items[-1]
    return rng.choice(
        [r"\{" + ", ".join(items) + r"\}", r"\left\{" + ",".join(items) + r"\right\}", bare, "; ".join(items)]
    )


def change_set(value, rng):
    items = sorted(value)
    item = rng.choice(items)
    other = change_number(item, rng)
    return (
        rng.choice([value - {item}, value | {other + 1000}, (value - {item}) | {other}])
        if other not in value
        else value - {item}
    )


def write_tuple(value, rng):
    items = [fraction(item, rng, separators=False) for item in value]
    return rng.choice(
        [
            "({})",
            r"\left({}\right)",
            r"\langle {} \rangle",
            r"(x,y{})=({{}})".format(",z" * (len(items) - 2)) if len(items) < 4 else "({})",
        ]
    ).format(rng.choice([", ", ","]).join(items))


def change_tuple(value, rng):
    place = rng.randrange(len(value))
    changed = list(value)
    if rng.random() < 0.3 and len(set(value)) > 1:
        while changed == list(value):
            rng.shuffle(changed)
        return tuple(changed)
    changed[place] = change_number(changed[place], rng)
    return tuple(changed) if rng.random() < 0.8 else (*value, changed[place])


def draw_matrix(rng):
    rows, columns = rng.randint(1, 3), rng.randint(2, 3)
    return tuple(
        tuple(Fraction(rng.randint(-9, 9), rng.choice([1, 1, 2])) for _ in range(columns)) for _ in range(rows)
    )


def write_matrix(value, rng):
    kind = rng.choice(["pmatrix", "bmatrix", "array"])
    body = r" \\ ".join(" & ".join(fraction(item, rng, separators=False) for item in row) for row in value)
    if kind == "array":
        return rf"\left[\begin{{array}}{{{'r' * len(value[0])}}} {body} \end{{array}}\right]"
    return rf"\begin{{{kind}}} {body} \end{{{kind}}}"


def change_matrix(value, rng):
    rows = [list(row) for row in value]
    row = rng.randrange(len(rows))
    column = rng.randrange(len(rows[0]))
    rows[row][column] = change_number(rows[row][column], rng)
    transposed = tuple(zip(*value, strict=True))
    return transposed if transposed != value and rng.random() < 0.3 else tuple(map(tuple, rows))


def draw_polynomial(rng):
    """Coefficients by exponents of two letters, in no common order."""
    letters = tuple(rng.sample(LETTERS, 2))
    terms = {}
    while len(terms) < rng.randint(2, 3):
        terms[rng.randint(0, 3), rng.randint(0, 2)] = Fraction(
            rng.choice([n for n in range(-7, 8) if n]), rng.choice([1, 1, 1, 2, 3])
        )
    if all(powers == (0, 0) for powers in terms):
        terms[1, 1] = Fraction(2)
    return letters, frozenset(terms.items())


def write_polynomial(value, rng):
    letters, terms = value
    text = ""
    for powers, coefficient in rng.sample(sorted(terms), len(terms)):
        size = abs(coefficient)
        factors = [
            letter + (rng.choice([f"^{power}", f"^{{{power}}}"]) if power > 1 else "")
            for letter, power in zip(letters, powers, strict=True)
            if power
        ]
        rng.shuffle(factors)
        letters_text = rng.choice(["", " ", r"\cdot "]).join(factors)
        if size == 1 and factors:
            term = letters_text
        elif size.denominator > 1 and factors and rng.random() < 0.5:
            term = rf"\frac{{{size.numerator if size.numerator > 1 else ''}{letters_text}}}{{{size.denominator}}}"
        else:
            term = (
                f"{size}" if size.denominator == 1 else rf"\frac{{{size.numerator}}}{{{size.denominator}}}"
            ) + letters_text
        text += ("-" if coefficient < 0 else "+" if text else "") + term
    if rng.random() < 0.2:
        factor = rng.randint(2, 4)
        doubled = letters, frozenset((powers, coefficient * factor) for powers, coefficient in terms)
        return rf"\frac{{{write_polynomial(doubled, rng)}}}{{{factor}}}"
    return text


def change_polynomial(value, rng):
    letters, terms = value
    changed = dict(terms)
    powers = rng.choice(sorted(changed))
    if rng.random() < 0.3:
        moved = (powers[0] + 1, powers[1])
        changed[moved] = changed.get(moved, 0) + changed.pop(powers)
    elif rng.random() < 0.5:
        changed[powers] = -changed[powers]
    else:
        changed[powers] = changed[powers] + 1 or Fraction(5)
    return letters, frozenset((powers, coefficient) for powers, coefficient in changed.items() if coefficient)


def draw_line(rng):
    """The coefficients (a, b, c) of a x + b y = c, coprime, a above 0."""
    a, b, c = rng.randint(1, 9), rng.choice([n for n in range(-9, 10) if n]), rng.randint(-20, 20)
    divisor = math.gcd(a, b, c)
    return a // divisor, b // divisor, c // divisor


def write_line(value, rng):
    factor = rng.choice([1, 2, -1])
    a, b, c = (factor * number for number in value)
    term = lambda n, x: ("-" if n == -1 else "" if n == 1 else str(n)) + x  # noqa: E731
    plus = lambda n, x: ("+" if n > 0 else "") + term(n, x)  # noqa: E731
    slope, offset = Fraction(-value[0], value[1]), Fraction(value[2], value[1])
    forms = [
        f"{term(a, 'x')}{plus(b, 'y')}={c}",
        f"{c} = {term(b, 'y')}{plus(a, 'x')}",
        f"{term(a, 'x')}{plus(b, 'y')}{-c:+}=0" if c else f"{term(a, 'x')}{plus(b, 'y')}=0",
    ]
    forms.append(
        rf"y = \frac{{{slope.numerator}}}{{{slope.denominator}}}x"
        rf" + \frac{{{offset.numerator}}}{{{offset.denominator}}}"
    )
    return rng.choice(forms)


def change_line(value, rng):
    a, b, c = value
    return rng.choice([(a + 11, b, c), (a, -b, c), (a, b, c + 1), (a, b + 13, c)])


def draw_named(rng):
    return rng.choice(["x", "y", "n", "a_1", "I", "S", "E", "f(2)", "f(0)", r"\theta", "P(A)", "AB"]), draw_number(rng)


def write_named(value, rng):
    name, number = value
    text = write_decimal_or_fraction(number, rng)
    return rng.choice([text, f"{name}={text}", f"{name} = {text}"])


def change_named(value, rng):
    return value[0], change_number(value[1], rng)


UNITS = {
    "cm": ["cm", "centimeters", "centimetres"],
    "m/s": ["m/s", "meters per second"],
    "kg": ["kg", "kilograms"],
    "MHz": ["MHz", "megahertz"],
    "km^2": ["km^2", "square kilometers"],
    "dollar": ["dollars"],
    "hour": ["hours", "hr", "h"],
    "marble": ["marbles", "blue marbles"],
    "ticket": ["tickets"],
    "pm": ["pm", "p.m."],
    "am": ["am", "a.m."],
}


def draw_quantity(rng):
    unit = rng.choice(list(UNITS))
    return (Fraction(rng.randint(1, 12)) if unit in ("am", "pm") else abs(draw_number(rng)) + 1), unit


def write_quantity(value, rng):
    number, unit = value
    text = f"{number.numerator:,}" if number.denominator == 1 else f"{number.numerator}/{number.denominator}"
    name = rng.choice(UNITS[unit])
    if unit == "dollar" and rng.random() < 0.5:
        return rng.choice([rf"\${text}", f"${text}"])
    forms = [f"{text} {name}", rf"{text}\text{{ {name}}}", rf"{text}\,\mathrm{{{name}}}", f"{text} ({name})"]
    return rng.choice(forms if "^" not in name and name != "h" else forms[:3])


def change_quantity(value, rng):
    number, unit = value
    if rng.random() < 0.5:
        return change_number(number, rng), unit
    others = [other for other in UNITS if other != unit]
    return number, rng.choice(others)


def write_percent(value, rng):
    text = fraction(value, rng)
    return text + rng.choice([r"\%", "%", " percent", r"\text{ percent}"])


def draw_scientific(rng):
    return Fraction(rng.randint(101, 999)) * Fraction(10) ** rng.randint(-14, 14)


def change_scientific(value, rng):
    return rng.choice([value * 10, value / 10, value * Fraction(rng.randint(102, 199), 100), -value])


def write_scientific(value, rng):
    power = math.floor(math.log10(abs(value)) + 1e-9) + rng.randint(-2, 2)
    head = value / Fraction(10) ** power
    text = f"{float(head):.6g}"
    return text + rng.choice(
        [rf" \times 10^{{{power}}}", rf"\cdot 10^{{{power}}}", f"e{power}", rf"×10^{{{power}}}", f"x10^{power}"]
    )


def draw_complex(rng):
    return rng.randint(-9, 9), rng.choice([n for n in range(-9, 10) if n])


def write_complex(value, rng):
    a, b = value
    part = ("-" if b == -1 else "" if b == 1 else str(b)) + "i"
    forms = [
        f"{a}" + ("+" if b > 0 else "") + part,
        f"{part}{a:+}",
        rf"\frac{{{2 * a}{2 * b:+}i}}{{2}}",
        rf"{a}{b:+}\mathrm{{i}}",
    ]
    return rng.choice(forms)


def change_complex(value, rng):
    a, b = value
    return rng.choice([(a + 1, b), (a, -b), (a, b + 1 or 3), (-a - 1, b)])


def write_scaled_pi(value, rng):
    sign, size = "-" * (value < 0), abs(value)
    top, bottom = size.numerator, size.denominator
    part = f"{top if top != 1 else ''}" + rng.choice([r"\pi", "π", " \\pi"])
    if bottom == 1:
        return sign + part
    return sign + rng.choice([rf"\frac{{{part}}}{{{bottom}}}", f"{part}/{bottom}", rf"\frac{{{top}}}{{{bottom}}}\pi"])


KINDS = {
    "number": (draw_number, write_decimal_or_fraction, change_number),
    "radical": (draw_radical, write_radical, change_radical),
    "multiple of pi": (lambda rng: draw_number(rng) or Fraction(2), write_scaled_pi, change_number),
    "scientific": (draw_scientific, write_scientific, change_scientific),
    "complex": (draw_complex, write_complex, change_complex),
    "interval or inequality": (draw_interval, write_interval, change_interval),
    "union": (draw_union, write_union, change_union),
    "set": (draw_set, write_set, change_set),
    "tuple": (lambda rng: tuple(draw_items(rng)), write_tuple, change_tuple),
    "matrix": (draw_matrix, write_matrix, change_matrix),
    "expression": (draw_polynomial, write_polynomial, change_polynomial),
    "equation": (draw_line, write_line, change_line),
    "named value": (draw_named, write_named, change_named),
    "unit": (draw_quantity, write_quantity, change_quantity),
    "percentage": (draw_number, write_percent, change_number),
}


def make_cases(count, seed):
    """Return (kind, gold, completion, whether the completion is right), as many right as wrong."""
    rng = random.Random(seed)
    cases = []
    for number in range(count):
        kind = rng.choice(list(KINDS))
        draw, write, change = KINDS[kind]
        value = draw(rng)
        right = number % 2 == 0
        other = value if right else change(value, rng) if rng.random() < 0.7 else draw(rng)
        if not right and (other == value or (kind == "unit" and other[0] != value[0] and other[1] != value[1])):
            other = change(value, rng)
        if kind == "named value" and not right and other[1] == value[1]:
            continue  # names may be left out
        gold, answer = write(value, rng), write(other, rng)
        gold = rng.choice([gold, f"${gold}$", rf"\boxed{{{gold}}}"]) if "$" not in gold else gold
        form = rng.choice(
            [
                "So we get \\boxed{%s}.",
                "First \\boxed{1}. No: $\\boxed{%s}$",
                "Work.\nAnswer: %s",
                "**Answer:** $%s$\n",
            ]
        )
        answer = form.replace("$%s$", "%s") % answer if "$" in answer else form % answer
        cases.append((kind, gold, answer, right))
    return cases


def test_restated_values_are_accepted_and_changed_ones_are_not():
    cases = make_cases(CASES, SEED)
    rewards = accuracy_reward([answer for _, _, answer, _ in cases], [gold for _, gold, _, _ in cases])
    graded = list(zip(cases, rewards, strict=True))
    accepted = [case for case, reward in graded if reward == 1.0 and not case[3]]
    refused = [case for case, reward in graded if reward != 1.0 and case[3]]
    counts = Counter((right, reward) for (*_, right), reward in graded)
    print(
        f"changed: {sum(not case[3] for case in cases)}, accepted {len(accepted)}; restated refused {len(refused)}",
        counts,
    )
    assert accepted == []
    assert len(refused) < 0.005 * sum(case[3] for case in cases), refused[:20]
