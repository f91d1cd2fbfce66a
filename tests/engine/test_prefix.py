"""The prefix cache changes no token, saves work, and holds nothing but final tokens of sequences that are sound."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from t3d.blocks import block_causal_mask
from t3d.decoding import DecodingConfig
from t3d.engine import Engine, FailedEvent, FinishedEvent
from t3d.engine.flex import in_order, page_plan
from t3d.engine.intake import make_requests
from t3d.engine.packing import Packing
from tests.conftest import make_model

STOPS = (1, 5)


@pytest.fixture(scope="module")
def model():
    return make_model()


def sides(session):
    return [x for s in [*session.scheduler.running, *session.scheduler.waiting] for x in s.sides]


def check(session):
    """The books of the cache against what the sequences say."""
    cache, size = session.cache, session.cache.page_size
    held = {}
    for side in sides(session):
        for index, number in enumerate(side.pages):
            held.setdefault(number, []).append((side, index))
    free, kept = set(cache._free), {page.number for page in cache._kept}
    assert len(cache._free) + len(cache._kept) + len(held) == cache.num_pages
    assert free | kept | set(held) == set(range(cache.num_pages))  # with the counts: nothing is two of these
    assert (cache.used_pages, cache.free_pages) == (len(held), len(free) + len(kept))
    assert set(cache._pages) == kept | set(held)
    for number, page in cache._pages.items():
        assert page.number == number
        assert sorted(map(id, page.holders)) == sorted(id(side) for side, _ in held.get(number, ()))
    for holders in held.values():  # who holds a page holds all before it
        assert len({tuple(side.pages[: index + 1]) for side, index in holders}) == 1
    assert all(side.cached <= side.base for side in sides(session))
    assert all(not s.pages and not s.cached for w in session.scheduler.waiting for s in w.sides)
    for key, page in cache._known.items():
        assert page.key == key
        assert cache._pages[page.number] is page
        assert not page.spoiled
    assert all(page.key is not None and page.filled == size for page in cache._kept)
    for number, holders in held.items():
        for side, index in holders:
            if cache._pages[number].key is not None:
                assert (index + 1) * size <= side.base  # nothing in flight is written there
                assert cache._known[chain(side, index, cache)] is cache._pages[number]


def chain(side, index, cache):
    """The key of a side's page, from its tokens."""
    page, before = None, side.root
    for i in range(index + 1):
        end = (i + 1) * cache.page_size
        while (end + side.origin) % side.request.final_block:
            end += 1
        key = (before, side.read(i * cache.page_size, end).tobytes())
        page = cache._known[key]
        before = page
    return key


