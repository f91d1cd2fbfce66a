"""Families whose blocks begin at the response, or whose tokens all see each other, decode as a plain sampler does."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from t3d.decoding import DecodingConfig
from t3d.decoding.policy import SCHEDULES, step_quotas
from t3d.decoding.sampling import uniform
from t3d.engine import Engine
from t3d.errors import T3DError
from t3d.trajectories.record import validate
from tests.conftest import make_model
from tests.engine.reference import reference_choice, reference_draw

STOPS = (1, 5)
SHIFTS = [0, 1]


def family(attention="block", anchor="prompt", shift=0):
    model = make_model(family="block_llama", logits_shift=shift)
    model.config.attention, model.config.anchor = attention, anchor
    return model


@pytest.fixture(scope="module", params=SHIFTS, ids=["own", "next"])
def anchored(request):
    return family(shift=request.param)


@pytest.fixture(scope="module", params=SHIFTS, ids=["own", "next"])
def full(request):
    return family("full", shift=request.param)


@pytest.fixture(scope="module")
def prompts():
    rng = random.Random(4)
    return [[rng.randrange(6, 60) for _ in range(n)] for n in (1, 3, 4, 8, 13, 16)]


@pytest.mark.parametrize("attention", ["block", "full"])
def test_the_whole_context_can_be_used(attention):
    """Where the first token's position is far from 0, too, as with blocks as long as the response."""
    model, long = family(attention), family(attention)
    model.config.max_position_embeddings = 48
    config = DecodingConfig(block_size=40, max_tokens=40, steps=4, ignore_eos=True)
    for guided in (config, replace(config, guidance_scale=0.5)):
        (t,) = Engine(model).generate([[7] * 8], guided)
        assert t.origin == 32
        assert t.response_ids == Engine(long).generate([[7] * 8], guided)[0].response_ids
    with pytest.raises(T3DError, match="max_tokens = 40 49 positions, but the model's context is 48"):
        Engine(model).generate([[7] * 9], config)


@torch.no_grad()
def plain_windows(model, prompt, config, seed, canvas=True):
    """(response, step map) of windows from the prompt's end: on a canvas that all see, or as blocks; nothing cached."""
    mask_id, size, end = model.config.mask_token_id, config.block_size, len(prompt) + config.max_tokens
    origin = -len(prompt) % size
    ids, steps = [*prompt, *[mask_id] * config.max_tokens] if canvas else list(prompt), []
    start = len(prompt)
    while start < end:
        width = min(size, end - start)
        ids += [mask_id] * (start + width - len(ids))
        quotas, committed, step = step_quotas(config.schedule, width, width, config.steps), {}, 0
        while masked := [p for p in range(start, start + width) if ids[p] == mask_id]:
            step += next((n for n, k in enumerate(quotas[step:]) if k), 0)  # nobody looks at steps that commit nothing
            step += next((n for n, k in enumerate(quotas[step:]) if k), 0)  # nobody looks at steps that commit nothing
            place = torch.arange(len(ids)) + origin
            sees = torch.ones(len(ids), len(ids), dtype=torch.bool)
            if not canvas:
                sees = place[:, None] // size >= place // size
            both = torch.tensor([ids, [mask_id] * len(prompt) + ids[len(prompt) :]])
            c, u = model(both, attention_mask=sees[None, None], position_ids=place[None]).logits
            logits = u + (config.guidance_scale + 1) * (c - u) if config.guidance_scale else c
            logits[:, mask_id] = -torch.inf

            def number(p, step=step, stream=0):
                return float(uniform(*(torch.tensor([x]) for x in (seed, p + origin, step)), stream=stream))

            drawn = {p: reference_draw(logits[p].float(), config, number(p)) for p in masked}
            quota = min(quotas[min(step, len(quotas) - 1)], len(masked))
            for p in reference_choice(drawn, config, quota, {p: number(p, stream=1) for p in masked}):
                ids[p], committed[p] = drawn[p][0], step
            step += 1
        steps += [committed[p] for p in range(start, start + width)]
        start += width
        if any(token in STOPS for token in ids[start - width : start]):
            break
    return ids[len(prompt) : start], steps


