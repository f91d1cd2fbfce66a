"""Answers in JSON: whatever the model, the strategy and the others in the batch, they keep to their schema."""

import json
from dataclasses import replace

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from t3d.decoding import DecodingConfig
from t3d.decoding.constrained import Grammar, check, grammar_tokenizer
from t3d.engine import Engine, FailedEvent, FinishedEvent
from t3d.engine.intake import make_requests
from t3d.errors import T3DError
from tests.conftest import make_model
from tests.serve.conftest import byte_tokenizer

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 4}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}

plain = st.sampled_from(
    [
        {"type": "boolean"},
        {"type": "null"},
        {"type": "integer", "minimum": -5, "maximum": 120},
        {"type": "string", "maxLength": 3},
        {"type": "string", "pattern": "^[a-c]{1,3}$"},
        {"enum": ["red", "grün", 7, None]},
        {"const": {"a": [1]}},
    ]
)


def larger(inner):
    names = st.lists(st.sampled_from(["a", "b", "ä c", '"']), max_size=3, unique=True)
    several = st.lists(inner, min_size=3, max_size=3)
    return (
        st.builds(
            lambda of, n: {"type": "array", "items": of, "minItems": n % 2, "maxItems": n}, inner, st.integers(0, 2)
        )
        | st.builds(lambda of: {"anyOf": of}, st.lists(inner, min_size=1, max_size=2))
        | st.builds(
            lambda keys, of, n: {
                "type": "object",
                "properties": dict(zip(keys, of, strict=False)),
                "required": keys[:n],
                "additionalProperties": False,
            },
            names,
            several,
            st.integers(0, 3),
        )
    )


schemas = st.recursive(plain, larger, max_leaves=4)


@pytest.fixture(scope="module")
def engine():
    tokenizer = byte_tokenizer()
    model = make_model(vocab_size=len(tokenizer) + 5, eos_token_id=tokenizer.eos_token_id, max_position_embeddings=2048)
    model.config.mask_token_id = tokenizer.mask_token_id
    return Engine(model, tokenizer)


@pytest.fixture(scope="module")
def tokens(engine):
    return grammar_tokenizer(engine.tokenizer, engine.model.config.vocab_size)


def decode(engine, prompts, configs, grammars, logprobs=None):
    requests = make_requests(prompts, configs, None, None, engine.model, engine.tokenizer, logprobs)
    requests = [replace(r, grammar=g) for r, g in zip(requests, grammars, strict=True)]
    session, found = engine.open(requests), {}
    for request in requests:
        session.add(request)
    while not session.done:
        for event in session.step(isolate=True):
            if isinstance(event, FinishedEvent):
                found[event.index] = event.trajectory
            elif isinstance(event, FailedEvent):
                found[event.index] = event.error
    return [found[index] for index in range(len(prompts))]


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    wanted=st.lists(schemas, min_size=1, max_size=3),
    strategy=st.sampled_from(
        [
            {"steps": 1},
            {"steps": 3},
            {"strategy": "prefix", "threshold": 0.5},
            {"strategy": "low_confidence_dynamic", "threshold": 0.1},
            {"strategy": "low_confidence_dynamic", "threshold": 0.9, "floor": "schedule", "steps": 4},
        ]
    ),
    temperature=st.sampled_from([0.0, 1.0, 2.0]),
    block_size=st.sampled_from([4, 8, 16]),
    seed=st.integers(0, 1000),
)
def test_whatever_the_model_says_the_answer_keeps_to_its_schema(
    engine, tokens, wanted, strategy, temperature, block_size, seed
):
    """And who asks for none has the answer that it has alone."""
    config = DecodingConfig(block_size=block_size, max_tokens=64, temperature=temperature, seed=seed, **strategy)
    prompts = ["abc"[: 1 + n] for n in range(len(wanted))] + ["free"]
    grammars = [*(Grammar.of_schema(schema, tokens) for schema in wanted), None]
    *kept, free = decode(engine, prompts, config, grammars)
    for trajectory, schema in zip(kept, wanted, strict=True):
        ids = trajectory.response_ids[: trajectory.length]
        if trajectory.finish_reason == "stop":
            assert ids[-1] == engine.tokenizer.eos_token_id
            jsonschema.validate(json.loads(trajectory.text), schema)
        else:
            assert trajectory.length == 64
            matcher = llguidance(Grammar.of_schema(schema, tokens))
            assert matcher.validate_tokens(ids) == 64  # what is there can still become an answer
    assert free.response_ids == decode(engine, prompts, config, [None] * len(prompts))[-1].response_ids


