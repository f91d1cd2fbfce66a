"""Guidance: the engine gives what a sampler gives that runs the model twice at every step, from scratch."""

import random
from copy import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from t3d.decoding import DecodingConfig
from t3d.decoding.flight import FLIGHTS
from t3d.decoding.policy import POLICIES, SHADOW
from t3d.decoding.sampling import uniform
from t3d.engine import Engine, FailedEvent, FinishedEvent
from t3d.engine.intake import make_requests
from t3d.errors import T3DError
from t3d.tasks import TaskConfig, get_task
from tests.conftest import make_model
from tests.engine.reference import reference_choice, reference_draw

MASK = 63
STOPS = (1, 5)
STRATEGIES = ["low_confidence_static", "low_confidence_dynamic", "sequential", "random", "factor", "entropy_bounded_eb"]


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def tokenizer():
    """Token n is the character A + n."""
    vocab = {chr(65 + n): n for n in range(64)}
    inner = Tokenizer(models.WordLevel(vocab, unk_token=chr(65)))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token=chr(65))


def text(ids):
    return "".join(chr(65 + n) for n in ids)


def ids_of(string):
    return [ord(c) - 65 for c in string]


def row_logits(model, ids, origin, block_size):
    """Float32 (length, vocab), of a row whose first token has the position `origin`."""
    position = torch.arange(origin, origin + len(ids))
    block = position // block_size
    mask = (block[:, None] >= block[None, :])[None, None]
    return model(torch.tensor([ids]), attention_mask=mask, position_ids=position[None]).logits[0].float()


