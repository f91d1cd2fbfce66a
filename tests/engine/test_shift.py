"""A model whose logits predict the next token decodes as a plain sampler without cache does, however it is cached."""

import random
from dataclasses import replace

import pytest
import torch

from t3d.decoding import DecodingConfig
from t3d.engine import Engine
from t3d.errors import T3DError
from tests.conftest import make_model
from tests.engine.reference import reference_decode, reference_multi_block
from tests.engine.test_guidance import plain_decode

STOPS = (1, 5)


@pytest.fixture(scope="module")
def model():
    return make_model(family="block_llama", logits_shift=1)


@pytest.fixture
def prompts():
    rng = random.Random(4)
    return [[rng.randrange(6, 60) for _ in range(n)] for n in (1, 3, 4, 8, 13, 16)]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    "settings",
    [
        {"fused": False},
        {"prefill_tokens": 3, "page_size": 4},
        {"kv_cache_tokens": 36, "page_size": 4},  # some must yield, and are computed again
        {"prefix_cache": True, "page_size": 3},
        {"attention": "flex", "cuda_graphs": True},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_equals_plain_sampler(model, prompts, settings):
    prompts = [*prompts, prompts[-1]] if "attention" not in settings else prompts[1:4]
    config = DecodingConfig(steps=2, max_tokens=10, temperature=1.0, ignore_eos=True)
    engine = Engine(model, max_batch_size=3, **settings)
    for t, prompt in zip(engine.generate(prompts, config), prompts, strict=True):
        ids, steps, confidence, *_ = reference_decode(model, prompt, config, t.seed)
        assert (t.response_ids, t.step_map) == (ids, steps)
        assert t.confidence == pytest.approx(confidence, abs=1e-4)
    if "kv_cache_tokens" in settings:
        assert engine.stats.preemptions > 0
    if "prefix_cache" in settings:
        assert engine.stats.cached_tokens > 0


@pytest.mark.parametrize("recheck", [0.0, 0.5])
@pytest.mark.parametrize("blocks", [2, 3])
def test_several_blocks_in_flight(model, prompts, blocks, recheck):
    flying = {"blocks_in_flight": blocks, "recheck": recheck, "force": 0.0}
    config = DecodingConfig(block_size=4, steps=2, max_tokens=14, stop_ids=STOPS, temperature=1.0, **flying)
    for t, prompt in zip(Engine(model).generate(prompts, config), prompts, strict=True):
        found = reference_multi_block(model, prompt, config, t.seed, STOPS)
        assert (t.response_ids, t.step_map, t.revisions or [0] * len(t.step_map)) == (*found[:2], found[-1])


@pytest.mark.parametrize("depth", [1, 3])
def test_look_ahead_changes_no_token(model, prompts, depth):
    config = DecodingConfig(steps=4, max_tokens=14, ignore_eos=True)
    plain = Engine(model).generate(prompts, config)
    ahead = Engine(model).generate(prompts, replace(config, flight="look_ahead", depth=depth))
    assert [(t.response_ids, t.step_map) for t in ahead] == [(t.response_ids, t.step_map) for t in plain]
    assert sum(t.nfe.denoise for t in ahead) <= sum(t.nfe.denoise for t in plain)


def test_guidance(model, prompts):
    config = DecodingConfig(block_size=4, steps=2, max_tokens=10, stop_ids=STOPS, guidance_scale=1.5, temperature=1.0)
    for t, prompt in zip(Engine(model).generate(prompts, config), prompts, strict=True):
        assert (t.response_ids, t.step_map) == plain_decode(model, prompt, config, t.seed)[:2]


def test_one_token_blocks_are_autoregressive_decoding(model, prompts):
    """With the shift, a model of blocks of one token is the autoregressive model that it was made of."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "architectures")}
    plain = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    plain.load_state_dict(model.state_dict())
    config = DecodingConfig(block_size=1, max_tokens=8, ignore_eos=True)
    for t, prompt in zip(Engine(model).generate(prompts, config), prompts, strict=True):
        ids = torch.tensor([prompt])
        for _ in range(8):
            with torch.no_grad():
                scores = plain(ids).logits[0, -1]
            scores[model.config.mask_token_id] = -torch.inf
            ids = torch.cat([ids, scores.argmax()[None, None]], dim=1)
        assert t.response_ids == ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"flight": "linear_spec"}, "flight 'linear_spec' asks masks"),
        ({"flight": "s2d2"}, "flight 's2d2' asks masks"),
        ({"strategy": "wino"}, "strategy 'wino' asks masks"),
    ],
)
def test_what_asks_masks_about_their_own_places_is_refused(model, prompts, settings, words):
    with pytest.raises(T3DError, match=words) as error:
        Engine(model).generate(prompts, DecodingConfig(**settings))
    assert "\n" not in str(error.value)
