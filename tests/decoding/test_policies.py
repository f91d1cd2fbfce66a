"""Each strategy by its definition, on numbers small enough to check by eye, and the rules that hold for all."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from t3d.decoding import DecodingConfig
from t3d.decoding.laws import lawful
from t3d.decoding.policy import POLICIES, SCHEDULES, Knobs, View, step_quotas
from t3d.errors import T3DError

MASK = 99


def view(confidence, entropy=None, masked=None, quota=1, uniform=None, must=True):
    """One row. Places that are not masked get what the engine puts there."""
    n = len(confidence)
    masked = torch.tensor([masked or [True] * n])
    tokens = torch.arange(n)[None]
    return View(
        tokens=tokens.masked_fill(masked, MASK),
        fixed=torch.zeros(1, n, dtype=torch.bool),
        masked=masked,
        proposal=tokens + 50,
        confidence=torch.tensor([confidence]).masked_fill(~masked, -torch.inf),
        quota=torch.tensor([quota]),
        step=torch.tensor([0]),
        steps=torch.tensor([n]),
        depth=torch.tensor([0]),
        progress=torch.tensor([1.0]),
        must=torch.tensor([must]),
        entropy=torch.tensor([entropy or [0.0] * n]).masked_fill(~masked, torch.inf),
        margin=torch.tensor([confidence]).masked_fill(~masked, -torch.inf),
        uniform=torch.tensor([uniform or [0.0] * n]),
        expected=tokens + 50,
        certainty=torch.full((1, n), 0.5).masked_fill(masked, -torch.inf),
        shadow=torch.full((1, n), 0.5).masked_fill(masked, torch.inf),
        stop=torch.zeros(1, n, dtype=torch.bool),
    )


def chosen(name, v, **settings):
    """Places committed by a block's first step."""
    policy = POLICIES[name](**settings)
    memory = {key: m.new(v.masked.shape[1], 3)[None] for key, m in policy.memory.items()}
    decision = policy.decide(v, Knobs([policy]), memory)
    return lawful(decision, v, MASK, lambda: torch.zeros_like(v.tokens), 8).commit[0].nonzero()[:, 0].tolist()


def test_static_takes_the_most_confident_and_the_leftmost_of_equals():
    assert chosen("low_confidence_static", view([0.1, 0.9, 0.5, 0.9], quota=1)) == [1]
    assert chosen("low_confidence_static", view([0.1, 0.9, 0.5, 0.9], quota=3)) == [1, 2, 3]


def test_static_never_touches_what_is_not_masked():
    c = view([0.9, 0.9, 0.1, 0.2], masked=[False, False, True, True], quota=4)
    assert chosen("low_confidence_static", c) == [2, 3]


@pytest.mark.parametrize(("floor", "want"), [("one", [1]), ("schedule", [0, 1, 2])])
def test_dynamic_commits_all_above_and_at_least_the_floor(floor, want):
    assert chosen("low_confidence_dynamic", view([0.95, 0.99, 0.2, 0.91])) == [0, 1, 3]
    assert chosen("low_confidence_dynamic", view([0.5, 0.7, 0.4, 0.3], quota=3), floor=floor) == want


def test_dynamic_threshold_is_exclusive():
    assert chosen("low_confidence_dynamic", view([1.0, 0.5, 1.0]), threshold=1.0) == [0]


def test_sequential_goes_left_to_right_over_what_is_masked():
    assert chosen("sequential", view([0.1] * 5, masked=[False, True, False, True, True], quota=2)) == [1, 3]


def test_random_takes_the_largest_numbers_of_masked_places():
    c = view([0.1] * 4, masked=[False, True, True, True], uniform=[0.99, 0.1, 0.8, 0.5], quota=2)
    assert chosen("random", c) == [2, 3]


def test_entropy_bounds_differ_by_the_last_token():
    entropy = [0.3, 0.1, 5.0, 0.2]  # sorted: .1 .2 .3 5; sums .1 .3 .6 5.6; without the last 0 .1 .3 .6
    for bound, sdar, eb in ((0.25, [1], [1, 3]), (0.4, [1, 3], [0, 1, 3]), (1.0, [0, 1, 3], [0, 1, 2, 3])):
        v = view([0.5] * 4, entropy=entropy)
        assert chosen("entropy_bounded_sdar", v, entropy_bound=bound) == sdar
        assert chosen("entropy_bounded_eb", v, entropy_bound=bound) == eb


