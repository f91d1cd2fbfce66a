r"""Whether two formulas are equal, in the place of what math-verify does about it (in the helper process only).

math-verify rounds numbers to 6 or 15 digits behind the point, so all small ones are equal, and where it cannot read a
text, it takes a number in it for the whole. Here a text is read whole or not at all; rational numbers are compared
exactly, others relatively, to 400 digits; formulas with letters by their values at points where both are real, which
is what an answer means by `\frac{1}{\sqrt{n}} = \sqrt{\frac{1}{n}}`.
"""

import sympy
from latex2sympy2_extended.logic import And
from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex
from math_verify import grader
from math_verify.parser import parse_latex_cached
from sympy import Basic, Expr, Float, I, MatrixBase, MatrixExpr, Rational, S
from sympy.core.function import AppliedUndef

DIGITS, EXACT = 80, 400  # of numbers as they are compared first, and of those that agree in that
LOST = 55  # of these digits, to sums in which large terms cancel
# By a millionth, and rounding, a decimal may differ from what it stands for, absolutely and relatively.
ROUNDED = Rational(10001, 10**10)
ENOUGH = 3  # points at which both formulas are real

# Of every size and sign; then whole ones, for what is real only there, as a power of -1.
_POINTS = [Rational(*p) for p in ((7, 3), (-5, 2), (1, 7), (-2, 9), (31, 4), (-171, 13), (1009, 8), (13, 11), (-1, 17))]
_WHOLE = [S(n) for n in (3, 8, 1, 14, 5, 2, 11, 6, 4)]
_NORMAL = NormalizationConfig(units=True, malformed_operators=True, nits=True, boxed="none")


class _NotReal(Exception):
    pass


def read(text: str) -> Basic | MatrixBase | None:
    """The formula that `text` is; None where the parser does not understand all of it."""
    try:
        return parse_latex_cached(normalize_latex(text, _NORMAL))
    except Exception:  # the parser raises plain ones
        return None


def compare(gold: str, answer: str) -> bool:
    """In either order, since math-verify looks at relations and sets in one of the two only."""
    found = [read(text) for text in (gold, answer)]
    return None not in found and any(
        grader.verify(*pair, timeout_seconds=None, allow_set_relation_comp=True) for pair in (found, found[::-1])
    )


def same(a: Basic, b: Basic, *_) -> bool:
    """Whether two formulas that are no relations or sets are equal."""
    if any(isinstance(x, (MatrixBase, MatrixExpr)) for x in (a, b)):
        a, b = a.doit(), b.doit()
        matrices = isinstance(a, MatrixBase) and isinstance(b, MatrixBase) and a.shape == b.shape
        return matrices and all(same(*pair) for pair in zip(a.flat(), b.flat(), strict=True))
    if not isinstance(a, Expr) or not isinstance(b, Expr):
        return a == b
    shares = [grader.get_pct_val(x) for x in (a, b)]
    if shares != [None, None] and same(*(x if p is None else p for x, p in zip((a, b), shares, strict=True))):
        return True  # 50% is 50, too
    rounded = any(grader.is_atomic_or_pct_atomic(x, Float) for x in (a, b))
    a, b = _evaluated(a), _evaluated(b)
    if a == b:
        return True
    names = sorted({symbol.name for symbol in a.free_symbols | b.free_symbols})
    if names == ["i"]:  # the parser's imaginary unit, where it stands beside a number
        a, b = (x.subs(dict.fromkeys(x.free_symbols, I)) for x in (a, b))
        names = []
    if not names:
        return _same_number(a, b, rounded)
    return _same_at_points(a, b, names)


def _evaluated(x: Expr) -> Expr:
    """Sums, integrals and the like carried out, decimals as the fractions that they are, `f(x)` as one letter."""
    x = x.xreplace({d: Rational(str(d)) for d in x.atoms(Float)}).doit()
    return x.xreplace({f: sympy.Symbol(str(f), real=True) for f in x.atoms(AppliedUndef)})


def _same_number(a: Expr, b: Expr, rounded: bool) -> bool:
    if a.is_finite is False or b.is_finite is False or (a.is_Rational and b.is_Rational and not rounded):
        return a == b
    a, b = (x if x.has(I) else x.replace(_is_odd_root, _odd_root) for x in (a, b))
    if rounded:
        return _near(_digits(a, DIGITS), _digits(b, DIGITS), ROUNDED, 1)
    return all(_near(_digits(a, n), _digits(b, n), Rational(1, 10 ** (n - LOST))) for n in (DIGITS, EXACT))


