r"""How often `t3d.tasks.math.equal` decides wrongly: generated pairs of answers, equal ones by algebra and near misses.

    python benchmarks/verdicts.py [--each 23] [--seed 0] [--kinds small,lists] [--wrong 3] [--run-ons GSM8K.jsonl]

Every kind makes triples: a reference, the same in another form, and the same form with one sign, digit, exponent or
bound changed. The truth of a pair follows from how it was made, so no library decides it. A near miss that is said to
be equal is a false positive, an equal pair that is said to differ a false negative.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from math import comb
from pathlib import Path
from random import Random

Triple = tuple[str, str, str]  # reference, equal to it, not equal to it
KINDS: dict[str, Callable[[Random], Triple]] = {}


def kind(make: Callable[[Random], Triple]) -> Callable[[Random], Triple]:
    KINDS[make.__name__.replace("_", " ")] = make
    return make


def triples(seed: int, each: int, kinds: list[str] | None = None) -> Iterator[tuple[str, Triple]]:
    """`each` triples of every kind; the same seed gives the same ones, whatever other kinds there are."""
    for name in kinds or KINDS:
        rng, seen = Random(f"{seed}/{name}"), set()
        for _ in range(20 * each):
            if len(seen) == each:
                break
            triple = KINDS[name](rng)
            if triple not in seen:
                seen.add(triple)
                yield name, triple


def run_on(solution: str, question: str, further: str) -> str:
    """A response to one question, by a model that goes on with another question and its answer."""
    return f"{solution}\n\nQuestion: {question}\nAnswer: {further}"


def signed(value: int, first: bool = False) -> str:
    return f"{value}" if first and value >= 0 else f"{value:+d}"


def times(value: int, name: str) -> str:
    """A term of a sum, `+3x`, `-x`."""
    return f"{'+' if value > 0 else '-'}{'' if abs(value) == 1 else abs(value)}{name}"


def nonzero(rng: Random, most: int) -> int:
    return rng.choice([-1, 1]) * rng.randint(1, most)


def frac(value: Fraction) -> str:
    sign = "-" if value < 0 else ""
    return f"{sign}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


# Numbers


@kind
def one_over_a_factorial(rng):
    n, d = rng.randint(30, 2500), rng.choice([1, 2, -1, -2])
    same = rng.choice([rf"\frac{{{n + 1}}}{{{n + 1}!}}", rf"\frac{{1}}{{{n} \cdot {n - 1}!}}", rf"({n}!)^{{-1}}"])
    return (
        rf"\frac{{1}}{{{n}!}}",
        same,
        same.replace(f"{n}!", f"{n + d}!").replace(f"{n + 1}!", f"{n + 1 + d}!").replace(f"{n - 1}!", f"{n - 1 + d}!"),
    )


@kind
def one_over_a_power(rng):
    a, b, n = rng.randint(3, 99), rng.choice([2, 3, 5, 7]), rng.randint(40, 3000)
    same = rng.choice([rf"\frac{{{b}}}{{{a} \cdot {b}^{{{n + 1}}}}}", rf"\frac{{1}}{{{a}}} \cdot {b}^{{-{n}}}"])
    wrong = rng.choice(
        [
            rf"\frac{{1}}{{{a} \cdot {b}^{{{n - 1}}}}}",
            rf"\frac{{1}}{{{a + 1} \cdot {b}^{{{n}}}}}",
            rf"\frac{{{b}^{{{n - 1}}}+1}}{{{a} \cdot {b}^{{{n}}}}}",
            rf"-\frac{{1}}{{{a} \cdot {b}^{{{n}}}}}",
        ]
    )
    return rf"\frac{{1}}{{{a} \cdot {b}^{{{n}}}}}", same, wrong


@kind
def large_powers(rng):
    b, n, c = rng.choice([2, 3, 5]), rng.randint(60, 3000), nonzero(rng, 9)
    reference = rf"{b}^{{{n}}}{signed(c)}"
    same = rng.choice([rf"{b}\cdot {b}^{{{n - 1}}}{signed(c)}", rf"{signed(c, True)}+{b}^{{{n}}}"])
    wrong = rng.choice([rf"{b}^{{{n}}}{signed(-c)}", rf"{b}^{{{n + 1}}}{signed(c)}", rf"{b}^{{{n}}}{signed(c + 1)}"])
    return reference, same, wrong


@kind
def sums_near_one(rng):
    b, n = rng.choice([2, 3, 10]), rng.randint(30, 400)
    same = rng.choice([rf"\frac{{{b}^{{{n}}}-1}}{{{b}^{{{n}}}}}", rf"1-{b}^{{-{n}}}"])
    wrong = rng.choice(["1", rf"1-\frac{{1}}{{{b}^{{{n + 1}}}}}", rf"1+\frac{{1}}{{{b}^{{{n}}}}}"])
    return rf"1-\frac{{1}}{{{b}^{{{n}}}}}", same, wrong


@kind
def binomials(rng):
    n, k = rng.randint(12, 60), rng.randint(3, 9)
    same = rng.choice(
        [rf"\binom{{{n}}}{{{n - k}}}", rf"\frac{{{n}!}}{{{k}!{n - k}!}}", str(comb(n, k)), f"{comb(n, k):,}"]
    )
    wrong = rng.choice([rf"\binom{{{n - 1}}}{{{k}}}", rf"\binom{{{n}}}{{{k + 1}}}", str(comb(n, k) + 1)])
    return rf"\binom{{{n}}}{{{k}}}", same, wrong if k + 1 != n - k else str(comb(n, k) - 1)


@kind
def small_probabilities(rng):
    n, k = rng.randint(20, 52), rng.randint(6, 13)
    p = Fraction(1, comb(n, k))
    wrong = rng.choice([frac(p * Fraction(k + 2, k + 1)), rf"\frac{{1}}{{{comb(n, k) + 1}}}", frac(-p)])
    return rf"\frac{{1}}{{\binom{{{n}}}{{{k}}}}}", frac(p), wrong


@kind
def small_decimals(rng):
    digits, power = rng.randint(11, 99), rng.randint(7, 30)
    reference = rf"{digits / 10} \times 10^{{-{power}}}"
    same = rng.choice([rf"\frac{{{digits}}}{{10^{{{power + 1}}}}}", rf"{digits} \cdot 10^{{-{power + 1}}}"])
    wrong = rng.choice(
        [
            rf"\frac{{{digits}}}{{10^{{{power}}}}}",
            rf"{digits + 1} \cdot 10^{{-{power + 1}}}",
            rf"{digits / 10} \times 10^{{-{power + 2}}}",
            "0",
        ]
    )
    return reference, same, wrong


@kind
def decimals(rng):
    value = Fraction(nonzero(rng, 9999), rng.choice([8, 16, 40, 125]))
    if value.denominator == 1:
        value += Fraction(1, 8)
    text = f"{float(value)}"
    wrong = rng.choice([text.replace(".", "", 1), text + "1", frac(-value), text[:-1] + str((int(text[-1]) + 1) % 10)])
    return frac(value), text, wrong


@kind
def thousands(rng):
    n, b = rng.randint(2, 40), rng.choice([10, 100])
    value = n**3 * b**2 + rng.randint(1, 99)
    wrong = rng.choice([f"{value + 1000:,}", f"{value},0", f"{value - 1}", f"-{value:,}"])
    return str(value), f"{value:,}", wrong


@kind
def roots(rng):
    a, b = rng.randint(2, 15), rng.choice([2, 3, 5, 6, 7, 10, 11, 13])
    c = rng.randint(2, 9)
    same = rng.choice([rf"\frac{{{a}{c}\sqrt{{{b}}}}}{{{c}}}".replace(f"{a}{c}", str(a * c)), rf"\sqrt{{{a * a * b}}}"])
    same = rng.choice([same, rf"\frac{{{a * b}}}{{\sqrt{{{b}}}}}"])
    wrong = rng.choice(
        [rf"{a + 1}\sqrt{{{b}}}", rf"\sqrt{{{a * a * b + 1}}}", rf"-{a}\sqrt{{{b}}}", rf"\frac{{{a}}}{{\sqrt{{{b}}}}}"]
    )
    return rf"{a}\sqrt{{{b}}}", same, wrong


@kind
def nested_roots(rng):
    a, b = rng.sample([2, 3, 5, 6, 7, 10, 11, 13, 14, 15], 2)
    a, b = max(a, b), min(a, b)
    same = rf"\sqrt{{{a + b}+2\sqrt{{{a * b}}}}}"
    wrong = rng.choice(
        [rf"\sqrt{{{a + b}-2\sqrt{{{a * b}}}}}", rf"\sqrt{{{a + b}+\sqrt{{{a * b}}}}}", rf"\sqrt{{{a + b}}}"]
    )
    return rf"\sqrt{{{a}}}+\sqrt{{{b}}}", same, wrong


@kind
def denominators_with_roots(rng):
    a, b = rng.randint(2, 9), rng.choice([2, 3, 5, 6, 7, 10])
    a += a * a == b
    same = rf"\frac{{{a}-\sqrt{{{b}}}}}{{{a * a - b}}}"
    wrong = rng.choice(
        [rf"\frac{{{a}+\sqrt{{{b}}}}}{{{a * a - b}}}", rf"\frac{{{a}-\sqrt{{{b}}}}}{{{a * a - b + 1 or 3}}}"]
    )
    return rf"\frac{{1}}{{{a}+\sqrt{{{b}}}}}", same, wrong


@kind
def logarithms(rng):
    a, b, n = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 5)
    same = rng.choice([rf"{n}\ln {a}+{n}\ln {b}", rf"{n}\ln({a * b})"])
    wrong = rng.choice([rf"{n}\ln {a}-{n}\ln {b}", rf"{n + 1}\ln({a * b})", rf"{n}\ln({a * b + 1})"])
    return rf"\ln({(a * b) ** n})", same, wrong


@kind
def multiples_of_pi(rng):
    a, b = rng.randint(2, 40), rng.randint(2, 12)
    value = Fraction(a, b)
    same = rng.choice([rf"{frac(value)}\pi", rf"\frac{{{2 * a}\pi}}{{{2 * b}}}", rf"{a}\pi/{b}"])
    wrong = rng.choice([rf"\frac{{{a + 1}\pi}}{{{b}}}", rf"\frac{{{a}\pi}}{{{b + 1}}}", rf"\frac{{{a}\pi^2}}{{{b}}}"])
    return rf"\frac{{{a}\pi}}{{{b}}}", same, wrong


@kind
def complex_numbers(rng):
    a, b, c = nonzero(rng, 9), nonzero(rng, 9), rng.randint(2, 5)
    same = rng.choice([f"{times(b, 'i')}{signed(a)}".removeprefix("+"), rf"\frac{{{a * c}{times(b * c, 'i')}}}{{{c}}}"])
    wrong = rng.choice([f"{a}{times(-b, 'i')}", f"{-a}{times(b, 'i')}", f"{a}{times(b * 10, 'i')}"])
    return f"{a}{times(b, 'i')}", same, wrong


# Expressions


@kind
def roots_of_a_letter(rng):
    x, a = rng.choice("nxkat"), rng.randint(2, 9)
    forms = [rf"\frac{{{a}}}{{\sqrt{{{x}}}}}", rf"{a}\sqrt{{\frac{{1}}{{{x}}}}}", rf"\frac{{{a}\sqrt{{{x}}}}}{{{x}}}"]
    forms += [rf"{a}{x}^{{-\frac{{1}}{{2}}}}", rf"\sqrt{{\frac{{{a * a}}}{{{x}}}}}", rf"{a}{x}^{{-1/2}}"]
    reference, same = rng.sample(forms, 2)
    wrong = [rf"{a}\sqrt{{{x}}}", rf"-{a}\sqrt{{1/{x}}}", rf"{a + 1}\sqrt{{1/{x}}}", rf"\frac{{{a}}}{{\sqrt{{{x}+1}}}}"]
    return reference, same, rng.choice(wrong)


@kind
def roots_of_two_letters(rng):
    x, y = rng.sample("abnxt", 2)
    forms = [rf"\sqrt{{\frac{{{x}}}{{{y}}}}}", rf"\frac{{\sqrt{{{x}}}}}{{\sqrt{{{y}}}}}"]
    forms += [rf"\frac{{\sqrt{{{x}{y}}}}}{{{y}}}", rf"\frac{{{x}}}{{\sqrt{{{x}{y}}}}}"]
    reference, same = rng.sample(forms, 2)
    wrong = [rf"\sqrt{{\frac{{{y}}}{{{x}}}}}", rf"-\frac{{\sqrt{{{x}}}}}{{\sqrt{{{y}}}}}", rf"\sqrt{{{x}{y}}}"]
    return reference, same, rng.choice([*wrong, rf"\frac{{{x}}}{{{y}}}"])


@kind
def absolute_values(rng):
    a, x = rng.randint(1, 30), rng.choice("xyt")
    same = rng.choice([rf"|{a}-{x}|", rf"\sqrt{{({x}-{a})^2}}", rf"\sqrt{{{x}^2-{2 * a}{x}+{a * a}}}"])
    return rf"|{x}-{a}|", same, rng.choice([f"{x}-{a}", f"{a}-{x}", f"|{x}+{a}|", f"|{x}|-{a}"])


@kind
def products(rng):
    a, b, x = nonzero(rng, 12), nonzero(rng, 12), rng.choice("xynt")
    if a + b == 0:
        a += 20
    middle = times(a + b, x)
    same = f"{x}^2{middle}{signed(a * b)}"
    wrong = rng.choice(
        [f"{x}^2{times(-a - b, x)}{signed(a * b)}", f"{x}^2{middle}{signed(-a * b)}", f"{x}^3{middle}{signed(a * b)}"]
    )
    return f"({x}{signed(a)})({x}{signed(b)})", same, wrong


@kind
def powers_of_sums(rng):
    a, n = nonzero(rng, 5), rng.choice([3, 4])
    terms = [(comb(n, k) * a**k, n - k) for k in range(n + 1)]

    def written(terms):
        text = "".join(times(c, f"x^{e}" if e > 1 else "x") if e else signed(c) for c, e in terms)
        return text.removeprefix("+")

    at = rng.randrange(1, n + 1)
    wrong = [(-c if k == at else c, e) for k, (c, e) in enumerate(terms)]
    return f"(x{signed(a)})^{n}", written(terms), written(wrong)


@kind
def fractions_of_expressions(rng):
    a, b = rng.sample(range(1, 12), 2)
    x = rng.choice("xnt")
    same = rf"\frac{{{b - a}}}{{({x}+{a})({x}+{b})}}"
    wrong = rng.choice(
        [
            rf"\frac{{{a - b}}}{{({x}+{a})({x}+{b})}}",
            rf"\frac{{{b - a}}}{{({x}-{a})({x}+{b})}}",
            rf"\frac{{{b - a}}}{{{x}+{a}}}",
        ]
    )
    return rf"\frac{{1}}{{{x}+{a}}}-\frac{{1}}{{{x}+{b}}}", same, wrong


@kind
def exponentials(rng):
    a, b, c = rng.randint(2, 7), rng.randint(1, 5), rng.randint(2, 5)
    same = rng.choice([rf"{a}^{{{b}}} \cdot {a}^{{{c}n}}", rf"{a**b} \cdot ({a**c})^n"])
    wrong = rng.choice([rf"{a}^{{{c}n-{b}}}", rf"{a}^{{{c + 1}n+{b}}}", rf"{a**b}+{a}^{{{c}n}}"])
    return rf"{a}^{{{c}n+{b}}}", same, wrong


@kind
def factorials_of_a_letter(rng):
    a = rng.randint(1, 6)
    same = rng.choice([rf"(n+{a + 1})(n+{a})!", rf"\frac{{(n+{a + 2})!}}{{n+{a + 2}}}"])
    wrong = rng.choice([rf"(n+{a})(n+{a})!", rf"(n+{a + 2})!", rf"(n+{a + 1})!+1"])
    return rf"(n+{a + 1})!", same, wrong


@kind
def trigonometry(rng):
    a = rng.randint(1, 6)
    x = f"{a}x" if a > 1 else "x"
    pairs = [(rf"\sin({2 * a}x)", rf"2\sin({x})\cos({x})", rf"2\sin({x})\sin({x})")]
    pairs += [
        (rf"\cos^2({x})", rf"1-\sin^2({x})", rf"1+\sin^2({x})"),
        (rf"\tan({x})", rf"\frac{{\sin({x})}}{{\cos({x})}}", rf"\frac{{\cos({x})}}{{\sin({x})}}"),
    ]
    pairs += [
        (rf"\cos({2 * a}x)", rf"2\cos^2({x})-1", rf"2\sin^2({x})-1"),
        (rf"\sin({x})", rf"\cos({x}-\frac{{\pi}}{{2}})", rf"\cos({x}+\frac{{\pi}}{{2}})"),
    ]
    c = rng.randint(2, 9)
    reference, same, wrong = rng.choice(pairs)
    return f"{reference}+{c}", f"{c}+{same}", f"{c}+{wrong}"


@kind
def sums_with_signs(rng):
    c = rng.randint(1, 30)
    same = rf"{c}-(-1)^{{n+1}}"
    return rf"{c}+(-1)^n", same, rng.choice([rf"{c}-(-1)^n", rf"{c}+1", rf"{c + 1}+(-1)^n"])


# Sets, relations and other objects


@kind
def intervals(rng):
    a = rng.randint(-20, 20)
    b = a + rng.randint(1, 20)
    left, right = rng.choice("(["), rng.choice(")]")
    same = rng.choice(
        [rf"\left{left} {a}, {b} \right{right}", rf"{left}{2 * a}/2, {b}{right}", rf"x \in {left}{a},{b}{right}"]
    )
    other = {"(": "[", "[": "(", ")": "]", "]": ")"}
    wrong = rng.choice(
        [
            f"{other[left]}{a},{b}{right}",
            f"{left}{a},{b}{other[right]}",
            f"{left}{a - 1},{b}{right}",
            f"{left}{a},{b + 1}{right}",
        ]
    )
    return f"{left}{a},{b}{right}", same, wrong


@kind
def small_intervals(rng):
    n, k = rng.randint(8, 60), rng.choice([2, 10])
    reference = rf"\left[0, \frac{{1}}{{{k}^{{{n}}}}}\right]"
    wrong = rng.choice([rf"[0, {k}^{{-{n + 1}}}]", rf"[0, {k}^{{-{n}}})", r"[0,0]", rf"[-{k}^{{-{n}}},0]"])
    return reference, rf"[0, {k}^{{-{n}}}]", wrong if k**n > 10**7 or wrong != "[0,0]" else rf"[0, {k}^{{-{n}}})"


@kind
def unions(rng):
    a = rng.randint(-20, 20)
    b = a + rng.randint(1, 20)
    left, right = rng.choice(")]"), rng.choice("([")
    same = rf"{right}{b},\infty) \cup (-\infty,{a}{left}"
    wrong = rng.choice(
        [
            rf"(-\infty,{a - 1}{left}\cup{right}{b},\infty)",
            rf"(-\infty,{a}{left}",
            rf"(-\infty,{b}{left}\cup{right}{b + 1},\infty)",
        ]
    )
    return rf"(-\infty,{a}{left}\cup{right}{b},\infty)", same, wrong


@kind
def inequalities(rng):
    a, c, sign = rng.randint(-20, 20), rng.randint(2, 6), rng.choice(["<", ">", r"\le ", r"\ge "])
    turned = {"<": ">", ">": "<", r"\le ": r"\ge ", r"\ge ": r"\le "}
    strict = {"<": r"\le ", ">": r"\ge ", r"\le ": "<", r"\ge ": ">"}
    same = rng.choice([f"{a}{turned[sign]}x", f"{c}x{sign}{a * c}", f"x{signed(-a) if a else ''}{sign}0"])
    wrong = rng.choice([f"x{turned[sign]}{a}", f"x{strict[sign]}{a}", f"x{sign}{a + 1}", f"x{sign}{-a or 5}"])
    return f"x{sign}{a}", same, wrong


@kind
def chains(rng):
    a = rng.randint(-20, 20)
    b = a + rng.randint(1, 20)
    same = rng.choice([f"{b}>x>{a}", f"({a},{b})"])
    wrong = rng.choice([rf"{a} \le x<{b}", rf"{a}<x<{b + 1}", rf"{a - 1}<x<{b}", rf"{a}<x \le {b}"])
    return f"{a}<x<{b}", same, wrong


@kind
def sets(rng):
    values = rng.sample(range(-30, 30), rng.randint(3, 5))
    other = rng.sample(values, len(values))
    changed = [*values[:-1], next(n for n in range(values[-1] + 1, 99) if n not in values)]
    wrong = rng.choice([changed, values[:-1], [*values, 31]])
    return (
        rf"\{{{', '.join(map(str, values))}\}}",
        rf"\{{{','.join(map(str, other))}\}}",
        rf"\{{{','.join(map(str, wrong))}\}}",
    )


@kind
def sets_of_small_numbers(rng):
    n = rng.randint(7, 50)
    reference = rf"\left\{{0, \frac{{1}}{{10^{{{n}}}}}\right\}}"
    return (
        reference,
        rf"\{{10^{{-{n}}}, 0\}}",
        rng.choice([rf"\{{10^{{-{n + 1}}}, 0\}}", rf"\{{0, -10^{{-{n}}}\}}", r"\{0\}"]),
    )


@kind
def tuples(rng):
    a, b, c = rng.sample(range(-20, 20), 3)
    same = rf"\left({2 * a}/2, {b}, {frac(Fraction(3 * c, 3) + Fraction(1, 2))}-\frac{{1}}{{2}}\right)"
    wrong = rng.choice([f"({b},{a},{c})", f"({a},{b},{c + 21})", f"({a},{b})", f"({a},{b},{-c or 7})"])
    return f"({a},{b},{c})", same, wrong


@kind
def matrices(rng):
    a, b, c, d = rng.sample(range(-9, 30), 4)

    def written(*v, of="pmatrix"):
        return rf"\begin{{{of}}}{v[0]} & {v[1]} \\ {v[2]} & {v[3]}\end{{{of}}}"

    same = rng.choice([written(a, b, c, d, of="bmatrix"), written(f"{2 * a}/2", b, c, d)])
    return written(a, b, c, d), same, rng.choice([written(a, b, c, d + 30), written(a, c, b, d), written(d, b, c, a)])


@kind
def lines(rng):
    a, b, c = nonzero(rng, 9), nonzero(rng, 9), rng.randint(2, 5)
    same = rng.choice([f"y{times(-a, 'x')}{signed(-b)}=0", f"{c}y={c * a}x{signed(c * b)}"])
    wrong = rng.choice(
        [f"y={a}x{signed(-b)}", f"y={-a}x{signed(b)}", f"y={a + 1 or 2}x{signed(b)}", f"x={a}y{signed(b)}"]
    )
    if wrong == f"x={a}y{signed(b)}" and a in (1, -1):  # x = -y + b is the same line
        wrong = f"y={a}x{signed(-b)}"
    return f"y={a}x{signed(b)}", same, wrong


@kind
def circles(rng):
    a, b, r = nonzero(rng, 9), nonzero(rng, 9), rng.randint(2, 12)
    rest = a * a + b * b - r * r
    same = f"x^2+y^2{times(2 * a, 'x')}{times(2 * b, 'y')}{signed(rest) if rest else ''}=0"
    wrong = rng.choice(
        [f"(x{signed(-a)})^2+(y{signed(b)})^2={r * r}", f"(x{signed(a)})^2+(y{signed(b)})^2={r * r + 1}"]
    )
    return f"(x{signed(a)})^2+(y{signed(b)})^2={r * r}", same, wrong


@kind
def equations_without_real_solutions(rng):
    a, b = rng.sample(range(1, 60), 2)
    return f"x^2+{a}=0", f"x^2=-{a}", rng.choice([f"x^2+{b}=0", f"x^4+{a}=0"])


@kind
def functions(rng):
    a, b, f = nonzero(rng, 9), nonzero(rng, 20), rng.choice("fgh")
    same = rng.choice([f"{f}(x)={signed(b, True)}{times(a, 'x')}", f"{a}x{signed(b)}"])
    return (
        f"{f}(x)={a}x{signed(b)}",
        same,
        rng.choice([f"{f}(x)={a}x{signed(-b)}", f"{f}(x)={a}x^2{signed(b)}", f"{a + 10}x{signed(b)}"]),
    )


@kind
def congruences(rng):
    m = rng.randint(3, 40)
    r = rng.randrange(1, m)
    same = rng.choice([rf"n \equiv {r} \pmod{{{m}}}", rf"n\equiv {r} \pmod {m}"])
    wrong = rng.choice(
        [rf"n\equiv {r - 1} \pmod{{{m}}}", rf"n\equiv {r} \pmod{{{m + 1}}}", rf"n\not\equiv {r} \pmod{{{m}}}", str(m)]
    )
    return rf"n\equiv {r}\pmod{{{m}}}", same, wrong


# What no parser of formulas understands as a whole: only the same text is equal


@kind
def lists_with_dots(rng):
    a, d, n = rng.randint(1, 9), rng.randint(2, 9), rng.randint(9, 60)
    dots = rng.choice([r"\ldots", r"\dots", r"\cdots", "..."])
    first, second, last = a, a + d, a + n * d
    wrong = rng.choice(
        [f"{first},{second},{last}", rf"{first},{second},{dots},{last + d}", rf"{first},{second + 1},{dots},{last}"]
    )
    return rf"{first},{second},{dots},{last}", rf"{first}, {second}, {dots}, {last}", wrong


@kind
def sums_with_dots(rng):
    n, dots = rng.randint(9, 99), rng.choice([r"\cdots", r"\dots", r"\ldots"])
    wrong = rng.choice([rf"1+2+{dots}+{n + 1}", rf"1+2+{n}", rf"1-2+{dots}+{n}", rf"2+{dots}+{n}"])
    return rf"1+2+{dots}+{n}", rf"1 + 2 + {dots} + {n}", wrong


@kind
def quantifiers(rng):
    c, d = rng.randint(2, 30), rng.randint(2, 30)
    for_all, some = rng.choice([(r"\forall", r"\exists"), (r"\text{for all }", r"\text{for some }")])
    reference = rf"f(x)={c}x {for_all} x>{d}"
    wrong = [rf"f(x)={c}x {some} x>{d}", rf"f(x)={c}x {for_all} x>{d + 1}", rf"f(x)={c}x {for_all} x<{d}"]
    return reference, rf"f(x) = {c}x\ {for_all} x > {d}", rng.choice([*wrong, f"{d}", f"f(x)={c}x", f"x>{d}"])


@kind
def conditions(rng):
    c, d = rng.sample(range(2, 60), 2)
    reference = rf"{c} \text{{ if }} n>{d}"
    wrong = [
        rf"{c} \text{{ if }} n<{d}",
        rf"{c} \text{{ if }} n>{d + 1}",
        rf"{c + 1} \text{{ if }} n>{d}",
        str(d),
        str(c),
    ]
    return reference, rf"{c} \text{{if }} n > {d}", rng.choice(wrong)


@kind
def remarks_at_the_end(rng):
    c, d = rng.sample(range(2, 60), 2)
    word, other = rng.sample(["odd", "even", "prime", "composite"], 2)
    reference = rf"n^{c}+{d} \text{{ for {word} }} n \text{{ only}}"
    wrong = [
        rf"n^{c}+{d} \text{{ for {other} }} n \text{{ only}}",
        rf"n^{c}+{d}",
        rf"n^{c}-{d} \text{{ for {word} }} n \text{{ only}}",
    ]
    return reference, rf"n^{{{c}}}+{d}\text{{ for {word} }}n\text{{ only}}", rng.choice(wrong)


@kind
def cases(rng):
    a, b, c = rng.sample(range(1, 60), 3)
    same = rf"\begin{{cases}} {a}, & x > {c} \\ {b}, & x \le {c} \end{{cases}}"
    wrong = [(b, a, c), (a, b + 60, c), (a, b, c + 1)]
    a2, b2, c2 = rng.choice(wrong)
    return (
        rf"\begin{{cases}}{a},&x>{c}\\{b},&x \le {c}\end{{cases}}",
        same,
        rf"\begin{{cases}}{a2},&x>{c2}\\{b2},&x \le {c2}\end{{cases}}",
    )


@kind
def families_of_solutions(rng):
    a = rng.randint(2, 12)
    reference = rf"\frac{{\pi}}{{{a}}}+2k\pi, k\in\mathbb{{Z}}"
    wrong = [
        rf"\frac{{\pi}}{{{a + 1}}}+2k\pi, k\in\mathbb{{Z}}",
        rf"\frac{{\pi}}{{{a}}}+k\pi, k\in\mathbb{{Z}}",
        rf"\frac{{\pi}}{{{a}}}",
        rf"-\frac{{\pi}}{{{a}}}+2k\pi, k\in\mathbb{{Z}}",
    ]
    return reference, rf"\frac{{\pi}}{{{a}}} + 2k\pi, k \in \mathbb{{Z}}", rng.choice(wrong)


@kind
def maps(rng):
    a, b = rng.randint(2, 30), rng.randint(2, 30)
    wrong = [rf"x \mapsto {a}x-{b}", rf"x \mapsto {a + 1}x+{b}", f"{b}", f"{a}x"]
    return rf"x \mapsto {a}x+{b}", rf"x\mapsto {a}x + {b}", rng.choice(wrong)


@kind
def divisibility(rng):
    a, b = rng.sample(range(2, 60), 2)
    return (
        rf"{a} \mid n+{b}",
        rf"{a}\mid n + {b}",
        rng.choice([rf"{a} \nmid n+{b}", rf"{b} \mid n+{a}", rf"{a} \mid n-{b}", str(b)]),
    )


@kind
def sentences(rng):
    a, b = rng.sample(range(2, 90), 2)
    reference = rf"\text{{at least }} {a} \text{{ of the }} {b} \text{{ cards}}"
    wrong = [
        rf"\text{{at most }} {a} \text{{ of the }} {b} \text{{ cards}}",
        rf"\text{{at least }} {a + 1} \text{{ of the }} {b} \text{{ cards}}",
        str(b),
        rf"\text{{at least }} {b} \text{{ of the }} {a} \text{{ cards}}",
    ]
    return reference, rf"\text{{at least }}{a}\text{{ of the }}{b}\text{{ cards}}", rng.choice(wrong)


@kind
def unbalanced(rng):
    a, b = rng.sample(range(2, 90), 2)
    reference = rng.choice([rf"\frac{{{a}}}{{{b}", rf"({a}+{b}", rf"{a}+{b})", rf"{a}+{b}="])
    return reference, reference + " ", rng.choice([str(b), str(a), reference.replace(str(a), str(a + 1), 1)])


def measure(pairs: list[tuple[str, Triple]], shown: int) -> None:
    from t3d.tasks.math import equal

    totals, asymmetric, turned, seconds = [0, 0, 0], 0, 0, 0.0
    print(f"{'kind':34} {'pairs':>6} {'false negatives':>16} {'false positives':>16}")
    for name in dict.fromkeys(name for name, _ in pairs):
        mine = [triple for other, triple in pairs if other == name]
        wrong: list[list[str]] = [[], []]
        for i, (reference, same, other) in enumerate(mine):
            for answer, truth in ((same, True), (other, False)):
                begun = time.perf_counter()
                verdict = equal(answer, reference)
                seconds += time.perf_counter() - begun
                if i % 5 == 0:
                    turned += 1
                    asymmetric += equal(reference, answer) != verdict
                if verdict != truth:
                    said = "is said to be equal to" if verdict else "is said to differ from"
                    wrong[not truth].append(f"    {answer}  {said}  {reference}")
        row(name, len(mine), *map(len, wrong))
        print("".join(f"{line}\n" for found in wrong for line in found[:shown]), end="", flush=True)
        totals = [total + more for total, more in zip(totals, (len(mine), *map(len, wrong)), strict=True)]
    row("all", *totals)
    print(f"{totals[1]} of {totals[0]} equal pairs are said to differ,")
    print(f"{totals[2]} of {totals[0]} near misses are said to be equal;")
    print(f"{asymmetric} of {turned} verdicts depend on the order; {1000 * seconds / (2 * totals[0]):.1f} ms each")


def row(name: str, n: int, negatives: int, positives: int) -> None:
    print(f"{name:34} {2 * n:6} {negatives / n:16.1%} {positives / n:16.1%}", flush=True)


def run_ons(path: Path) -> None:
    """GSM8K's solutions, each followed by another question and its solution."""
    from t3d.tasks.math import verify_math
    from t3d.tasks.records import read_records

    records = [record for _, record in read_records(path)]
    wrong = dict.fromkeys(("answer marked ####", "after #### headings", "answer in a box", "answer not marked"), 0)
    positives = 0
    for i, record in enumerate(records):
        reference, solution = record["answer"], record["answer"]
        steps, _, final = (part.strip() for part in solution.rpartition("####"))
        for k, name in enumerate(wrong):
            further = records[(i + 1 + 37 * k) % len(records)]
            mine, theirs = solution, further["answer"]
            if name == "after #### headings":
                mine, theirs = f"#### Step 1: read\n#### 2. Compute\n{mine}", f"#### Step 1: read\n{theirs}"
            if k >= 2:
                mark = "The answer is \\boxed{%s}." if k == 2 else "The answer is %s."
                other = theirs.rpartition("####")
                mine, theirs = f"{steps}\n{mark % final}", f"{other[0]}{mark % other[2].strip()}"
            wrong[name] += not verify_math(run_on(mine, further["question"], theirs), reference)
            if k == 0:  # the further answer is right, the one that was asked for is not
                positives += verify_math(run_on(f"{steps}\n#### {final}1", record["question"], solution), reference)
    for name, count in wrong.items():
        print(f"{name:20} {count / len(records):7.2%} of {len(records)} right answers are said to be wrong")
    print(f"{'a wrong answer':20} {positives / len(records):7.2%} are right by what follows it")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--each", type=int, default=23, help="triples of each kind, of two pairs each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", type=lambda text: text.split(","), help="only these")
    parser.add_argument("--wrong", type=int, default=0, help="show so many wrong verdicts of each kind")
    parser.add_argument("--run-ons", type=Path, help="measure run-ons on this file of GSM8K instead")
    args = parser.parse_args()
    if args.run_ons:
        run_ons(args.run_ons)
    else:
        measure(list(triples(args.seed, args.each, args.kinds)), args.wrong)


if __name__ == "__main__":
    main()