def test_nothing_below_the_bound_commits_the_most_confident():
    v = view([0.2, 0.6, 0.4], entropy=[3.0, 3.0, 2.0])
    assert chosen("entropy_bounded_sdar", v, entropy_bound=0.0) == [1]
    assert chosen("entropy_bounded_eb", v, entropy_bound=0.0) == [
        2
    ]  # the paper's rule always commits the lowest entropy


def test_factor_is_the_largest_prefix():
    # n = 1: 2 * .1 < 1; n = 2: 3 * .3 = .9 < 1; n = 3: 4 * .3 = 1.2
    assert chosen("factor", view([0.7, 0.9, 0.69999, 0.2])) == [0, 1]
    assert chosen("factor", view([0.2, 0.1, 0.15])) == [0]


def test_adaptive_spreads_the_doubt_over_steps():
    c = [0.9, 0.9, 0.8, 0.4]  # one wrong token expected
    assert chosen("adaptive", view(c), risk=1.1) == [0, 1, 2, 3]
    assert chosen("adaptive", view(c), risk=0.6) == [0, 1]
    assert chosen("adaptive", view(c), risk=0.1) == [0]
    assert chosen("adaptive", view(c), risk=0.0) == [0]
    assert chosen("adaptive", view([1.0, 1.0]), risk=0.0) == [0, 1]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_all_strategies_commit_some_of_the_masked(data):
    n = data.draw(st.integers(1, 9))
    numbers = st.lists(st.floats(0, 1, width=32), min_size=n, max_size=n)
    masked = data.draw(st.lists(st.booleans(), min_size=n, max_size=n).filter(any))
    v = view(
        data.draw(numbers),
        entropy=[8 * x for x in data.draw(numbers)],
        masked=masked,
        quota=data.draw(st.integers(1, sum(masked))),
        uniform=data.draw(numbers),
    )
    for name, policy in POLICIES.items():
        speed = policy.speed()
        bounds = speed and (speed.metadata["low"], min(speed.metadata["high"], 9))
        picked = chosen(name, v, **{speed.name: data.draw(st.floats(*bounds))} if speed else {})
        assert picked
        assert all(masked[i] for i in picked)


@pytest.mark.parametrize("name", [n for n, p in POLICIES.items() if p.speed()])
def test_speed_runs_from_one_token_to_all(name):
    speed = POLICIES[name].speed()
    v = view([0.6, 0.5, 0.4, 0.3], [1.0, 1.1, 1.2, 1.3])
    assert len(chosen(name, v, **{speed.name: speed.metadata["slow"]})) == 1
    assert len(chosen(name, v, **{speed.name: speed.metadata["fast"]})) == 4


def test_rows_that_need_not_advance_are_not_forced():
    v = view([0.01, 0.02, 0.03], [3.0, 3.0, 3.0], must=False)
    idle = {n for n in POLICIES if not chosen(n, v)}
    assert idle == {n for n, p in POLICIES.items() if not p.scheduled} - {"ascending", "adaptive", "entropy_bounded_eb"}


@given(block=st.integers(1, 40), data=st.data())
def test_the_even_schedule_is_even(block, data):
    steps = data.draw(st.integers(1, block))
    quotas = step_quotas("even", block, data.draw(st.integers(1, block)), steps)
    assert sum(quotas) == block
    assert len(quotas) == steps
    assert max(quotas) - min(quotas) <= 1
    assert list(quotas) == sorted(quotas, reverse=True)


@pytest.mark.parametrize("schedule", sorted(set(SCHEDULES) - {"even"}))
@given(masks=st.integers(1, 600), steps=st.integers(1, 600))
def test_other_schedules_commit_every_mask_in_no_more_steps(schedule, masks, steps):
    quotas = step_quotas(schedule, 1024, masks, steps)
    assert sum(quotas) == masks
    assert len(quotas) <= steps
    assert min(quotas) > 0 or schedule == "truncated"


def test_schedules_are_the_published_ones():
    assert step_quotas("rounded", 32, 32, 12) == (3, 3, 3, 3, 3, 2, 3, 2, 3, 2, 3, 2)
    masks, expected, t = 37, [], torch.linspace(1, 1e-3, 12)  # Dream's loop
    for i in range(11):
        expected.append(int(masks * (1 - t[i + 1] / t[i])) if i < 10 else masks)
        masks -= expected[-1]
    assert step_quotas("truncated", 37, 37, 11) == tuple(expected)


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
