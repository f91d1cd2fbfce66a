import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t3d import T3DError
from t3d.evaluation import aup, bootstrap, compare, majority, mcnemar, pareto, pass_at_k, tokps, wilson
from t3d.evaluation.metrics import Speed
from t3d.trajectories import NFE
from tests.trajectory_examples import make_trajectory


def test_wilson_by_hand():
    # p = .5, n = 4, z^2 = 3.8415: centre .5, half width z / (1 + z^2 / 4) * sqrt(1 / 16 + z^2 / 64)
    low, high = wilson(2, 4)
    assert low == pytest.approx(0.15004, abs=1e-5)
    assert high == pytest.approx(0.84996, abs=1e-5)
    assert wilson(0, 0) == (0, 1)
    assert wilson(0, 10)[0] == 0
    assert wilson(10, 10)[1] == 1


@settings(deadline=None)
@given(n=st.integers(1, 3000), share=st.floats(0, 1))
def test_wilson_is_scipys(n, share):
    stats = pytest.importorskip("scipy.stats", reason="needs t3d[test]")
    k = round(share * n)
    interval = stats.binomtest(k, n).proportion_ci(method="wilson")
    assert wilson(k, n) == pytest.approx((interval.low, interval.high), abs=1e-9)


@settings(deadline=None)
@given(a=st.integers(0, 60), b=st.integers(0, 60))
def test_mcnemar_is_the_binomial_test(a, b):
    stats = pytest.importorskip("scipy.stats", reason="needs t3d[test]")
    expected = stats.binomtest(a, a + b).pvalue if a + b else 1.0
    assert mcnemar(a, b) == pytest.approx(expected, abs=1e-9)


def test_mcnemar_by_hand():
    assert mcnemar(0, 0) == 1
    assert mcnemar(1, 5) == pytest.approx(2 * (1 + 6) / 64)
    assert mcnemar(3, 3) == 1
    assert mcnemar(1500, 100) < 1e-200 + mcnemar(100, 1500)


def test_bootstrap_is_seeded_and_near_the_normal_interval():
    values = [1.0] * 300 + [0.0] * 100
    low, high = bootstrap(values)
    assert (low, high) == bootstrap(values)
    half = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert low == pytest.approx(0.75 - half, abs=0.01)
    assert high == pytest.approx(0.75 + half, abs=0.01)
    assert bootstrap([0.5] * 9) == (0.5, 0.5)
    assert bootstrap([]) == (0, 1)


def test_bootstrap_is_scipys():
    stats = pytest.importorskip("scipy.stats", reason="needs t3d[test]")
    values = [0.0, 0.25, 0.5, 0.5, 1.0, 1.0, 0.0, 0.75] * 12
    theirs = stats.bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", rng=1).confidence_interval
    assert bootstrap(values) == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_aup_by_hand():
    # best 80: W(80) = 1, W(76) = exp(-3 * .05); 60 lies more than 5 below 80 and is left out
    w = math.exp(-0.15)
    assert aup([(2.0, 76.0), (1.0, 80.0), (4.0, 60.0)]) == pytest.approx(80 + (76 * w + 80) / 2)
    # another method's best of 100 weighs these down, but never the first rectangle
    w80, w76 = math.exp(-0.6), math.exp(-0.72)
    assert aup([(1.0, 80.0), (2.0, 76.0)], best=100.0) == pytest.approx(80 + (76 * w76 + 80 * w80) / 2)
    assert aup([(3.0, 50.0)]) == 150
    assert aup([]) == 0
    assert aup([(1.0, 0.0), (2.0, 0.0)]) == 0


def test_tokens_per_forward_counts_ids_and_both_kinds_of_forwards():
    total = Speed()
    total.add(make_trajectory("a", blocks=3, length=10, nfe=NFE(1, 4, 2)))
    total.add(make_trajectory("b", blocks=3, length=2, nfe=NFE(0, 4, 1)))
    assert (total.sequences, total.tokens) == (2, 12)
    assert total.tpf == 12 / 8
    assert total.tpf_all == 12 / 12
    assert total.nfe == 6
    assert Speed().tpf == Speed().tpf_all == Speed().nfe == 0
    total.add(make_trajectory("c", blocks=3, length=12, nfe=NFE(1, 2, 0, verify=3)))
    assert (total.tpf, total.tpf_all, total.nfe) == (24 / 13, 24 / 18, 18 / 3)  # verifying forwards predict too
    assert tokps(4, 2) == 2
    assert tokps(5, 2) == 2.5


def test_pass_at_k_by_hand_and_against_counting():
    assert pass_at_k(4, 1, 1) == 0.25
    assert pass_at_k(4, 1, 4) == 1
    assert pass_at_k(4, 2, 2) == pytest.approx(1 - 1 / 6)
    assert pass_at_k(5, 0, 3) == 0
    with pytest.raises(ValueError, match="pass@3"):
        pass_at_k(2, 1, 3)


def test_majority():
    assert majority(["7", "8", "7"], [True, False, True])
    assert not majority(["7", "8", "8"], [True, False, False])
    assert majority(["7", "8"], [True, False])  # a tie: the first
    assert majority([None, None, "7"], [False, False, True])
    assert not majority([None], [False])


def test_pareto():
    points = [(1, 5), (2, 4), (2, 3), (3, 4), (0.5, 5)]
    assert pareto(points) == [0, 3]
    assert pareto([]) == []


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_pareto_is_what_nothing_dominates(points):
    def dominated(i):
        x, y = points[i]
        return any((a >= x and b >= y) and (a, b) != (x, y) for a, b in points)

    front = pareto(points)
    assert {points[i] for i in front} == {points[i] for i in range(len(points)) if not dominated(i)}
    assert [points[i][0] for i in front] == sorted({points[i][0] for i in front})


def test_compare_pairs_problems():
    def verdicts(values):
        return [make_trajectory(f"{i}", correct=v) for i, v in enumerate(values)]

    result = compare(verdicts([True, True, False, False, True, None]), verdicts([True, False, True, False, False]))
    assert (result.both, result.only_a, result.only_b, result.neither, result.n) == (1, 2, 1, 1, 5)
    assert result.difference == pytest.approx(0.2)
    assert result.ci95[0] < 0.2 < result.ci95[1]
    assert result.p_value == 1
    with pytest.raises(T3DError, match="share no verified problem"):
        compare(verdicts([True]), verdicts([None]))