def settings_of(draw, most=14):
    size = draw(st.integers(1, 9))
    return DecodingConfig(
        block_size=size,
        steps=draw(st.integers(1, size)),
        schedule=draw(st.sampled_from(sorted(SCHEDULES))),
        strategy=draw(st.sampled_from(["low_confidence_static", "low_confidence_dynamic", "sequential", "random"])),
        threshold=0.05,
        max_tokens=draw(st.integers(1, most)),
        temperature=draw(st.sampled_from([0.0, 1.0])),
        stop_ids=STOPS,
    )


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_anchored_blocks_equal_a_plain_sampler(anchored, prompts, data):
    config = settings_of(data.draw)
    engine = Engine(anchored, max_batch_size=3, page_size=data.draw(st.integers(1, 9)), prefill_tokens=5)
    for t, prompt in zip(engine.generate(prompts, config), prompts, strict=True):
        assert (t.response_ids, t.step_map) == plain_windows(anchored, prompt, config, t.seed, canvas=False)
        assert t.tail == 0
        validate(t)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_full_attention_equals_a_plain_sampler(full, prompts, data):
    config = settings_of(data.draw)
    engine = Engine(full, max_batch_size=3, page_size=data.draw(st.integers(1, 9)))
    for t, prompt in zip(engine.generate(prompts, config), prompts, strict=True):
        assert (t.response_ids, t.step_map) == plain_windows(full, prompt, config, t.seed)
        assert t.canvas == config.max_tokens
        validate(t)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("attention", ["block", "full"])
def test_flex_attention_gives_the_same_tokens(prompts, attention):
    model, config = family(attention), DecodingConfig(block_size=4, steps=2, max_tokens=10, ignore_eos=True)
    plain, flex = (Engine(model, attention=kind).generate(prompts[2:5], config) for kind in ("sdpa", "flex"))
    assert [t.response_ids for t in flex] == [t.response_ids for t in plain]


@pytest.mark.parametrize("flight", [{"blocks_in_flight": 2, "recheck": 0.5}, {"flight": "look_ahead", "depth": 2}])
def test_flights_of_anchored_blocks_begin_where_the_response_does(anchored, prompts, flight):
    """A prompt of whole blocks is the same with both anchors, so all that may differ is where blocks begin."""
    config = DecodingConfig(block_size=4, steps=2, max_tokens=12, ignore_eos=True, **flight)
    usual = make_model(family="block_llama", logits_shift=anchored.config.logits_shift)
    whole = [prompt for prompt in prompts if len(prompt) % 4 == 0]
    mine, others = (Engine(model).generate(whole, config) for model in (anchored, usual))
    assert [(t.response_ids, t.step_map) for t in mine] == [(t.response_ids, t.step_map) for t in others]
    odd, config = (
        [prompt for prompt in prompts if len(prompt) % 4],
        replace(config, max_tokens=10),
    )  # a short last block
    ahead = Engine(anchored).generate(odd, config)
    if "flight" in flight:
        assert [t.response_ids for t in ahead] == [
            t.response_ids for t in Engine(anchored).generate(odd, replace(config, flight="multi_block"))
        ]


@pytest.mark.parametrize("canvas", [False, True])
def test_guidance(anchored, full, prompts, canvas):
    model = full if canvas else anchored
    config = DecodingConfig(block_size=4, steps=2, max_tokens=8, stop_ids=STOPS, guidance_scale=1.5)
    for t, prompt in zip(Engine(model).generate(prompts, config), prompts, strict=True):
        assert (t.response_ids, t.step_map) == plain_windows(model, prompt, config, t.seed, canvas)


def test_what_needs_causal_blocks_is_refused_in_one_line(full, prompts):
    for given_settings in (
        {"flight": "look_ahead"},
        {"flight": "s2d2"},
        {"blocks_in_flight": 2, "recheck": 0.5},
        {"strategy": "wino"},
    ):
        with pytest.raises(T3DError, match="every token sees every other") as caught:
            Engine(full).generate(prompts[:1], DecodingConfig(max_tokens=8, **given_settings))
        assert "\n" not in str(caught.value)


def test_a_whole_response_is_one_block_where_the_model_names_none(prompts):
    model = family("full", shift=1)
    model.config.block_size = None
    t = Engine(model).generate(prompts[:1], DecodingConfig(max_tokens=6, steps=3, ignore_eos=True))[0]
    assert (t.block_size, len(t.response_ids), max(t.step_map)) == (6, 6, 2)
