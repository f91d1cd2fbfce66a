"""A decode setting with a guarantee: certified to be worse than a reference on at most a share of all problems.

A *loss* is a problem that the reference solves and the setting does not. A setting is certified when the hypothesis
"it loses more than `alpha` of all problems" is rejected; over a whole grid no false one is certified with probability
at least `1 - delta`, so that any choice among the certified keeps the promise. The rule is Redline's: exact binomial
p-values, corrected by Holm's method. The problems must be draws of those that the promise is about, and the grid must
be chosen without looking at them.
"""

from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from math import ceil, exp, fsum, lgamma, log, log1p

from t3d.components import check_name
from t3d.decoding.config import DecodingConfig
from t3d.decoding.policy import POLICIES
from t3d.errors import T3DError

MOST_PROBLEMS = 100_000  # beyond, `problems_needed` stops looking


def p_value(losses: int, n: int, alpha: float) -> float:
    """P(X <= losses) for X ~ Binomial(n, alpha): how probable so few losses are for a setting that loses `alpha`."""
    if losses >= n:
        return 1.0
    of_all = lgamma(n + 1)
    logs = (
        of_all - lgamma(k + 1) - lgamma(n - k + 1) + k * log(alpha) + (n - k) * log1p(-alpha) for k in range(losses + 1)
    )
    return min(1.0, fsum(map(exp, logs)))


def holm(p_values: list[float], delta: float) -> list[bool]:
    """Which hypotheses are rejected, a true one among them with probability at most `delta` (Holm, 1979)."""
    rejected = [False] * len(p_values)
    for done, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[index] > delta / (len(p_values) - done):
            break
        rejected[index] = True
    return rejected


def certified(losses: list[int], n: int, alpha: float, delta: float) -> list[bool]:
    """Which of the settings, with these losses on the same `n` problems, are certified to lose at most `alpha`.

    Raises:
        T3DError: if alpha or delta is not between 0 and 1.
    """
    check_promise(alpha, delta)
    return holm([p_value(x, n, alpha) for x in losses], delta)


def check_promise(alpha: float, delta: float) -> None:
    for name, value in (("alpha", alpha), ("delta", delta)):
        if not 0 < value < 1:
            raise T3DError(f"{name} must lie between 0 and 1, got {value:g}")


def problems_needed(alpha: float, delta: float, tests: int, share: float = 0.0) -> int | None:
    """Problems that the best of `tests` settings needs to be certified if it loses this share of them.

    Without losses the fewest; else about as many, for exact p-values go up and down with the rounding of the losses.
    None: more than `MOST_PROBLEMS`, or never, because the share is not below alpha.
    """
    check_promise(alpha, delta)

    def enough(n: int) -> bool:
        return p_value(ceil(share * n), n, alpha) <= delta / tests

    if share >= alpha or not enough(MOST_PROBLEMS):
        return None
    low, high = 0, MOST_PROBLEMS  # `high` is enough, `low` is not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def reference_setting(base: DecodingConfig) -> DecodingConfig:
    """The most careful way to decode: one token a step, the most confident first, one block after the other."""
    plain = {"strategy": DecodingConfig.strategy, "flight": DecodingConfig.flight, "blocks_in_flight": 1}
    return replace(base, **plain, steps=base.block_size).canonical()


def candidates(base: DecodingConfig, strategies: Iterable[str], blocks: Iterable[int]) -> list[DecodingConfig]:
    """The grid: each strategy at each value of its own setting, or at each halving of the steps, times the blocks.

    base: the other settings.

    Raises:
        T3DError: for an unknown strategy, or blocks in flight that are out of bounds.
    """
    found = []
    for name, count in product(strategies, blocks):
        check_name("strategy", name, POLICIES)
        speed = POLICIES[name].speed()
        if speed is None:
            steps = [base.block_size >> i for i in range(base.block_size.bit_length())]
            values = [{"steps": n} for n in steps]
        else:
            values = [{speed.name: value} for value in speed.metadata["values"] or (speed.default,)]
        for value in values:
            found.append(replace(base, strategy=name, blocks_in_flight=count, **value))
    return distinct(found, base)


def distinct(configs: Iterable[DecodingConfig], base: DecodingConfig) -> list[DecodingConfig]:
    """The settings without the reference of `base`, which is resolved (`DecodingConfig.at`), and nothing twice."""
    found = dict.fromkeys(config.at(base.block_size).canonical() for config in configs)
    found.pop(reference_setting(base), None)
    return list(found)
