"""Several blocks in flight give what a plain sampler gives that recomputes everything at every forward."""

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from t3d.decoding import DecodingConfig
from t3d.engine import Engine
from tests.conftest import make_model
from tests.engine.reference import reference_multi_block

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
        ids, steps, confidence, length, reason, forwards = reference_multi_block(
            model, prompt, config, t.seed, config.stop_ids
        )
        assert (t.response_ids, t.step_map) == (ids, steps)
        assert t.confidence == pytest.approx(confidence, abs=1e-4)
        assert (t.length, t.finish_reason, t.nfe.denoise) == (length, reason, forwards)
