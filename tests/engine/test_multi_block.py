"""Several blocks in flight give what a plain sampler gives that recomputes everything at every forward."""

import random
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from t3d.decoding import DecodingConfig
from t3d.engine import BlockEvent, Engine, FinishedEvent, StepEvent
from t3d.engine.intake import make_requests
from t3d.errors import T3DError
from tests.conftest import make_model
from tests.engine.reference import reference_draw, reference_logits, reference_multi_block

STOPS = (1, 5)


@pytest.fixture(scope="module")
def model():
    return make_model()


@st.composite
def configs(draw):
    size = draw(st.sampled_from([1, 2, 3, 4, 8, 16]))
    dynamic = draw(st.booleans())  # the only one here that `force` matters to
    others = ["low_confidence_static", "sequential", "random", "factor"]
    return DecodingConfig(
        block_size=size,
        steps=draw(st.integers(1, size)),
        window=draw(st.sampled_from([None, 1, 2, 5])),
        strategy="low_confidence_dynamic" if dynamic else draw(st.sampled_from(others)),
        floor="one",
        threshold=draw(st.sampled_from([0.05, 0.2, 0.9])),
        factor=draw(st.sampled_from([0.5, 3.0])),
        blocks_in_flight=draw(st.sampled_from([4, 3, 2, 1])),
        enter=draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
        force=draw(st.sampled_from([0.0, 0.25, 1.0, 2.0])) if dynamic else 0.0,
        recheck=draw(st.sampled_from([0.0, 0.05, 0.5, 1.0])),
        temperature=draw(st.sampled_from([0.0, 1.0])),
        max_tokens=draw(st.integers(1, 24)),
        stop_ids=draw(st.sampled_from([(), STOPS])),
        seed=draw(st.integers(0, 1000)),
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mixed=st.lists(configs(), min_size=3, max_size=3), data=st.data())
def test_equals_plain_sampler(model, mixed, data):
    draw = data.draw
    rng = random.Random(draw(st.integers(0, 1000)))
    prompts = [[rng.randrange(6, 60) for _ in range(rng.randint(1, 13))] for _ in mixed]
    engine = Engine(
        model,
        max_batch_size=draw(st.integers(1, 3)),
        page_size=16,
        prefill_tokens=draw(st.sampled_from([1, 8, 1024])),
        fused=draw(st.booleans()),
    )
    for prompt, config, t in zip(prompts, mixed, engine.generate(prompts, mixed), strict=True):
        ids, steps, confidence, length, reason, forwards, revisions = reference_multi_block(
            model, prompt, config, t.seed, config.stop_ids
        )
        assert (t.response_ids, t.step_map, t.revisions or [0] * len(ids)) == (ids, steps, revisions)
        assert t.confidence == pytest.approx(confidence, abs=1e-4)
        assert (t.length, t.finish_reason, t.nfe.denoise) == (length, reason, forwards)


