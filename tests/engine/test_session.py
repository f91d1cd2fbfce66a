"""A session that lives on: requests come and go between steps, and one that fails takes nobody with it."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from t3d.decoding import DecodingConfig
from t3d.engine import BlockEvent, Engine, FailedEvent, FinishedEvent, StepEvent
from t3d.engine.intake import make_requests
from t3d.errors import T3DError
from tests.conftest import make_model

PROMPTS = [[7 + i % 9, 8, 9 + i % 5][: 1 + i % 3] * (1 + i % 4) for i in range(12)]
CONFIG = DecodingConfig(max_tokens=21, temperature=0.7, steps=3, n=2, ignore_eos=True, seed=5)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def expected(model):
    found = Engine(model).generate(PROMPTS, CONFIG)
    return {(i // 2, i % 2): (t.response_ids, t.step_map, t.length) for i, t in enumerate(found)}


def drain(session, isolate=False):
    events = []
    while not session.done:
        events += session.step(isolate)
    return events


@settings(max_examples=12, deadline=None)
@given(
    batch=st.integers(1, 8), budget=st.sampled_from([48, 96, 1000]), page=st.sampled_from([4, 16]), seed=st.integers(0)
)
def test_whoever_is_cancelled_the_others_do_not_notice(model, expected, batch, budget, page, seed):
    """Random cancels of running, waiting and preempted requests; additions in between; a cache that is often full."""
    rng = random.Random(seed)
    engine = Engine(model, max_batch_size=batch, kv_cache_tokens=budget, page_size=page)
    requests = make_requests(PROMPTS, CONFIG, None, None, model, None)
    session = engine.open(requests)
    waiting, cancelled, finished = list(requests), set(), {}
    while waiting or not session.done:
        for _ in range(rng.randrange(7)):
            if waiting:
                session.add(waiting.pop(0))
        if rng.random() < 0.25:
            index = rng.randrange(len(PROMPTS))
            waiting = [r for r in waiting if r.index != index]
            session.cancel(index)
            cancelled.add(index)
            every = [*session.scheduler.running, *session.scheduler.waiting]
            assert all(s.request.index != index for s in every)
            assert session.cache.used_pages == sum(len(s.pages) for s in every)  # freed at once
        if not session.done:
            for event in session.step():
                if isinstance(event, FinishedEvent):
                    t = event.trajectory
                    finished[event.index, event.sample] = (t.response_ids, t.step_map, t.length)
    assert session.cache.used_pages == 0
    assert session.stats.kv_tokens == 0
    assert all(finished[key] == expected[key] for key in finished)
    assert {key[0] for key in expected} - {key[0] for key in finished} <= cancelled
    assert session.stats.finished == len(finished)


def test_cancelling_what_is_not_there_is_nothing(model):
    session = Engine(model).open()
    session.cancel(3)
    assert session.done
    assert session.stats.cancelled == 0


def test_a_session_for_whatever_may_come(model):
    """Sized by the context and the batch, within the budget; what can never fit is refused with its numbers."""
    engine = Engine(model, max_batch_size=3)
    assert engine.cache_size(None) == (3, 512)
    pages, size = Engine(model, max_batch_size=3, kv_cache_tokens=700).cache_size(None)
    assert 512 <= pages * size <= 700
    session = Engine(model, kv_cache_tokens=40).open()
    long, short = make_requests(
        [[7] * 24, [8]], DecodingConfig(max_tokens=20, ignore_eos=True), None, None, model, None
    )
    with pytest.raises(T3DError, match="can come to 44 positions, but the cache holds 40"):
        session.add(long)
    session.add(short)
    assert any(isinstance(e, FinishedEvent) for e in drain(session))


def test_a_watched_request_tells_of_every_step(model):
    prompts = [[7, 8, 9], [10, 11]]
    requests = make_requests(prompts, DecodingConfig(max_tokens=17, steps=3, ignore_eos=True), None, None, model, None)
    session = Engine(model).open(requests)
    session.add(requests[0], watch=True)
    session.add(requests[1])
    events = drain(session)
    (trajectory,) = [e.trajectory for e in events if isinstance(e, FinishedEvent) and e.index == 0]
    steps = [e for e in events if isinstance(e, StepEvent)]
    assert {e.index for e in steps} == {0}
    assert len(steps) == trajectory.nfe.denoise
    told = {}
    for event in steps:
        assert event.places
        for place, token, confidence in zip(event.places, event.token_ids, event.confidence, strict=True):
            assert place not in told
            told[place] = (token, event.step, confidence)
    assert [told[i] for i in range(len(told))] == list(
        zip(trajectory.response_ids, trajectory.step_map, trajectory.confidence, strict=True)
    )
    blocks = [e for e in events if isinstance(e, BlockEvent) and e.index == 0]
    assert [token for e in blocks for token in e.token_ids] == trajectory.response_ids


@pytest.mark.parametrize("page_size", [4, None])
@pytest.mark.parametrize("strategy", ["low_confidence_static", "entropy_bounded_eb", "adaptive", "factor", "random"])
def test_a_request_that_fails_takes_nobody_with_it(strategy, page_size):
    """NaN stays with the request that has it, and does not come back from the pages that it leaves."""
    model = make_model(seed=5)
    with torch.no_grad():
        model.model.embed_tokens.weight[11] = torch.nan
    config = DecodingConfig(max_tokens=24, strategy=strategy, temperature=0.5, top_k=20, ignore_eos=True)
    good = [[7, 8], [12] * 9, [9, 10, 13], [5]]
    prompts = [good[0], [9, 11, 10] * 7, good[1], [11], good[2], [4] * 30 + [11], good[3]]
    engine = Engine(model, max_batch_size=3, page_size=page_size, prefill_tokens=8)
    requests = make_requests(prompts, config, None, None, model, None)
    session = engine.open(requests)
    for request in requests:
        session.add(request, watch=True)
    events = drain(session, isolate=True)
    assert all(np.isfinite(e.confidence).all() for e in events if isinstance(e, StepEvent))
    failed = [e for e in events if isinstance(e, FailedEvent)]
    assert [e.index for e in sorted(failed, key=lambda e: e.index)] == [1, 3, 5]
    assert all(str(e.error).startswith(f"prompt {e.index}: the model's logits are not numbers") for e in failed)
    assert session.stats.failed == 3
    got = {e.index: e.trajectory.response_ids for e in events if isinstance(e, FinishedEvent)}
    seeds = {r.index: r.seed for r in requests}
    for index in (0, 2, 4, 6):
        (alone,) = Engine(model).generate([prompts[index]], config, seeds=[seeds[index]])
        assert got[index] == alone.response_ids
    assert not session.cache.data.isnan().any()
    assert session.cache.used_pages == 0


def test_nan_does_not_stay_where_a_page_was_moved_from():
    """A failing request's page is moved while its prompt is read; the next request gets the place it has left."""
    model = make_model(seed=5)
    with torch.no_grad():
        model.model.embed_tokens.weight[11] = torch.nan
    prompts, lengths = [[7, 8], [11] + [9] * 200, [5, 6, 7]], [4, 4, 40]
    configs = [DecodingConfig(max_tokens=n, ignore_eos=True) for n in lengths]
    requests = make_requests(prompts, configs, None, None, model, None)
    session = Engine(model, prefill_tokens=1).open(requests)
    session.add(requests[0])
    session.add(requests[1])
    while len(session.scheduler.running) != 1:
        session.step()
    session.step()
    assert session.scheduler.running[0].pages == [0]  # moved from the second page
    session.add(requests[2])
    events = drain(session, isolate=True)
    assert [e.index for e in events if isinstance(e, FailedEvent)] == [1]
    (got,) = [e.trajectory.response_ids for e in events if isinstance(e, FinishedEvent)]
    assert got == Engine(model).generate([prompts[2]], configs[2])[0].response_ids
