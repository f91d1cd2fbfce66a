"""The engine gives what a plain sampler gives, token for token and step for step."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from t3d.decoding import DecodingConfig
from t3d.engine import Engine
from tests.conftest import make_model
from tests.engine.reference import reference_decode

STOPS = (1, 5)


@pytest.fixture(scope="module")
def model():
    return make_model()


def random_prompts(rng, count, longest=21):
    return [[rng.randrange(6, 60) for _ in range(rng.randint(1, longest))] for _ in range(count)]


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


configs = st.builds(
    DecodingConfig,
    block_size=st.sampled_from([1, 2, 3, 4, 7, 8, 16, 32]),
    strategy=st.sampled_from(["low_confidence_static", "low_confidence_dynamic"]),
    threshold=st.sampled_from([0.2, 0.5, 0.9]),
    floor=st.sampled_from(["one", "schedule"]),
    confidence=st.sampled_from(["untempered", "sampling"]),
    temperature=st.sampled_from([0.0, 0.3, 1.0]),
    top_k=st.sampled_from([0, 0, 5]),
    top_p=st.sampled_from([1.0, 0.8]),
    max_tokens=st.integers(1, 24),
    stop_ids=st.just(STOPS),
    seed=st.integers(0, 1000),
)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_engine_equals_plain_sampler(model, data):
    rng = random.Random(data.draw(st.integers(0, 10**6)))
    prompts = random_prompts(rng, data.draw(st.integers(1, 5)))
    chosen = []
    for _ in prompts:
        config = data.draw(configs)
        steps = data.draw(st.integers(1, config.block_size))
        chosen.append(DecodingConfig(**{**config.__dict__, "steps": steps}))
    longest = max(
        -(-(len(p) + c.max_tokens) // c.block_size) * c.block_size for p, c in zip(prompts, chosen, strict=True)
    )
    engine = Engine(
        model,
        max_batch_size=data.draw(st.integers(1, 4)),
        kv_cache_tokens=data.draw(st.sampled_from([None, longest, 2 * longest])),
        page_size=data.draw(st.sampled_from([None, 4, 16])),
        prefill_tokens=data.draw(st.sampled_from([1, 8, 1024])),
        fused=data.draw(st.booleans()),
    )
    for trajectory, prompt, config in zip(engine.generate(prompts, chosen), prompts, chosen, strict=True):
        assert_equal(trajectory, model, prompt, config)


def test_fused_costs_steps_forwards_per_block(model):
    config = DecodingConfig(steps=2, max_tokens=16, stop_ids=())
    (fused,) = Engine(model).generate([[7, 8, 9, 10, 11, 12, 13, 14]], config)
    (plain,) = Engine(model, fused=False).generate([[7, 8, 9, 10, 11, 12, 13, 14]], config)
    assert (fused.nfe.prefill, fused.nfe.denoise, fused.nfe.commit) == (0, 8, 0)
    assert (plain.nfe.prefill, plain.nfe.denoise, plain.nfe.commit) == (1, 8, 3)
    assert fused.response_ids == plain.response_ids
    assert fused.step_map == plain.step_map


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