def _digits(x: Expr, digits: int) -> Expr:
    """Its value; zero where it has no digit before so many."""
    value = x.evalf(digits, maxn=3 * digits)
    parts = zip(value.as_real_imag(), (1, I), strict=True)
    return sum((part * unit for part, unit in parts if not _lost(part)), S.Zero)


def _lost(value: Expr) -> bool:
    return isinstance(value, Float) and value._prec < 20


def _near(a: Expr, b: Expr, share: Rational, most: int | None = None) -> bool:
    size = max(abs(a), abs(b))
    return bool(abs(a - b) <= share * (size if most is None else min(size, most)))


def _same_at_points(a: Expr, b: Expr, names: list[str]) -> bool:
    roots = [x for x in a.atoms(sympy.Pow) | b.atoms(sympy.Pow) if x.exp.is_Rational and x.exp.q % 2 == 0]
    positive = {s.name for x in roots if not x.base.is_Add for s in x.base.free_symbols}  # as n in the root of 1/n
    agreed = 0
    for values in (_POINTS, _WHOLE):
        for i in range(len(values)):
            point = {name: values[(i + 4 * j) % len(values)] for j, name in enumerate(names)}
            point |= {name: abs(point[name]) for name in positive}
            try:
                found = [_real(x, point) for x in (a, b)]
            except _NotReal:
                continue
            if not _near(*found, Rational(1, 10 ** (DIGITS - LOST))):
                return False
            agreed += 1
    return agreed >= ENOUGH or sympy.simplify(a - b).is_zero is True


def _real(x: Expr, point: dict[str, Rational]) -> Expr:
    """Its value, exact where it stays rational; _NotReal where it, or a part of it, is no real number there."""
    if x.is_Symbol:
        return point[x.name]
    if x.is_Rational:
        return x
    if not x.args:
        value = x
    elif all(isinstance(part, Expr) for part in x.args):
        parts = [_real(part, point) for part in x.args]
        if x.is_Pow and abs(parts[1]) > 4000:
            parts[0] = parts[0].evalf(DIGITS)  # the exact value may have no end
        value = x.func(*parts)
        if x.is_Pow and not x.exp.free_symbols and _is_odd_root(value_of := sympy.Pow(*parts, evaluate=False)):
            value = _odd_root(value_of)
        if x.is_Add and value and abs(value) < max(map(abs, parts)) * Rational(1, 10**LOST):
            value = value if value.is_Rational else S.Zero
    else:  # it binds letters, or has conditions
        value = x.subs({symbol: point[symbol.name] for symbol in x.free_symbols}).doit()
    if not value.is_Rational:
        value = value.evalf(DIGITS)
    if not (value.is_Rational or value.is_Float):
        raise _NotReal
    return value


def _is_odd_root(x: Basic) -> bool:
    """Whether it is as the cube root of -8, a real number in answers and a complex one in sympy."""
    return bool(x.is_Pow and x.base.is_negative and x.exp.is_Rational and x.exp.q > 1 and x.exp.q % 2)


def _odd_root(x: Expr) -> Expr:
    return (-1) ** x.exp.p * (-x.base) ** x.exp


def _same_relation(gold, pred, *precision) -> bool:
    """Whether one is the other times a number, else as math-verify, but never for two that have no solutions."""
    ratio = sympy.cancel((gold.lhs - gold.rhs) / (pred.lhs - pred.rhs))
    if ratio.is_number:
        turned = grader.INVERSE_RELATIONS.get(type(gold), type(gold))
        return isinstance(pred, turned if ratio.is_negative else type(gold)) and not ratio.is_zero
    return _solve_and_compare(gold, pred, *precision) and bool(sympy.solve(gold, gold.free_symbols))


def _same_relations(gold, pred, *precision) -> bool:
    """As math-verify, or with the second chain read from its other end: `0 < x < 1`, `1 > x > 0`."""
    found = _compare_relational(gold, pred, *precision)
    if not found and isinstance(gold, And) and isinstance(pred, And):
        found = _compare_relational(gold, And(*pred._unsorted_args[::-1]), *precision)
    return found


def _same_letter(gold: Basic, pred: Basic) -> bool:
    return _compare_symbols(gold, pred) or same(gold, pred)


_solve_and_compare, _compare_symbols = grader.sympy_solve_and_compare, grader.sympy_compare_symbols
_compare_relational = grader.sympy_compare_relational
grader.sympy_numeric_eq, grader.sympy_symbolic_eq = same, lambda *_: False  # it has no place for others
grader.sympy_solve_and_compare, grader.sympy_compare_symbols = _same_relation, _same_letter
grader.sympy_compare_relational = _same_relations
