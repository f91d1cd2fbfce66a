"""Each strategy by its definition, on numbers small enough to check by eye, and the rules that hold for all."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from t3d.decoding import DecodingConfig
from t3d.decoding.strategies import STRATEGIES, Candidates, commit_mask, step_quota
from t3d.errors import T3DError


def candidates(confidence, entropy=None, masked=None, quota=1, floor=1, u=None, **bounds):
    """One row. Places that are not masked get what the engine puts there."""
    n = len(confidence)
    masked = torch.tensor([masked or [True] * n])
    bounds = {"threshold": 0.9, "entropy_bound": 0.35, "factor": 1.0, "risk": 0.1} | bounds
    return Candidates(
        masked=masked,
        confidence=torch.tensor([confidence]).masked_fill(~masked, -torch.inf),
        entropy=torch.tensor([entropy or [0.0] * n]).masked_fill(~masked, torch.inf),
        u=torch.tensor([u or [0.0] * n]),
        quota=torch.tensor([quota]),
        floor=torch.tensor([floor]),
        **{name: torch.tensor([value]) for name, value in bounds.items()},
    )


def chosen(name, c):
    return commit_mask(STRATEGIES[name], c)[0].nonzero()[:, 0].tolist()


def test_static_takes_the_most_confident_and_the_leftmost_of_equals():
    assert chosen("low_confidence_static", candidates([0.1, 0.9, 0.5, 0.9], quota=1)) == [1]
    assert chosen("low_confidence_static", candidates([0.1, 0.9, 0.5, 0.9], quota=3)) == [1, 2, 3]


def test_static_never_touches_what_is_not_masked():
    c = candidates([0.9, 0.9, 0.1, 0.2], masked=[False, False, True, True], quota=4)
    assert chosen("low_confidence_static", c) == [2, 3]


@pytest.mark.parametrize(("floor", "want"), [(1, [1]), (3, [0, 1, 2])])
def test_dynamic_commits_all_above_and_at_least_the_floor(floor, want):
    assert chosen("low_confidence_dynamic", candidates([0.95, 0.99, 0.2, 0.91])) == [0, 1, 3]
    assert chosen("low_confidence_dynamic", candidates([0.5, 0.7, 0.4, 0.3], floor=floor)) == want


def test_dynamic_threshold_is_exclusive():
    assert chosen("low_confidence_dynamic", candidates([1.0, 0.5, 1.0], threshold=1.0)) == [0]


def test_sequential_goes_left_to_right_over_what_is_masked():
    assert chosen("sequential", candidates([0.1] * 5, masked=[False, True, False, True, True], quota=2)) == [1, 3]


def test_random_takes_the_largest_numbers_of_masked_places():
    c = candidates([0.1] * 4, masked=[False, True, True, True], u=[0.99, 0.1, 0.8, 0.5], quota=2)
    assert chosen("random", c) == [2, 3]


def test_entropy_bounds_differ_by_the_last_token():
    entropy = [0.3, 0.1, 5.0, 0.2]  # sorted: .1 .2 .3 5; sums .1 .3 .6 5.6; without the last 0 .1 .3 .6
    for bound, sdar, eb in ((0.25, [1], [1, 3]), (0.4, [1, 3], [0, 1, 3]), (1.0, [0, 1, 3], [0, 1, 2, 3])):
        c = candidates([0.5] * 4, entropy=entropy, entropy_bound=bound)
        assert chosen("entropy_bounded_sdar", c) == sdar
        assert chosen("entropy_bounded_eb", c) == eb


def test_nothing_below_the_bound_commits_the_most_confident():
    c = candidates([0.2, 0.6, 0.4], entropy=[3.0, 3.0, 2.0], entropy_bound=0.0)
    assert chosen("entropy_bounded_sdar", c) == [1]
    assert chosen("entropy_bounded_eb", c) == [2]  # the paper's rule always commits the lowest entropy


def test_factor_is_the_largest_prefix():
    # n = 1: 2 * .1 < 1; n = 2: 3 * .3 = .9 < 1; n = 3: 4 * .3 = 1.2
    assert chosen("factor", candidates([0.7, 0.9, 0.69999, 0.2])) == [0, 1]
    assert chosen("factor", candidates([0.2, 0.1, 0.15])) == [0]


def test_adaptive_spreads_the_doubt_over_steps():
    c = [0.9, 0.9, 0.8, 0.4]  # one wrong token expected
    assert chosen("adaptive", candidates(c, risk=1.1)) == [0, 1, 2, 3]
    assert chosen("adaptive", candidates(c, risk=0.6)) == [0, 1]
    assert chosen("adaptive", candidates(c, risk=0.1)) == [0]
    assert chosen("adaptive", candidates(c, risk=0.0)) == [0]
    assert chosen("adaptive", candidates([1.0, 1.0], risk=0.0)) == [0, 1]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_all_strategies_commit_some_of_the_masked(data):
    n = data.draw(st.integers(1, 9))
    numbers = st.lists(st.floats(0, 1, width=32), min_size=n, max_size=n)
    masked = data.draw(st.lists(st.booleans(), min_size=n, max_size=n).filter(any))
    c = candidates(
        data.draw(numbers),
        entropy=[8 * x for x in data.draw(numbers)],
        masked=masked,
        quota=data.draw(st.integers(1, sum(masked))),
        floor=data.draw(st.integers(1, n)),
        u=data.draw(numbers),
        threshold=data.draw(st.floats(0, 1)),
        entropy_bound=data.draw(st.floats(0, 9)),
        factor=data.draw(st.floats(0, 9)),
        risk=data.draw(st.floats(0, 9)),
    )
    for name in STRATEGIES:
        picked = chosen(name, c)
        assert picked
        assert all(masked[i] for i in picked)


@pytest.mark.parametrize("name", [n for n, s in STRATEGIES.items() if s.knob])
def test_knobs_run_from_one_token_to_all(name):
    knob = STRATEGIES[name].knob
    confidence, entropy = [0.6, 0.5, 0.4, 0.3], [1.0, 1.1, 1.2, 1.3]
    assert len(chosen(name, candidates(confidence, entropy, **{knob.name: knob.slow}))) == 1
    assert len(chosen(name, candidates(confidence, entropy, **{knob.name: knob.fast}))) == 4


@given(block=st.integers(1, 40), data=st.data())
def test_quotas_sum_to_the_block(block, data):
    steps = data.draw(st.integers(1, block))
    quotas = [step_quota(block, steps, s) for s in range(steps)]
    assert sum(quotas) == block
    assert max(quotas) - min(quotas) <= 1
    assert quotas == sorted(quotas, reverse=True)


def test_unknown_strategy_names_the_nearest():
    with pytest.raises(T3DError, match="did you mean 'low_confidence_static'"):
        DecodingConfig(strategy="low_confidence_statik")


@pytest.mark.parametrize(
    "settings",
    [
        {"block_size": 0},
        {"steps": 0},
        {"threshold": 1.5},
        {"floor": "two"},
        {"confidence": "hot"},
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"max_tokens": 0},
        {"n": 0},
        {"stop": ("",)},
        {"risk": -0.1},
    ],
)
def test_bad_settings_are_refused_by_name(settings):
    with pytest.raises(T3DError, match=next(iter(settings))):
        DecodingConfig(**settings)