def watch(session):
    """Checks around every forward: pages in use are dense, and nothing is written to a filled place of a known page."""
    forward = session.runner.forward

    def spy(cache, queries):
        check(session)
        assert {n for n, page in cache._pages.items() if page.holders} == set(range(cache.used_pages))
        written = []
        for query in queries:
            pages, places = np.array(query.sequence.pages), np.arange(query.start, query.end)
            for slot in cache.slots(pages, places).tolist():
                page = cache._pages[slot // cache.page_size]
                assert page.key is None or slot % cache.page_size >= page.filled
                written.append(slot)
        assert len(set(written)) == len(written)
        return forward(cache, queries)

    session.runner.forward = spy


def keys_of(model, ids, block_size):
    """(layers, length, 2, kv_heads, head_dim) of a text of final tokens, by the model's own forward."""
    mask = block_causal_mask(len(ids), block_size)[None, None]
    positions = torch.arange(len(ids))[None]
    with torch.no_grad():
        out = model(torch.tensor([ids]), attention_mask=mask, position_ids=positions, use_cache=True).past_key_values
    return torch.stack([torch.stack([layer.keys[0], layer.values[0]]).permute(2, 0, 1, 3) for layer in out.layers])


def check_contents(session, model):
    """Every filled place of a known page holds the keys and values that its text has. Returns how many pages."""
    cache, size = session.cache, session.cache.page_size
    for page in cache._known.values():
        parts, one = [], page
        while not isinstance(one, tuple):
            before, tokens = one.key
            tokens = torch.frombuffer(bytearray(tokens), dtype=torch.int64).tolist()
            parts.insert(0, tokens[:size] if parts else tokens)
            one = before
        ids = [token for part in parts for token in part]
        assert model.config.mask_token_id not in ids
        first = (len(parts) - 1) * size
        want = keys_of(model, ids, one[1])[:, first : first + page.filled]
        got = cache.data[:, page.number * size : page.number * size + page.filled]
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    return len(cache._known)


def talk(engine, requests, rng, follow=True, every_step=check, cancels=0.0):
    """Decode requests that come at any time, and a second turn after each answer. {(index, sample): what came out}"""
    session, waiting, found = engine.open(), list(requests), {}
    if engine.prefix_cache:
        watch(session)
    while waiting or not session.done:
        for _ in range(rng.randrange(4)):
            if waiting:
                session.add(waiting.pop(0))
        if rng.random() < cancels and session.scheduler.running:
            session.cancel(rng.choice(session.scheduler.running).request.index)
        if session.done:
            continue
        for event in session.step():
            if isinstance(event, FinishedEvent):
                t, key = event.trajectory, (event.index, event.sample)
                found[key] = (t.response_ids, t.step_map, t.length, t.finish_reason)
                (request,) = [r for r in requests if (r.index, r.sample) == key] if event.index < 1000 else [None]
                assert 0 <= event.cached <= len(t.prompt_ids)
                if follow and request is not None:
                    prompt = (*t.prompt_ids, *t.response_ids[: t.length], 7 + event.sample, 8, 9)
                    waiting.append(replace(request, index=1000 + event.index, prompt_ids=prompt))
        if engine.prefix_cache:
            every_step(session)
    if engine.prefix_cache:
        del session.runner.forward
        assert session.cache.used_pages == 0
    return found, session


@st.composite
def configs(draw):
    block = draw(st.sampled_from([1, 2, 3, 4, 8]))
    flight = draw(st.sampled_from(["multi_block", "multi_block", "look_ahead", "linear_spec", "s2d2"]))
    return DecodingConfig(
        block_size=block,
        steps=draw(st.integers(1, block)),
        flight=flight,
        blocks_in_flight=draw(st.integers(1, 3)) if flight == "multi_block" else 1,
        guidance_scale=draw(st.sampled_from([0.0, 0.0, 1.5])),
        temperature=draw(st.sampled_from([0.0, 0.7])),
        max_tokens=draw(st.integers(1, 24)),
        n=draw(st.integers(1, 3)),
        stop_ids=STOPS,
    )


def prompts_that_share(rng, count, longest=40):
    """They begin with parts of one text."""
    text = [rng.randrange(6, 60) for _ in range(longest)]
    return [text[: rng.randint(0, longest)] + [rng.randrange(6, 60)] * rng.randint(1, 9) for _ in range(count)]


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_hit_changes_no_token(model, data):
    """Prompts that begin alike, samples, second turns, mixed settings; budgets that make sequences yield."""
    rng = random.Random(data.draw(st.integers(0, 10**6)))
    some = [data.draw(configs()) for _ in range(data.draw(st.integers(1, 2)))]
    prompts = prompts_that_share(rng, data.draw(st.integers(1, 4)))
    requests = make_requests(prompts, [rng.choice(some) for _ in prompts], None, None, model, None)
    negatives = [rng.choice([None, p[: rng.randint(1, len(p))], p]) for p in prompts]
    requests = [
        replace(r, negative_ids=tuple(negatives[r.index])) if r.guided and negatives[r.index] else r for r in requests
    ]
    longest = 2 * (50 + 60 + 24 + 40)  # of a second turn, with its companion
    options = {
        "max_batch_size": data.draw(st.integers(1, 5)),
        "kv_cache_tokens": data.draw(st.sampled_from([longest, longest + 96, 4096])),
        "page_size": data.draw(st.sampled_from([1, 2, 5, 8, 16, None])),
        "prefill_tokens": data.draw(st.sampled_from([1, 8, 1024])),
        "fused": data.draw(st.booleans()),
    }
    seed = data.draw(st.integers(0, 1000))
    want, _ = talk(Engine(model), requests, random.Random(seed))
    got, _ = talk(Engine(model, prefix_cache=True, **options), requests, random.Random(seed))
    assert got == want


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("graphs", [False, True])
def test_a_hit_changes_no_token_with_flex_attention(model, graphs):
    rng = random.Random(4)
    config = DecodingConfig(steps=2, max_tokens=12, n=2, temperature=0.7, stop_ids=STOPS, blocks_in_flight=2)
    requests = make_requests(prompts_that_share(rng, 4), config, None, None, model, None)
    want, _ = talk(Engine(model), requests, random.Random(1))
    options = {"attention": "flex", "page_size": 8, "kv_cache_tokens": 128, "cuda_graphs": graphs}
    got, session = talk(Engine(model, prefix_cache=True, **options), requests, random.Random(1))
    assert got == want
    assert session.stats.cached_tokens > 0


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
@example(seed=0)
def test_each_query_sees_the_pages_that_it_holds(model, seed):
    """The plan for FlexAttention names holders by the first and the last of them; membership by loops agrees."""
    rng = random.Random(seed)
    config = DecodingConfig(steps=2, max_tokens=8, n=3, temperature=0.7, stop_ids=())
    requests = make_requests(prompts_that_share(rng, 5), config, None, None, model, None)
    shared = 0

    def every_step(session):
        nonlocal shared
        cache = session.cache
        queries = in_order(session.scheduler.plan()[0])
        if not queries:
            return
        packing = Packing(cache, queries)
        plan = page_plan(packing, packing.tokens + 3, cache.num_pages)
        one, last = plan["holders"]
        for page in range(cache.num_pages):
            holders = {n for n, q in enumerate(queries) if page in q.sequence.pages[: -(-q.end // cache.page_size)]}
            shared += len(holders) > 1
            assert {n for n in range(-2, len(queries)) if one[page] <= n <= last[page]} == holders
            for n in holders:
                assert plan["first"][page] == queries[n].sequence.pages.index(page) * cache.page_size

    talk(Engine(model, prefix_cache=True, page_size=4, max_batch_size=8), requests, rng, every_step=every_step)
    assert shared


@pytest.mark.parametrize("blocks_in_flight", [1, 3])
@pytest.mark.parametrize("page_size", [3, 8])
def test_what_is_known_is_final_and_right(model, page_size, blocks_in_flight):
    """After every step; a block in flight, whose tokens are masks or may still change, is never there."""
    rng = random.Random(3)
    config = DecodingConfig(
        steps=3, max_tokens=20, n=2, temperature=0.7, stop_ids=(), blocks_in_flight=blocks_in_flight
    )
    requests = make_requests(prompts_that_share(rng, 3), config, None, None, model, None)
    engine = Engine(model, prefix_cache=True, page_size=page_size, kv_cache_tokens=192, prefill_tokens=8)
    seen = []

    def every_step(session):
        seen.append(check_contents(session, model))

    _, session = talk(engine, requests, rng, every_step=every_step)
    assert session.stats.preemptions > 0
    assert max(seen) > 10


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), budget=st.sampled_from([160, 320]))
def test_who_is_cancelled_leaves_the_books_in_order(model, seed, budget):
    rng = random.Random(seed)
    config = DecodingConfig(steps=2, max_tokens=16, n=2, temperature=0.7, stop_ids=STOPS, blocks_in_flight=2)
    requests = make_requests(prompts_that_share(rng, 6), config, None, None, model, None)
    want, _ = talk(Engine(model), requests, random.Random(seed))
    engine = Engine(model, prefix_cache=True, page_size=8, kv_cache_tokens=budget, prefill_tokens=8)
    got, _ = talk(engine, requests, random.Random(seed), cancels=0.1)
    assert all(got[key] == want[key] for key in got)


def decode(engine, prompts, config):
    found = engine.generate(prompts, config)
    return [(t.response_ids, t.step_map) for t in found], engine.stats


def test_samples_read_their_prompt_once(model):
    """In the same forward already; what is not a whole page is read by each."""
    prompt = [7 + i % 50 for i in range(67)]
    config = DecodingConfig(max_tokens=8, n=4, temperature=0.7, stop_ids=())
    want, before = decode(Engine(model), [prompt], config)
    got, after = decode(Engine(model, prefix_cache=True, page_size=16), [prompt], config)
    assert got == want
    assert (before.cached_tokens, after.cached_tokens) == (0, 3 * 64)
    assert after.forwards == before.forwards
    assert after.kv_peak_tokens < before.kv_peak_tokens


def test_samples_of_a_long_prompt_wait_for_its_pieces_together(model):
    prompt = [7 + i % 50 for i in range(200)]
    config = DecodingConfig(max_tokens=8, n=4, temperature=0.7, stop_ids=())
    want, before = decode(Engine(model, prefill_tokens=16), [prompt], config)
    got, after = decode(Engine(model, prefill_tokens=16, prefix_cache=True), [prompt], config)
    assert got == want
    assert after.forwards < before.forwards / 2


def one(session, request):
    """What came of a request that is alone in the session."""
    session.add(request)
    while not session.done:
        for event in session.step(isolate=True):
            check(session)
            if isinstance(event, (FinishedEvent, FailedEvent)):
                last = event
    return last


def test_a_second_turn_finds_the_first_answer(model):
    config = DecodingConfig(max_tokens=41, temperature=0.7, ignore_eos=True)
    engine = Engine(model, prefix_cache=True, page_size=8)
    (first,) = make_requests([list(range(7, 40))], config, None, None, model, None)
    session = engine.open()
    answer = one(session, first).trajectory
    prompt = [*first.prompt_ids, *answer.response_ids[: answer.length], 7, 8, 9]
    (second,) = make_requests([prompt], config, None, None, model, None)
    event = one(session, second)
    # 33 + 41 tokens end in the block that begins at 72; its keys were never final, those before are nine pages
    assert event.cached == 72
    assert event.trajectory.response_ids == Engine(model).generate([prompt], config)[0].response_ids


def test_the_least_recently_used_goes_first(model):
    """Within the budget: of three texts that cannot all stay, the one that was asked again does."""
    config = DecodingConfig(max_tokens=4, ignore_eos=True)
    texts = [[10 + n] * 32 for n in range(3)]
    requests = make_requests(texts, config, None, None, model, None)
    session = Engine(model, prefix_cache=True, page_size=8, kv_cache_tokens=96).open()
    hits = [one(session, requests[n]).cached for n in (0, 1, 0, 2, 0, 1)]
    assert hits[2] == hits[4] == 32
    assert hits[0] == hits[1] == hits[3] == 0
    assert hits[5] < 32  # a page that leads to others goes after them
    assert session.stats.kv_peak_tokens <= 96


def test_changed_weights_find_nothing():
    model = make_model(seed=3)
    other = make_model(seed=4)
    config = DecodingConfig(max_tokens=8, ignore_eos=True)
    (request,) = make_requests([list(range(7, 40))], config, None, None, model, None)
    engine = Engine(model, prefix_cache=True, page_size=8)
    session = engine.open()
    assert [one(session, request).cached for _ in range(2)] == [0, 32]
    with torch.no_grad():
        for mine, its in zip(model.parameters(), other.parameters(), strict=True):
            mine.copy_(its)
    engine.runner.refresh()
    event = one(session, request)
    assert event.cached == 0
    assert event.trajectory.response_ids == Engine(other).generate([request.prompt_ids], config)[0].response_ids
    assert one(session, request).cached == 32


def test_other_block_sizes_share_nothing(model):
    """The same tokens have other keys."""
    session = Engine(model, prefix_cache=True, page_size=8).open()
    prompt = list(range(7, 40))
    for block_size, cached in ((4, 0), (8, 0), (4, 32), (8, 32)):
        config = DecodingConfig(block_size=block_size, max_tokens=8, ignore_eos=True)
        (request,) = make_requests([prompt], config, None, None, model, None)
        event = one(session, request)
        assert event.cached == cached
        assert event.trajectory.response_ids == Engine(model).generate([prompt], config)[0].response_ids


def test_pages_of_a_sequence_that_failed_are_not_shared():
    """Its prompt is sound, its answer is not: who holds the prompt's pages goes on, who comes later reads it anew."""
    model = make_model(seed=5)
    with torch.no_grad():
        model.model.embed_tokens.weight[11] = torch.nan
    config = DecodingConfig(max_tokens=8, ignore_eos=True)
    sound = [7 + i % 3 for i in range(32)]
    bad = [*sound, *[11] * 8]
    requests = make_requests([[*sound, 12], bad, [*sound, 13], bad], config, None, None, model, None)
    session = Engine(model, prefix_cache=True, page_size=8).open()
    for request in requests[:2]:
        session.add(request)
    events = []
    while not session.done:
        events += session.step(isolate=True)
        check(session)
    assert [e.index for e in events if isinstance(e, FailedEvent)] == [1]
    assert not session.cache._known  # all that the other holds was held by the one that failed
    assert one(session, requests[2]).cached == 0
    assert isinstance(one(session, requests[3]), FailedEvent)
    (good,) = [e.trajectory for e in events if isinstance(e, FinishedEvent)]
    assert good.response_ids == Engine(model).generate([requests[0].prompt_ids], config)[0].response_ids
    assert not session.cache.data.isnan().any()
    assert one(session, requests[2]).cached == 0  # the last one that failed held them again


def test_a_failed_forward_leaves_nothing_behind(model):
    """Samples share what one of them was about to write; it was not written, so it is written again."""
    config = DecodingConfig(max_tokens=8, n=3, temperature=0.7, ignore_eos=True)
    requests = make_requests([list(range(7, 40))], config, None, None, model, None)
    session = Engine(model, prefix_cache=True, page_size=8).open()
    for request in requests:
        session.add(request)
    forward = session.runner.forward

    def fails(cache, queries):
        raise RuntimeError("out of memory")

    session.runner.forward = fails
    with pytest.raises(RuntimeError):
        session.step()
    session.runner.forward = forward
    session.cancel(requests[0].index)
    for request in requests:
        session.add(request)
    events = []
    while not session.done:
        events += session.step()
        check(session)
    want = [t.response_ids for t in Engine(model).generate([requests[0].prompt_ids], config)]
    assert sorted(e.trajectory.response_ids for e in events if isinstance(e, FinishedEvent)) == sorted(want)


def test_a_companion_that_begins_as_its_sequence_does(model):
    """Both are admitted before either is known: the companion's copy of their beginning leads nobody to its end."""
    text = [7 + i % 40 for i in range(32)]
    config = DecodingConfig(max_tokens=8, n=3, temperature=0.7, guidance_scale=1.5, stop_ids=())
    requests = make_requests([[*text, *[50] * 12]], config, None, None, model, None)
    requests = [replace(r, negative_ids=(*text, *[51] * 12)) for r in requests]
    rng = random.Random(0)
    want, _ = talk(Engine(model), requests, rng, follow=False)
    got, session = talk(Engine(model, prefix_cache=True, page_size=8), requests, rng, follow=False)
    assert got == want
    assert session.stats.cached_tokens > 0


@pytest.mark.parametrize("flight", ["multi_block", "linear_spec"])
def test_a_companion_shares_only_with_those_that_begin_at_its_position(model, flight):
    """Where the prompt is of another length, a negative prompt has other positions, and lies in blocks otherwise."""
    negative = [7 + i % 40 for i in range(34)]
    config = DecodingConfig(max_tokens=12, guidance_scale=1.5, ignore_eos=True, flight=flight)
    session = Engine(model, prefix_cache=True, page_size=8).open()
    for length, shares in ((36, False), (37, False), (40, True)):
        (request,) = make_requests([[length] * length], config, None, None, model, None)
        request = replace(request, negative_ids=tuple(negative))
        session.add(request)
        session.scheduler.plan()
        companion = session.scheduler.running[0].sides[1]
        assert (session.cache.reach(companion, {}) == 32) == shares
        session.cancel(request.index)
        got = one(session, request).trajectory
        assert got.response_ids == one(Engine(model).open(), request).trajectory.response_ids


def test_a_companion_with_the_same_prompt_does_not_write_twice(model):
    """Samples behind the first share pages between themselves and their companions."""
    text = [7 + i % 40 for i in range(44)]
    config = DecodingConfig(max_tokens=8, n=3, temperature=0.7, guidance_scale=1.5, stop_ids=())
    requests = [replace(r, negative_ids=r.prompt_ids) for r in make_requests([text], config, None, None, model, None)]
    want, _ = talk(Engine(model), requests, random.Random(0), follow=False)
    for prefill_tokens in (1, 8, 1024):
        engine = Engine(model, prefix_cache=True, page_size=8, prefill_tokens=prefill_tokens)
        got, _ = talk(engine, requests, random.Random(0), follow=False)
        assert got == want
