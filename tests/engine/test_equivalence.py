"""The engine gives what a plain sampler gives, token for token and step for step, however it batches."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from t3d.decoding import DecodingConfig
from t3d.engine import BlockEvent, Engine, FinishedEvent
from tests.conftest import make_model
from tests.engine.reference import reference_decode

STOPS = (1, 5)
STRATEGIES = (  # those that the reference knows; tests/decoding/test_rules.py has the others
    "adaptive",
    "entropy",
    "entropy_bounded_eb",
    "entropy_bounded_sdar",
    "factor",
    "low_confidence_dynamic",
    "low_confidence_static",
    "margin",
    "random",
    "sequential",
)


@pytest.fixture(scope="module")
def model():
    return make_model()


def random_prompts(rng, count, longest=21):
    return [[rng.randrange(6, 60) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def room(prompts, configs, page):
    """Positions of the longest sequence, in whole pages."""
    ends = [-(-(len(p) + c.max_tokens) // c.block_size) * c.block_size for p, c in zip(prompts, configs, strict=True)]
    return -(-max(ends) // page) * page


def assert_equal(trajectory, model, prompt, config):
    ids, steps, confidence, length, reason, forwards = reference_decode(
        model, prompt, config, trajectory.seed, config.stop_ids
    )
    assert trajectory.response_ids == ids
    assert trajectory.step_map == steps
    assert trajectory.confidence == pytest.approx(confidence, abs=1e-4)
    assert (trajectory.length, trajectory.finish_reason) == (length, reason)
    assert trajectory.nfe.denoise == forwards
    assert trajectory.prompt_ids == prompt


@st.composite
def decoding_configs(draw):
    block_size = draw(st.sampled_from([1, 2, 3, 4, 7, 8, 16, 32]))
    return DecodingConfig(
        block_size=block_size,
        steps=draw(st.integers(1, block_size)),
        strategy=draw(st.sampled_from(STRATEGIES)),
        threshold=draw(st.sampled_from([0.2, 0.5, 0.9])),
        entropy_bound=draw(st.sampled_from([0.1, 1.0, 4.0])),
        factor=draw(st.sampled_from([0.5, 1.0, 3.0])),
        risk=draw(st.sampled_from([0.1, 0.7, 3.0])),
        floor=draw(st.sampled_from(["one", "schedule"])),
        confidence=draw(st.sampled_from(["untempered", "sampling"])),
        temperature=draw(st.sampled_from([0.0, 0.3, 1.0])),
        top_k=draw(st.sampled_from([0, 0, 5])),
        top_p=draw(st.sampled_from([1.0, 0.8])),
        max_tokens=draw(st.integers(1, 16)),
        stop_ids=STOPS,
        seed=draw(st.integers(0, 1000)),
    )


@st.composite
def engines(draw, model, longest):
    page = draw(st.sampled_from([None, 4, 16]))
    return Engine(
        model,
        max_batch_size=draw(st.integers(1, 4)),
        kv_cache_tokens=draw(st.sampled_from([None, longest, 2 * longest])),
        page_size=page,
        prefill_tokens=draw(st.sampled_from([1, 8, 1024])),
        fused=draw(st.booleans()),
    )


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_engine_equals_plain_sampler(model, data):
    """Prompts, settings, seeds and phases of all kinds in one batch, with any budget, page size and chunking."""
    rng = random.Random(data.draw(st.integers(0, 10**6)))
    prompts = random_prompts(rng, data.draw(st.integers(1, 4)))
    configs = [data.draw(decoding_configs()) for _ in prompts]
    engine = data.draw(engines(model, room(prompts, configs, 16)))
    for trajectory, prompt, config in zip(engine.generate(prompts, configs), prompts, configs, strict=True):
        assert_equal(trajectory, model, prompt, config)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize(("page_size", "budget"), [(None, None), (16, 64)])
def test_flex_attention_equals_sdpa(model, page_size, budget, graphs):
    """With `graphs`, the forwards of steady decoding are padded to the shapes that a GPU would replay."""
    rng = random.Random(2)
    prompts = random_prompts(rng, 5, longest=40)
    config = DecodingConfig(steps=2, max_tokens=10, temperature=1.0, stop_ids=STOPS)
    want = Engine(model).generate(prompts, config)
    flex = Engine(model, attention="flex", page_size=page_size, kv_cache_tokens=budget, cuda_graphs=graphs)
    assert [t.response_ids for t in flex.generate(prompts, config)] == [t.response_ids for t in want]


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_batch_of_many_equals_singles_in_any_order(model, data):
    rng = random.Random(data.draw(st.integers(0, 10**6)))
    prompts = random_prompts(rng, data.draw(st.integers(2, 8)))
    seeds = [rng.randrange(2**62) for _ in prompts]
    config = replace(data.draw(decoding_configs()), temperature=1.0)
    singles = [Engine(model).generate([p], config, seeds=[s])[0] for p, s in zip(prompts, seeds, strict=True)]
    order = data.draw(st.permutations(range(len(prompts))))
    engine = data.draw(engines(model, room(prompts, [config] * len(prompts), 16)))
    together = engine.generate([prompts[i] for i in order], config, seeds=[seeds[i] for i in order])
    for place, i in enumerate(order):
        assert together[place].prompt_ids == prompts[i]
        assert together[place].response_ids == singles[i].response_ids
        assert together[place].step_map == singles[i].step_map
        assert together[place].length == singles[i].length


def test_every_commit_is_once_and_by_schedule(model):
    rng = random.Random(0)
    prompts = random_prompts(rng, 20)
    config = DecodingConfig(block_size=8, steps=3, max_tokens=30, stop_ids=())
    for t in Engine(model).generate(prompts, config):
        start = len(t.prompt_ids)
        assert (start + len(t.response_ids)) % 8 == 0
        assert start + len(t.response_ids) - 8 < start + t.length
        for base in range(start // 8 * 8, start + len(t.response_ids), 8):
            steps = t.step_map[max(base - start, 0) : base + 8 - start]
            left, want = len(steps), []
            for quota in (3, 3, 2):
                want.append(min(quota, left))
                left -= want[-1]
            assert [steps.count(s) for s in range(3)] == want


def test_fused_costs_steps_forwards_per_block(model):
    config = DecodingConfig(steps=2, max_tokens=16, stop_ids=())
    prompt = [7, 8, 9, 10, 11, 12, 13, 14]
    (fused,) = Engine(model).generate([prompt], config)
    (plain,) = Engine(model, fused=False).generate([prompt], config)
    assert (fused.nfe.prefill, fused.nfe.denoise, fused.nfe.commit) == (0, 8, 0)
    assert (plain.nfe.prefill, plain.nfe.denoise, plain.nfe.commit) == (1, 8, 3)
    assert fused.response_ids == plain.response_ids
    assert fused.step_map == plain.step_map


def test_long_prompt_does_not_stall_the_others(model):
    """Chunked prefill: while a long prompt is read, the short ones go on; its chunks are counted."""
    config = DecodingConfig(steps=1, max_tokens=24, stop_ids=())
    long, short = [7] * 200, [8, 9]
    engine = Engine(model, prefill_tokens=16)
    events = list(engine.stream([short, long], config))
    first_of_long = next(i for i, e in enumerate(events) if e.index == 1)
    assert sum(e.index == 0 for e in events[:first_of_long]) >= 6
    trajectories = {e.index: e.trajectory for e in events if isinstance(e, FinishedEvent)}
    # 200 positions: chunks of 20 (16 and the block every forward may carry) until 20 are left for the first step
    assert trajectories[1].nfe.prefill == 9
    assert trajectories[1].nfe.denoise == 6
    assert (
        trajectories[1].response_ids
        == Engine(model).generate([long], config, seeds=[trajectories[1].seed])[0].response_ids
    )


def test_tiny_budget_preempts_and_changes_nothing(model):
    rng = random.Random(1)
    prompts = random_prompts(rng, 40, longest=60)
    config = DecodingConfig(temperature=1.0, max_tokens=40, stop_ids=STOPS, steps=2)
    free = Engine(model)
    want = free.generate(prompts, config)
    tight = Engine(model, kv_cache_tokens=112, page_size=8)
    got = tight.generate(prompts, config)
    assert tight.stats.preemptions > 0
    assert tight.stats.kv_peak_tokens <= 112
    assert [(t.prompt_ids, t.response_ids, t.step_map, t.length, t.finish_reason) for t in got] == [
        (t.prompt_ids, t.response_ids, t.step_map, t.length, t.finish_reason) for t in want
    ]


def test_stream_yields_blocks_then_the_trajectory(model):
    config = DecodingConfig(max_tokens=10, stop_ids=(), n=2, temperature=1.0)
    prompts = [[7, 8, 9], [10, 11]]
    blocks, done = {}, {}
    for event in Engine(model, max_batch_size=3).stream(prompts, config):
        key = (event.index, event.sample)
        assert key not in done
        if isinstance(event, BlockEvent):
            blocks.setdefault(key, []).extend(zip(event.token_ids, event.step_map, strict=True))
        else:
            done[key] = event.trajectory
    assert sorted(done) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for key, t in done.items():
        assert blocks[key] == list(zip(t.response_ids, t.step_map, strict=True))
        assert (t.prompt_ids, t.sample) == (prompts[key[0]], key[1])
    assert done[0, 0].response_ids != done[0, 1].response_ids


def test_a_sequence_is_repeated_by_its_own_seed(model):
    config = DecodingConfig(max_tokens=20, temperature=1.0, n=3, stop_ids=())
    all_three = Engine(model).generate([[7, 8, 9]], config)
    assert len({tuple(t.response_ids) for t in all_three}) == 3
    for t in all_three:
        (again,) = Engine(model).generate([[7, 8, 9]], replace(config, n=1), seeds=[t.seed])
        assert again.response_ids == t.response_ids


def test_weights_are_read_anew(model):
    student = make_model(seed=3)
    engine = Engine(student)
    config = DecodingConfig(max_tokens=12)
    before = engine.generate([[7, 8, 9]], config)[0].response_ids
    with torch.no_grad():
        for mine, other in zip(student.parameters(), model.parameters(), strict=True):
            mine.copy_(other)
    after = engine.generate([[7, 8, 9]], config)[0].response_ids
    assert after == Engine(model).generate([[7, 8, 9]], config)[0].response_ids != before


def test_training_mode_is_left_as_it_was(model):
    model.train()
    try:
        Engine(model).generate([[7, 8]], DecodingConfig(max_tokens=4))
        assert model.training
    finally:
        model.eval()
