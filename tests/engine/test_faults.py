"""What a caller can get wrong, and what a model can: one clear line each, naming the prompt."""

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from t3d.decoding import DecodingConfig
from t3d.engine import Engine, FinishedEvent
from t3d.errors import T3DError
from tests.conftest import make_model

MASK = 63


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def tokenizer():
    """Letters a..z are tokens 0..25, and a token is its letter."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocab = {chr(ord("a") + i): i for i in range(26)} | {chr(ord("A") + i): 26 + i for i in range(26)}
    vocab |= {str(i): 52 + i for i in range(10)} | {"?": 62, "[MASK]": 63}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?", mask_token="[MASK]")


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[7], []], {}, "prompt 1 is empty"),
        ([[7], [8, MASK, 9]], {}, r"prompt 1 contains the mask token \(id 63\) at position 1"),
        ([[64]], {}, r"prompt 0 has a token id outside 0\.\.63"),
        ([[-1]], {}, r"prompt 0 has a token id outside"),
        (
            [[7] * 600],
            {},
            "prompt 0 has 600 tokens, with max_tokens = 256 856 positions, .* context is 512",
        ),
        (["abc"], {}, "prompt 0 is a string, but the engine has no tokenizer"),
        ("abc", {}, "prompts is one string"),
        ([[7]], {"steps": 5}, "steps = 5 is more than block_size = 4"),
        ([[7]], {"stop": ("x",)}, "stop strings need a tokenizer"),
    ],
)
def test_bad_requests_are_refused_before_any_work(model, prompts, settings, message):
    engine = Engine(model)
    with pytest.raises(T3DError, match=message):
        engine.stream(prompts, DecodingConfig(**settings))  # at the call, not at the first event
    assert engine.stats.forwards == 0


def test_counts_must_match(model):
    engine = Engine(model)
    with pytest.raises(T3DError, match="2 prompts but 1 decoding configs"):
        engine.generate([[7], [8]], [DecodingConfig()])
    with pytest.raises(T3DError, match="2 prompts but 3 seeds"):
        engine.generate([[7], [8]], seeds=[1, 2, 3])


def test_nothing_to_do_is_nothing(model):
    assert Engine(model).generate([]) == []


def test_a_request_that_can_never_fit_is_refused_with_its_numbers(model):
    engine = Engine(model, kv_cache_tokens=40)
    message = r"prompt 1 can come to 44 positions, but the cache holds 40"
    with pytest.raises(T3DError, match=message):
        engine.stream([[7] * 3, [8] * 24], DecodingConfig(max_tokens=20))


@pytest.mark.parametrize("name", ["max_batch_size", "kv_cache_tokens", "page_size", "prefill_tokens"])
def test_engine_settings_are_checked(model, name):
    with pytest.raises(T3DError, match=f"engine.{name} must be at least 1"):
        Engine(model, **{name: 0})


def test_unknown_attention_names_the_known(model):
    with pytest.raises(T3DError, match="attention is one of sdpa, flex"):
        Engine(model, attention="flash")


def test_nan_logits_name_the_sequence():
    model = make_model(seed=5)
    with torch.no_grad():
        model.model.embed_tokens.weight[11] = torch.nan
    prompts = [[7, 8], [9, 11, 10], [12]]
    with pytest.raises(T3DError, match=r"^prompt 1: the model's logits are not numbers .* at position 3, step 0"):
        Engine(model).generate(prompts, DecodingConfig(max_tokens=8, temperature=0.5))
    # the engine is fit for use afterwards, and the others were not to blame
    assert len(Engine(model).generate([prompts[0], prompts[2]], DecodingConfig(max_tokens=8))) == 2


def test_what_was_handed_out_before_an_error_is_whole():
    model = make_model(seed=5)
    with torch.no_grad():
        model.model.embed_tokens.weight[11] = torch.nan
    events = Engine(model, max_batch_size=1).stream([[7, 8], [11]], DecodingConfig(max_tokens=8, stop_ids=()))
    first = [next(events) for _ in range(4)]  # three blocks of prompt 0 and its end
    assert [e.trajectory.length for e in first if isinstance(e, FinishedEvent)] == [8]
    with pytest.raises(T3DError, match="prompt 1"):
        next(events)


def test_stops_at_any_stop_id_and_at_none_with_ignore_eos(model):
    engine = Engine(model)
    (free,) = engine.generate([[7, 8, 9]], DecodingConfig(max_tokens=40, stop_ids=(), temperature=1.0))
    for place in (1, 6):
        stop = free.response_ids[place]
        config = DecodingConfig(max_tokens=40, stop_ids=(MASK - 1, stop), temperature=1.0)
        (t,) = engine.generate([[7, 8, 9]], config)
        assert (t.length, t.finish_reason) == (free.response_ids.index(stop) + 1, "stop")
        assert (3 + len(t.response_ids)) == -(-(3 + t.length) // 4) * 4  # the whole last block is kept
        assert t.response_ids == free.response_ids[: len(t.response_ids)]
    model.generation_config.eos_token_id = [free.response_ids[2], 1]
    try:
        config = DecodingConfig(max_tokens=40, temperature=1.0)
        (t,) = engine.generate([[7, 8, 9]], config)
        assert t.finish_reason == "stop"
        (t,) = engine.generate([[7, 8, 9]], DecodingConfig(max_tokens=40, temperature=1.0, ignore_eos=True))
        assert t.finish_reason == "length"
    finally:
        model.generation_config.eos_token_id = 1


def test_a_stop_after_max_tokens_does_not_count(model):
    engine = Engine(model)
    (free,) = engine.generate([[7, 8, 9]], DecodingConfig(max_tokens=12, stop_ids=()))
    stop = free.response_ids[4]
    config = DecodingConfig(max_tokens=free.response_ids.index(stop), stop_ids=(stop,))
    (t,) = engine.generate([[7, 8, 9]], config)
    assert (t.length, t.finish_reason) == (config.max_tokens, "length")


def test_text_and_stop_strings(model, tokenizer):
    engine = Engine(model, tokenizer)
    config = DecodingConfig(max_tokens=30, stop_ids=(), temperature=1.0)
    (free,) = engine.generate(["abc"], config)
    assert free.prompt_ids == [0, 1, 2]
    assert free.text == tokenizer.decode(free.response_ids[:30])
    assert len(free.text) == 30
    stop = free.text[6:9]  # spans two blocks of four, the first of which starts at position 3
    (t,) = engine.generate(["abc"], DecodingConfig(max_tokens=30, stop_ids=(), stop=(stop,), temperature=1.0))
    assert t.finish_reason == "stop"
    assert t.text == free.text[: free.text.index(stop) + 3]
    assert t.length == len(t.text)
