"""Settings with a guarantee: the p-values, the correction, how many problems it takes, and that promises are kept."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from t3d import DecodingConfig, T3DError
from t3d.decoding.guarantee import candidates, certified, holm, p_value, problems_needed, reference_setting

BASE = DecodingConfig(max_tokens=16, seed=3).at(8)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 3000), st.data(), st.floats(1e-4, 0.999))
def test_p_values_are_those_of_scipy(n, data, alpha):
    losses = data.draw(st.integers(0, n))
    assert p_value(losses, n, alpha) == pytest.approx(float(binom.cdf(losses, n, alpha)), rel=1e-8, abs=1e-290)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.01, 0.5))
def test_holm_by_its_closed_form(p_values, delta):
    """A hypothesis is rejected if each p-value up to its own is at most delta / (how many are no smaller)."""
    rejected = holm(p_values, delta)
    ordered = sorted(p_values)
    for p, found in zip(p_values, rejected, strict=True):
        before = [(x, len(ordered) - i) for i, x in enumerate(ordered) if x <= p]
        if p_values.count(p) == 1:
            assert found == all(x <= delta / left for x, left in before)
    assert sum(rejected) >= sum(p <= delta / len(p_values) for p in p_values)  # never less than Bonferroni
    assert not any(found and p > delta for p, found in zip(p_values, rejected, strict=True))


@pytest.mark.parametrize("same_problems", [True, False])
def test_promises_are_kept(same_problems):
    """Of many calibrations at most a share delta certifies anything that loses more than alpha, whatever it chooses.

    All settings lose just more than alpha, which is the hardest case, or some less. Losses of different settings on
    the same problems go together, or are independent.
    """
    alpha, delta, n, times = 0.1, 0.2, 150, 1500
    rng = np.random.default_rng(0)
    for risks in ([0.101] * 6, [0.02, 0.05, 0.101, 0.101, 0.12, 0.3]):
        draws = rng.random((times, 1 if same_problems else len(risks), n))
        losses = (draws < np.array(risks)[:, None]).sum(-1)  # (times, settings)
        broken = certain = 0
        for row in losses.tolist():
            passed = certified(row, n, alpha, delta)
            broken += any(ok and risk > alpha for ok, risk in zip(passed, risks, strict=True))
            certain += passed[0]
        assert broken / times <= delta + 3 * (delta * (1 - delta) / times) ** 0.5
        assert broken > 0  # the bound is not idle
        if risks[0] < alpha:
            assert certain / times > 0.95  # what is far below alpha is found


@settings(max_examples=60, deadline=None)
@given(st.floats(0.01, 0.3), st.floats(0.01, 0.3), st.integers(1, 40))
def test_problems_needed_without_losses_is_the_fewest(alpha, delta, tests):
    n = problems_needed(alpha, delta, tests)
    assert certified([0] + [n] * (tests - 1), n, alpha, delta)[0]
    assert n == 1 or not any(certified([0] * tests, n - 1, alpha, delta))


def test_problems_needed_with_losses():
    n = problems_needed(0.05, 0.05, 10, share=0.02)
    assert 300 < n < 700
    assert certified([round(0.02 * 2 * n)] + [n] * 9, 2 * n, 0.05, 0.05)[0]
    assert not certified([round(0.02 * n / 2)] + [n // 2] * 9, n // 2, 0.05, 0.05)[0]
    assert problems_needed(0.05, 0.05, 10, share=0.05) is None
    assert problems_needed(0.05, 0.05, 10, share=0.0499) is None  # more than anyone has
    for alpha, delta, name in ((0, 0.1, "alpha"), (1, 0.1, "alpha"), (0.1, 0, "delta"), (0.1, 1.5, "delta")):
        with pytest.raises(T3DError, match=f"{name} must lie between 0 and 1"):
            certified([0], 10, alpha, delta)


def test_the_grid():
    reference = reference_setting(BASE)
    assert (reference.strategy, reference.steps, reference.seed) == ("low_confidence_static", 8, 3)
    grid = candidates(BASE, ["adaptive", "low_confidence_static"], [1, 2])
    adaptive = [c for c in grid if c.strategy == "adaptive"]
    assert [(c.risk, c.blocks_in_flight) for c in adaptive[:5]] == [(r, 1) for r in (0.02, 0.05, 0.1, 0.2, 0.4)]
    assert len(adaptive) == 10
    static = [(c.steps, c.blocks_in_flight) for c in grid if c.strategy == "low_confidence_static"]
    assert static == [(4, 1), (2, 1), (1, 1), (8, 2), (4, 2), (2, 2), (1, 2)]  # without the reference
    assert candidates(replace(BASE, steps=2), ["low_confidence_static"], [1]) == [
        c for c in grid if c.strategy == "low_confidence_static" and c.blocks_in_flight == 1
    ]
    assert len(set(grid)) == len(grid)
    with pytest.raises(T3DError, match="did you mean 'adaptive'"):
        candidates(BASE, ["adaptve"], [1])
    with pytest.raises(T3DError, match="blocks_in_flight"):
        candidates(BASE, ["adaptive"], [0])


def test_every_strategy_has_a_grid():
    from t3d.decoding.policy import POLICIES

    for name in POLICIES:
        assert candidates(BASE, [name], [1, 2]), name