@torch.no_grad()
def d3llm(model, prompt, config, decoded):
    """(response_ids, forwards) by d3LLM's rule as published, any number of blocks in flight. `decoded` is its
    decoded_token_threshold: the progress at which the next block is fully activated."""
    size, mask = config.block_size, model.config.mask_token_id
    first = len(prompt) // size * size
    end = -(-(len(prompt) + config.max_tokens) // size) * size
    ids, starts, activated, forwards = list(prompt) + [mask] * (first + size - len(prompt)), [first], {first}, 0

    def masks(start):
        return [p for p in range(start, start + size) if ids[p] == mask]

    while True:
        for before, start in pairwise(starts):
            if 1 - len(masks(before)) / size >= decoded:
                activated.add(start)
        logits = reference_logits(model, ids, size)
        forwards += 1
        drawn = {p: reference_draw(logits[p], config, 0.0) for p in range(first, len(ids)) if ids[p] == mask}
        chosen = {p for p in drawn if drawn[p][2] < config.entropy_threshold}
        must = next(start for start in starts if start in activated and masks(start))
        if not chosen & set(masks(must)):
            chosen.add(min(masks(must), key=lambda p: drawn[p][2]))
        for p in chosen:
            ids[p] = drawn[p][0]
        whole = next((start for start in starts if masks(start)), len(ids))
        final = ids[len(prompt) : whole]
        stops = [n for n, token in enumerate(final[: config.max_tokens]) if token in config.stop_ids]
        last = -(-(len(prompt) + stops[0] + 1) // size) * size if stops else end
        if whole >= last:
            return ids[len(prompt) : last], forwards
        if 1 - len(masks(starts[-1])) / size >= config.enter and len(ids) < end:
            starts.append(len(ids))
            ids += [mask] * size


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_d3llm_is_a_setting(model, data):
    """Whatever its decoded_token_threshold: the first fully activated block with masks is the first one with masks."""
    draw = data.draw
    config = DecodingConfig(
        strategy="entropy_threshold",
        entropy_threshold=draw(st.sampled_from([0.05, 0.4, 1.5, 3.0])),
        block_size=draw(st.sampled_from([1, 2, 4, 8])),
        blocks_in_flight=64,
        enter=draw(st.sampled_from([0.1, 0.5])),
        force=2.0,
        max_tokens=draw(st.integers(1, 24)),
        stop_ids=draw(st.sampled_from([(), STOPS, tuple(range(30, 50))])),
    )
    rng = random.Random(draw(st.integers(0, 1000)))
    prompt = [rng.randrange(6, 60) for _ in range(rng.randint(1, 13))]
    [t] = Engine(model).generate([prompt], config)
    assert (t.response_ids, t.nfe.denoise) == d3llm(model, prompt, config, draw(st.sampled_from([0.1, 0.6, 0.95, 1.0])))


def test_who_watches_sees_what_was_provisional_go(model):
    """Told steps, replayed, give the answer; what was masked again is told too."""
    config = DecodingConfig(blocks_in_flight=3, enter=0.0, force=0.0, recheck=0.9, steps=2, max_tokens=40)
    requests = make_requests([[7, 8, 9], [10, 11]], config, None, None, model, None)
    session = Engine(model).open(requests)
    for request in requests:
        session.add(request, watch=True)
    shown, taken_back = [{}, {}], [0, 0]
    while not session.done:
        for event in session.step():
            if isinstance(event, StepEvent):
                shown[event.index] |= dict(zip(event.places, event.token_ids, strict=True))
                taken_back[event.index] += event.token_ids.count(session.mask_id)
            elif isinstance(event, FinishedEvent):
                t = event.trajectory
                assert [shown[event.index][n] for n in range(len(t.response_ids))] == t.response_ids
                assert taken_back[event.index] == sum(t.revisions) > 0


def test_recheck_needs_a_policy_that_keeps_what_it_commits():
    with pytest.raises(T3DError, match="recheck masks tokens again, and so does strategy 'wino'"):
        DecodingConfig(strategy="wino", blocks_in_flight=2, recheck=0.5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("options", [{"kv_cache_tokens": 64, "page_size": 8}, {"attention": "flex"}, {"fused": False}])
@pytest.mark.parametrize("flight", ["multi_block", "recheck", "look_ahead"])
def test_budget_attention_and_stores_change_nothing(model, options, flight):
    """Several samples per prompt, with stops, through a cache that makes the youngest yield."""
    rng = random.Random(4)
    prompts = [[rng.randrange(6, 60) for _ in range(rng.randint(1, 20))] for _ in range(6)]
    more = {
        "multi_block": {"blocks_in_flight": 3},
        "recheck": {"blocks_in_flight": 3, "recheck": 0.5},
        "look_ahead": {"flight": "look_ahead", "depth": 1},
    }[flight]
    config = DecodingConfig(steps=2, max_tokens=16, temperature=1.0, n=2, stop_ids=(1, 5), **more)
    want = Engine(model).generate(prompts, config)
    engine = Engine(model, **options)
    got = engine.generate(prompts, config)
    assert [(t.response_ids, t.step_map, t.length) for t in got] == [
        (t.response_ids, t.step_map, t.length) for t in want
    ]
    assert engine.stats.preemptions > 0 or "kv_cache_tokens" not in options


def test_blocks_are_told_in_order_and_none_behind_a_final_stop(model):
    """What is in flight behind the end is dropped: the trajectory ends with the block that holds the stop."""
    prompts = [[7, 8, 9], [10, 11], [12]]
    config = DecodingConfig(blocks_in_flight=4, enter=0.0, steps=4, max_tokens=40, stop_ids=tuple(range(30, 62)))
    blocks: dict[int, list[int]] = {}
    for event in Engine(model).stream(prompts, config):
        if isinstance(event, BlockEvent):
            blocks.setdefault(event.index, []).extend(event.token_ids)
        elif isinstance(event, FinishedEvent):
            t = event.trajectory
            assert blocks[event.index] == t.response_ids
            assert t.finish_reason == "stop"
            assert len(t.prompt_ids) + t.length > len(t.prompt_ids) + len(t.response_ids) - t.block_size