def llguidance(grammar):
    from llguidance import LLMatcher

    return LLMatcher(grammar.tokenizer, grammar.text)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_several_tokens_per_forward_and_nothing_left_of_a_mask(engine, tokens, temperature):
    grammar = Grammar.of_schema(PERSON, tokens)
    config = DecodingConfig(block_size=8, max_tokens=200, temperature=temperature, seed=2)
    for settings_, most in (({"steps": 2}, 4), ({"strategy": "low_confidence_dynamic", "threshold": 0.05}, 8)):
        (trajectory,) = decode(engine, ["abcde"], replace(config, **settings_), [grammar], logprobs=2)
        assert trajectory.length / trajectory.nfe.denoise > 1.5
        steps = np.array(trajectory.step_map)
        for first in range(3, trajectory.length - 8, 8):  # the prompt's tail has five places; the last one is filled up
            block = steps[first : first + 8].tolist()
            assert block == sorted(block)
            assert max(map(block.count, block)) <= most
        jsonschema.validate(json.loads(trajectory.text), PERSON)
        assert len(trajectory.logprobs) == len(steps)
        assert np.isfinite(trajectory.logprobs.token).all()


def test_the_first_token_is_the_likeliest_that_the_grammar_takes(engine, tokens):
    """By the model's own forward of the masked block."""
    from tests.engine.reference import reference_logits

    grammar = Grammar.of_schema({"enum": [True, 12]}, tokens)
    (trajectory,) = decode(engine, [[70, 71, 72, 73]], DecodingConfig(block_size=4, max_tokens=8), [grammar])
    with torch.no_grad():
        logits = reference_logits(engine.model, [70, 71, 72, 73, *[engine.model.config.mask_token_id] * 4], 4)[4]
    able = engine.tokenizer.convert_tokens_to_ids(["t", "1"])
    best = max(able, key=lambda token: float(logits[token]))
    assert trajectory.response_ids[0] == best
    assert trajectory.confidence[0] == pytest.approx(float(logits[able].softmax(-1).max()), abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"strategy": "entropy"},
            "works with strategy low_confidence_static, sequential, low_confidence_dynamic, prefix, not 'entropy'",
        ),
        ({"blocks_in_flight": 2}, "blocks_in_flight"),
        ({"flight": "look_ahead"}, "flight"),
        ({"window": 2}, "window"),
        ({"stop_ids": ()}, "stop token"),
    ],
)
def test_settings_that_do_not_go_together(changes, said):
    with pytest.raises(T3DError, match=said):
        check(replace(DecodingConfig(stop_ids=(1,)), **changes))


@pytest.mark.parametrize(
    "schema", [{"type": "foo"}, {"$ref": "#/nope"}, {"type": "string", "pattern": "(?<=a)b"}, {"enum": []}, {"not": {}}]
)
def test_schemas_that_cannot_be_kept_to(tokens, schema):
    with pytest.raises(T3DError, match=r"^the JSON schema cannot be kept to: [^\n]+$"):
        Grammar.of_schema(schema, tokens)


def test_without_the_extra(engine, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "llguidance.hf", None)
    with pytest.raises(T3DError, match=r"pip install 't3d\[json\]'"):
        grammar_tokenizer(engine.tokenizer, 300)
