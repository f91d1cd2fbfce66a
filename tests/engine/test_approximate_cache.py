"""The prefix and dual caches of full attention: at a block's later steps the other keys are those of its first step."""

import random
from dataclasses import replace

import pytest

from t3d.decoding import DecodingConfig
from t3d.engine import Engine
from t3d.errors import T3DError
from tests.conftest import make_model
from tests.engine.test_geometry import STOPS, family, plain_windows

PROMPTS = [[random.Random(n).randrange(6, 60) for _ in range(n)] for n in (1, 3, 4, 8, 13, 16)]


def hold_keys(model, kind, prompt, block_size):
    """The model's own forward, which computes all keys and values, then takes the older ones where they are kept."""
    shift, mask_id, kept, now = model.config.logits_shift, model.config.mask_token_id, {}, {}

    def begin(module, arguments):
        masked = (arguments[0][0] == mask_id).nonzero()[:, 0]
        start = prompt + (int(masked[0]) - prompt) // block_size * block_size
        now["first"], now["start"] = start != now.get("start"), start

    def hold(module, arguments, out):
        if now["first"]:
            kept[module] = out.clone()
            return out
        out[:, : now["start"] - shift] = kept[module][:, : now["start"] - shift]
        if kind == "dual":
            end = now["start"] + block_size
            out[:, end:] = kept[module][:, end:]
        return out

    hooks = [model.register_forward_pre_hook(begin)]
    for layer in model.model.layers:
        hooks += [m.register_forward_hook(hold) for m in (layer.self_attn.k_proj, layer.self_attn.v_proj)]
    return hooks


@pytest.mark.parametrize(
    ("shift", "scale", "attention"),
    [(0, 0.0, "sdpa"), (1, 0.0, "sdpa"), (0, 0.7, "sdpa"), (1, 0.7, "sdpa"), (1, 0.0, "flex")],
)
@pytest.mark.parametrize("kind", ["prefix", "dual"])
def test_equals_a_plain_sampler_with_old_keys(kind, shift, scale, attention):
    model = family("full", shift=shift)
    config = DecodingConfig(
        block_size=4, steps=3, max_tokens=14, stop_ids=STOPS, approximate_cache=kind, guidance_scale=scale
    )
    engine = Engine(model, attention=attention, page_size=8, max_batch_size=4, prefix_cache=attention == "sdpa")
    found = engine.generate(PROMPTS, config)
    exact = engine.generate(PROMPTS, replace(config, approximate_cache="none"))
    assert [t.response_ids for t in found] != [t.response_ids for t in exact]
    for prompt, trajectory in zip(PROMPTS, found, strict=True):
        hooks = hold_keys(model, kind, len(prompt), 4)
        try:
            ids, steps = plain_windows(model, prompt, config, trajectory.seed)
        finally:
            for hook in hooks:
                hook.remove()
        assert (trajectory.response_ids, trajectory.step_map) == (ids, steps)


@pytest.mark.parametrize(
    ("attention", "settings", "said"),
    [
        ("block", {}, "approximate_cache is for models in which every token sees every other"),
        ("full", {"blocks_in_flight": 2}, "approximate_cache with several blocks does not work"),
    ],
)
def test_where_it_does_not_work_is_one_line(attention, settings, said):
    model = family(attention) if attention == "full" else make_model()
    with pytest.raises(T3DError, match=said):
        Engine(model).generate([[7]], DecodingConfig(approximate_cache="dual", **settings))