@torch.no_grad()
def plain_decode(model, prompt, config, seed):
    """(response_ids, step_map, length, denoising forwards); every block in flight must advance (`force` is 0)."""
    size, scale, p = config.block_size, config.guidance_scale, len(prompt)
    other = [MASK] * p if config.negative_prompt is None else ids_of(config.negative_prompt)
    origin = next(n for n in range(size) if (n + len(other)) % size == p % size)
    ids, steps, taken, forwards = list(prompt), {}, {}, 0
    end = -(-(p + config.max_tokens) // size) * size  # of the last block

    def masked(start):
        return [n for n in range(max(start, p), start + size) if ids[n] == MASK]

    base = p // size * size
    flight = [base]
    ids += [MASK] * (base + size - p)
    while True:
        logits = row_logits(model, ids, 0, size)
        if scale > 0:
            u = row_logits(model, other + ids[p:], origin, size)[len(other) :]
            logits[p:] = u + (scale + 1) * (logits[p:] - u)
        logits[:, MASK] = -torch.inf
        forwards += 1
        for start in flight:
            todo, step = masked(start), taken.get(start, 0)
            if not todo:
                continue

            def number(n, step=step, stream=0):
                return float(uniform(*(torch.tensor([x]) for x in (seed, n, step)), stream=stream))

            drawn = {n: reference_draw(logits[n], config, number(n)) for n in todo}
            quota = size // config.steps + (step < size % config.steps)
            for n in reference_choice(drawn, config, quota, {n: number(n, stream=1) for n in todo}):
                ids[n], steps[n] = drawn[n][0], step
            taken[start] = step + 1
        while flight and not masked(flight[0]):
            first, base = max(flight[0], p), flight.pop(0) + size
            limit = min(base, p + config.max_tokens)
            stops = [n + 1 - p for n in range(first, limit) if ids[n] in config.stop_ids]
            if stops or base - p >= config.max_tokens:
                length = stops[0] if stops else config.max_tokens
                return ids[p:base], [steps[n] for n in range(p, base)], length, forwards
        while len(flight) < config.blocks_in_flight:
            if flight:
                undecided = len(masked(flight[-1])) / size
                said = [ids[n] for start in flight for n in range(max(start, p), start + size)]
                at_end = flight[-1] + size >= end
                if at_end or 1 - undecided < config.enter or any(x in config.stop_ids for x in said):
                    break
            flight.append(flight[-1] + size if flight else base)
            ids += [MASK] * size


@st.composite
def configs(draw):
    size = draw(st.sampled_from([1, 2, 3, 4, 8]))
    scale = draw(st.sampled_from([0.0, 0.5, 1.0, 2.0]))
    negative = draw(st.none() | st.lists(st.integers(6, 59), min_size=1, max_size=20).map(text)) if scale else None
    return DecodingConfig(
        block_size=size,
        steps=draw(st.integers(1, size)),
        strategy=draw(st.sampled_from(STRATEGIES)),
        threshold=0.5,
        blocks_in_flight=draw(st.integers(1, 3)),
        enter=draw(st.sampled_from([0.0, 0.5])),
        force=0.0,
        temperature=draw(st.sampled_from([0.0, 1.0])),
        guidance_scale=scale,
        negative_prompt=negative,
        max_tokens=draw(st.integers(1, 14)),
        stop_ids=STOPS,
        seed=draw(st.integers(0, 1000)),
    )


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_engine_equals_two_plain_rows(model, tokenizer, data):
    """Guided and not in one batch, with negative prompts of any length, whatever the budget and the chunks."""
    rng = random.Random(data.draw(st.integers(0, 10**6)))
    prompts = [[rng.randrange(6, 60) for _ in range(rng.randint(1, 21))] for _ in range(data.draw(st.integers(1, 4)))]
    asked = [data.draw(configs()) for _ in prompts]
    engine = Engine(
        model,
        tokenizer,
        max_batch_size=data.draw(st.integers(1, 4)),
        kv_cache_tokens=data.draw(st.sampled_from([None, 112])),
        page_size=data.draw(st.sampled_from([None, 4, 16])),
        prefill_tokens=data.draw(st.sampled_from([1, 8, 1024])),
        fused=data.draw(st.booleans()),
    )
    for t, prompt, config in zip(engine.generate(prompts, asked), prompts, asked, strict=True):
        ids, steps, length, forwards = plain_decode(model, prompt, config, t.seed)
        assert (t.response_ids, t.step_map, t.length, t.prompt_ids) == (ids, steps, length, prompt)
        assert t.nfe.denoise == forwards


def many(rng, count):
    """Prompts, and settings of which two in three are guided."""
    prompts = [[rng.randrange(6, 60) for _ in range(rng.randint(1, 40))] for _ in range(count)]
    base = DecodingConfig(steps=2, max_tokens=24, temperature=1.0, stop_ids=STOPS)
    masked, negative = replace(base, guidance_scale=1.0), text(rng.randrange(6, 60) for _ in range(13))
    kinds = [base, masked, replace(masked, negative_prompt=negative)]
    return prompts, [kinds[n % 3] for n in range(count)]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("graphs", [False, True])
def test_flex_attention_and_graphs_equal_sdpa(model, tokenizer, graphs):
    prompts, asked = many(random.Random(2), 5)
    want = Engine(model, tokenizer).generate(prompts, asked)
    flex = Engine(model, tokenizer, attention="flex", page_size=16, kv_cache_tokens=192, cuda_graphs=graphs)
    assert [t.response_ids for t in flex.generate(prompts, asked)] == [t.response_ids for t in want]


def test_tiny_budget_preempts_both_and_changes_nothing(model, tokenizer):
    prompts, asked = many(random.Random(3), 18)
    want = Engine(model, tokenizer).generate(prompts, asked)
    tight = Engine(model, tokenizer, kv_cache_tokens=144, page_size=8)
    assert [t.response_ids for t in tight.generate(prompts, asked)] == [t.response_ids for t in want]
    assert tight.stats.preemptions > 0
    assert 72 < tight.stats.kv_peak_tokens <= 144
    assert tight.stats.kv_tokens == 0


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("negative", [3, 90])
def test_a_forward_of_both_is_counted_once(model, tokenizer, negative, fused):
    config = DecodingConfig(guidance_scale=1.0, negative_prompt=text([7] * negative), max_tokens=16, stop_ids=())
    engine = Engine(model, tokenizer, prefill_tokens=8, fused=fused)
    (t,) = engine.generate([[9] * 41], config)
    assert t.nfe.total == engine.stats.forwards
    assert t.nfe.prefill > 2
    assert (t.nfe.commit > 0) == (not fused)


def test_off_there_is_no_companion(model):
    prompts = [[7, 8, 9], [10] * 9]
    plain = DecodingConfig(max_tokens=12, temperature=1.0, stop_ids=())
    engine = Engine(model, page_size=4)
    want = engine.generate(prompts, plain)
    peak = engine.stats.kv_peak_tokens
    off = replace(plain, guidance_scale=0.0)
    assert [t.response_ids for t in engine.generate(prompts, off)] == [t.response_ids for t in want]
    requests = make_requests(prompts, [off, replace(off, guidance_scale=1.0)], None, None, model, None)
    session = engine.open(requests)
    for request, sides in zip(requests, (1, 2), strict=True):
        session.add(request)
        assert len(session.scheduler.waiting[-1].sides) == len(request.most_each) == sides
    guided = engine.generate(prompts, replace(off, guidance_scale=1.0))
    assert engine.stats.kv_peak_tokens == 2 * peak
    assert [t.response_ids for t in guided] != [t.response_ids for t in want]


def test_a_prompt_as_its_own_negative_changes_nothing(model, tokenizer):
    """c = u, so that what is combined is what there was."""
    prompt, config = [9, 10, 11, 12, 13], DecodingConfig(max_tokens=20, stop_ids=())
    (want,) = Engine(model).generate([prompt], config)
    guided = replace(config, guidance_scale=3.0, negative_prompt=text(prompt))
    assert Engine(model, tokenizer).generate([prompt], guided)[0].response_ids == want.response_ids


@pytest.mark.parametrize("flight", sorted(FLIGHTS))
@pytest.mark.parametrize("strategy", sorted(POLICIES))
def test_every_strategy_and_flight_is_mirrored(model, tokenizer, strategy, flight):
    """With c = u nothing changes, whatever is asked of a forward; so it is with pages, chunks and others beside it."""
    try:
        plain = DecodingConfig(strategy=strategy, flight=flight, steps=2, max_tokens=14, stop_ids=STOPS)
    except T3DError:
        pytest.skip("these do not go together")
    if plain.flying.shifted:
        if SHADOW in plain.policy.needs:
            pytest.skip("no model takes both")
        model = make_model(family="block_llama", logits_shift=1)
    prompts = [[9, 10, 11, 12, 13], [7] * 10]
    asked = [replace(plain, guidance_scale=1.0, negative_prompt=text(p)) for p in prompts]
    want = Engine(model).generate(prompts, plain)
    got = Engine(model, tokenizer, page_size=4, prefill_tokens=4).generate(prompts, asked)
    assert [(t.response_ids, t.step_map) for t in got] == [(t.response_ids, t.step_map) for t in want]
    short = [replace(c, negative_prompt=text([20])) for c in asked]  # shorter than the prompt's tail
    loose = Engine(model, tokenizer).generate(prompts, short)
    tight = Engine(model, tokenizer, page_size=4, prefill_tokens=4, max_batch_size=1).generate(prompts, short)
    assert [t.response_ids for t in loose] == [t.response_ids for t in tight]


@pytest.mark.parametrize("page_size", [4, None])
def test_nan_stays_with_its_sequence(tokenizer, page_size):
    """Also where only the negative prompt gives it, and in the pages that a companion leaves."""
    model = make_model(seed=5)
    with torch.no_grad():
        model.model.embed_tokens.weight[11] = torch.nan
    config = DecodingConfig(max_tokens=16, temperature=0.5, ignore_eos=True, guidance_scale=1.0)
    prompts = [[7, 8], [9] * 14, [12] * 9, [13, 11, 10], [9, 10, 13]]
    asked = [config] * 5
    asked[1] = replace(config, negative_prompt=text([9, 11, 12] * 7))
    asked[4] = replace(config, guidance_scale=0.0)
    engine = Engine(model, tokenizer, max_batch_size=2, page_size=page_size, prefill_tokens=8)
    requests = make_requests(prompts, asked, None, None, model, tokenizer)
    session, events = engine.open(requests), []
    for request in requests:
        session.add(request)
    while not session.done:
        events += session.step(isolate=True)
    assert sorted(e.index for e in events if isinstance(e, FailedEvent)) == [1, 3]
    got = {e.index: e.trajectory.response_ids for e in events if isinstance(e, FinishedEvent)}
    for index in (0, 2, 4):
        seeds = [requests[index].seed]
        (alone,) = Engine(model, tokenizer).generate([prompts[index]], asked[index], seeds=seeds)
        assert got[index] == alone.response_ids
    assert not session.cache.data.isnan().any()
    assert session.cache.used_pages == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"negative_prompt": "AB"}, "negative_prompt does nothing without guidance; set guidance_scale above 0"),
        ({"negative_prompt": "", "guidance_scale": 1.0}, "negative_prompt is empty"),
        ({"guidance_scale": -1.0}, "guidance_scale must lie in 0..100, got -1"),
        ({"guidance_scale": float("inf")}, "guidance_scale must lie in 0..100, got inf"),
    ],
)
def test_bad_settings_are_refused(given, message):
    with pytest.raises(T3DError, match=message):
        DecodingConfig(**given)


