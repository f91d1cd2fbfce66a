"""The log-probability of a token is the model's own at the step that committed it, recomputed here from scratch."""

import random
from dataclasses import replace

import pytest
import torch

from t3d.decoding import DecodingConfig
from t3d.engine import BlockEvent, Engine, FinishedEvent, StepEvent
from t3d.engine.intake import make_requests
from t3d.errors import T3DError
from tests.conftest import make_model
from tests.engine.reference import reference_logits
from tests.engine.test_equivalence import STOPS, random_prompts

TOP = 3
PLAIN = DecodingConfig(block_size=8, max_tokens=21, stop_ids=STOPS, seed=3)
CASES = {
    "static": {"steps": 3},
    "sampled": {"steps": 3, "temperature": 0.9, "top_k": 7, "top_p": 0.9, "confidence": "sampling"},
    "threshold": {"strategy": "low_confidence_dynamic", "threshold": 0.3},
    "adjusted": {"strategy": "credit", "steps": 4},
    "rewriting": {"strategy": "token_editing", "block_size": 4, "max_tokens": 6},
    "masking again": {"strategy": "wino", "accept_threshold": 0.0, "temperature": 1.5},
    "several blocks": {"strategy": "low_confidence_dynamic", "threshold": 0.3, "blocks_in_flight": 3, "recheck": 0.2},
    "look-ahead": {"flight": "look_ahead", "depth": 2, "steps": 2},
    "speculation": {"flight": "linear_spec"},
    "guided": {"steps": 3, "guidance_scale": 0.7},
}


@pytest.fixture(scope="module")
def model():
    return make_model()


def run(model, requests, **options):
    """The events of each request, every step told."""
    session, events = Engine(model, **options).open(requests), {r.index: [] for r in requests}
    for request in requests:
        session.add(request, watch=True)
    while not session.done:
        for event in session.step():
            events[event.index].append(event)
    return events


@torch.no_grad()
def recomputed(model, request, events):
    """{place: (token, log-probabilities (vocab,))} of the last commit of each place, by plain forwards of the states
    that the steps tell."""
    config, mask, start = request.config, model.config.mask_token_id, len(request.prompt_ids)
    size, end = config.block_size, request.end
    ids = [*request.prompt_ids, *[mask] * (end - start)]
    found, forward, seen, fresh = {}, 0, list(ids), set()
    for event in (e for e in events if isinstance(e, StepEvent)):
        if event.forward != forward or config.flight == "look_ahead":  # there a draft showed the state between them
            forward, seen, fresh = event.forward, list(ids), set()
        positions = [start + place for place in event.places]
        block = positions[0] // size * size
        if mask in event.token_ids and config.recheck:  # a copy of it showed the whole block masked
            fresh.add(block)
        state = [mask if block in fresh and max(block, start) <= p < block + size else t for p, t in enumerate(seen)]
        for position, token in zip(positions, event.token_ids, strict=True):
            if token != mask:
                if config.flight == "linear_spec":
                    logits = reference_logits(model, [*ids[:position], mask], 1)
                else:
                    logits = reference_logits(model, state[: block + size], size)
                found[position - start] = token, logits[position].log_softmax(-1)
            ids[position] = token
    return found


@pytest.mark.parametrize("name", [name for name in CASES if name != "guided"])
def test_it_is_that_of_a_plain_forward_of_the_state(model, name):
    config = replace(PLAIN, **CASES[name])
    requests = make_requests(random_prompts(random.Random(7), 2), config, None, None, model, None, TOP)
    told = run(model, requests)
    for request, events in zip(requests, told.values(), strict=True):
        (trajectory,) = (e.trajectory for e in events if isinstance(e, FinishedEvent))
        want, got = recomputed(model, request, events), trajectory.logprobs
        assert len(got) == len(trajectory.response_ids)
        assert got.ids.shape == got.values.shape == (len(got), TOP)
        for place, token in enumerate(trajectory.response_ids):
            last, values = want[place]
            assert last == token
            assert got.token[place] == pytest.approx(float(values[token]), abs=1e-4)
            best = values.topk(TOP).values.tolist()
            assert got.values[place].tolist() == pytest.approx(best, abs=1e-4)
            assert values[got.ids[place]].tolist() == pytest.approx(best, abs=1e-4)
    if name in ("rewriting", "masking again", "several blocks"):
        assert any(events[-1].trajectory.revisions for events in told.values())


@pytest.mark.parametrize("name", CASES)
def test_who_does_not_ask_decodes_the_same_in_the_same_batch(model, name):
    """And blocks tell what the whole answer tells."""
    config = replace(PLAIN, **CASES[name])
    prompts = random_prompts(random.Random(7), 3)
    want = Engine(model).generate(prompts, config)
    requests = make_requests(prompts, config, None, None, model, None)
    requests = [replace(r, logprobs=asked) for r, asked in zip(requests, (None, 0, 5), strict=True)]
    for request, events in zip(
        requests, run(model, requests, kv_cache_tokens=256, max_batch_size=3).values(), strict=True
    ):
        trajectory = events[-1].trajectory
        assert trajectory.response_ids == want[request.index].response_ids
        blocks = [e.logprobs for e in events if isinstance(e, BlockEvent)]
        if request.logprobs is None:
            assert trajectory.logprobs is None
            assert blocks == [None] * len(blocks)
            continue
        assert trajectory.logprobs.ids.shape[1] == request.logprobs
        assert [x for b in blocks for x in b.token.tolist()] == trajectory.logprobs.token.tolist()
        if config.confidence == "untempered" and name != "adjusted":
            assert trajectory.logprobs.token.tolist() == pytest.approx(
                torch.tensor(trajectory.confidence).log().tolist(), abs=1e-3
            )


def test_models_whose_logits_predict_the_next_token():
    model = make_model(family="block_llama", logits_shift=1)
    for flight in ("multi_block", "next_token"):
        (trajectory,) = Engine(model).generate([[7, 8, 9]], replace(PLAIN, flight=flight), logprobs=2)
        assert trajectory.logprobs.token.tolist() == pytest.approx(
            torch.tensor(trajectory.confidence).log().tolist(), abs=1e-3
        )


@pytest.mark.parametrize("asked", [-1, 21])
def test_more_than_there_are(model, asked):
    with pytest.raises(T3DError, match=rf"logprobs must lie in 0..20, got {asked}"):
        Engine(model).generate([[7]], PLAIN, logprobs=asked)
