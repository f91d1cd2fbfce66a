"""Look-ahead changes no token, step or confidence; it only takes fewer forwards."""

import random
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from t3d.decoding import DecodingConfig
from t3d.embedded import checkpoint
from t3d.engine import BlockEvent, Engine, FinishedEvent
from t3d.errors import T3DError
from t3d.models import load_model
from t3d.tasks import TaskConfig, get_task
from tests.conftest import make_model
from tests.engine.test_equivalence import STOPS, decoding_configs, engines, random_prompts


@pytest.fixture(scope="module")
def model():
    return make_model()


def what(trajectory):
    t = trajectory
    return t.prompt_ids, t.response_ids, t.step_map, t.revisions, t.length, t.finish_reason, t.seed


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_look_ahead_gives_the_tokens_of_the_ordinary_decoder(model, data):
    """Any policy, temperature, block size, window and depth in one batch, with any budget, page size and chunking."""
    rng = random.Random(data.draw(st.integers(0, 10**6)))
    prompts = random_prompts(rng, data.draw(st.integers(1, 4)))
    plain = [replace(data.draw(decoding_configs()), window=data.draw(st.sampled_from([None, 2, 4]))) for _ in prompts]
    ahead = [replace(c, flight="look_ahead", depth=data.draw(st.integers(1, 3))) for c in plain]
    longest = max(Engine(model).cache_size(requests(model, prompts, ahead)))
    engine = data.draw(engines(model, -(-longest // 16) * 16))
    seeds = [rng.randrange(2**60) for _ in prompts]
    want = Engine(model).generate(prompts, plain, seeds=seeds)
    got = engine.generate(prompts, ahead, seeds=seeds)
    assert [what(t) for t in got] == [what(t) for t in want]
    for one, other in zip(got, want, strict=True):
        assert one.confidence == pytest.approx(other.confidence, abs=1e-4)
        assert one.nfe.denoise <= other.nfe.denoise


def requests(model, prompts, configs):
    from t3d.engine.intake import make_requests

    return make_requests(prompts, configs, None, None, model, None)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("graphs", [False, True])
def test_on_flex_attention(model, graphs):
    prompts = random_prompts(random.Random(3), 4, longest=30)
    plain = DecodingConfig(steps=2, max_tokens=12, temperature=1.0, stop_ids=STOPS)
    want = Engine(model).generate(prompts, plain)
    flex = Engine(model, attention="flex", cuda_graphs=graphs)
    got = flex.generate(prompts, replace(plain, flight="look_ahead", depth=2))
    assert [what(t) for t in got] == [what(t) for t in want]


@pytest.fixture(scope="module")
def teacher():
    return load_model(checkpoint(None))


def word_problems(tokenizer, count):
    task = get_task(TaskConfig(name="word_problems"))
    return [task.prompt(p, tokenizer) for p in task.problems("dev", count)]


@pytest.mark.parametrize("steps", [4, 2])
def test_a_trained_model_needs_fewer_forwards_the_deeper_it_looks(teacher, steps):
    model, tokenizer = teacher
    prompts = word_problems(tokenizer, 16)
    plain = DecodingConfig(steps=steps, max_tokens=96)
    want = Engine(model, tokenizer).generate(prompts, plain)
    forwards = [sum(t.nfe.denoise for t in want)]
    for depth in (1, 2, 3):
        got = Engine(model, tokenizer).generate(prompts, replace(plain, flight="look_ahead", depth=depth))
        assert [what(t) for t in got] == [what(t) for t in want]
        forwards.append(sum(t.nfe.denoise for t in got))
    assert forwards == sorted(forwards, reverse=True)
    assert forwards[1] < 0.75 * forwards[0]


def test_what_is_watched_is_what_happens_without_drafts(teacher):
    """Blocks come in order; the watched steps of a sequence are those of the ordinary decoder."""
    model, tokenizer = teacher
    (prompt,) = word_problems(tokenizer, 1)
    plain = DecodingConfig(steps=2, max_tokens=64)

    def steps(config):
        (request,) = requests(model, [prompt], [config])
        session = Engine(model, tokenizer).open([request])
        session.add(request, watch=True)
        found, blocks = [], []
        while not session.done:
            for event in session.step():
                if isinstance(event, BlockEvent):
                    blocks.append(event.token_ids)
                elif not isinstance(event, FinishedEvent):
                    found.append((event.step, event.places, event.token_ids))
        return found, blocks

    assert steps(replace(plain, flight="look_ahead", depth=3)) == steps(plain)


def test_what_it_cannot_do_is_said_before_any_work(model):
    with pytest.raises(T3DError, match="look_ahead has depth"):
        DecodingConfig(flight="look_ahead", blocks_in_flight=2)
    with pytest.raises(T3DError, match=r"depth must lie in 1\.\.3"):
        DecodingConfig(flight="look_ahead", depth=4)
    deep = DecodingConfig(flight="look_ahead", depth=3, max_tokens=8)
    with pytest.raises(T3DError, match="the cache holds 16"):
        Engine(model, kv_cache_tokens=16).generate([[7, 8, 9]], deep)
    assert Engine(model, kv_cache_tokens=16).generate([[7, 8, 9]], replace(deep, flight="multi_block"))