@pytest.mark.parametrize(
    ("prompt", "given", "options", "message"),
    [
        ([], {}, {}, "prompt 0 is empty"),
        ([7], {"negative_prompt": text([8, MASK])}, {}, "the negative prompt of prompt 0 contains the mask token"),
        ([7], {"negative_prompt": text([8] * 490)}, {}, "prompt 0 comes to 5.. positions behind its negative prompt"),
        (
            [7] * 8,
            {},
            {"kv_cache_tokens": 32},
            "prompt 0 can come to 64 positions with guidance, but the cache",
        ),
    ],
)
def test_bad_requests_are_refused_before_any_work(model, tokenizer, prompt, given, options, message):
    engine = Engine(model, tokenizer, **options)
    with pytest.raises(T3DError, match=message):
        engine.stream([prompt], DecodingConfig(guidance_scale=1.0, max_tokens=24, **given))
    assert engine.stats.forwards == 0


def test_a_negative_prompt_needs_a_tokenizer(model):
    with pytest.raises(T3DError, match="negative_prompt needs a tokenizer"):
        Engine(model).stream([[7]], DecodingConfig(guidance_scale=1.0, negative_prompt="A"))


def test_tasks_pose_the_negative_prompt_as_a_question(tokenizer):
    """Templates are the question's; in the engine the rendered text is taken as it is."""
    task = get_task(TaskConfig(name="prompts", template="X{question}Y"))
    config = DecodingConfig(guidance_scale=1.0, negative_prompt="BC")
    assert task.guided(config, tokenizer).negative_prompt == "XBCY"
    chat = copy(tokenizer)
    chat.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    assert task.guided(config, chat).negative_prompt == "<XBCY>"
    plain = DecodingConfig(guidance_scale=1.0)
    assert task.guided(plain, chat) is plain
