"""Whatever is sent: never a 5xx, always an answer in the right form, and the server stays up."""

import json
import socket
from dataclasses import fields

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from t3d.decoding.policy import POLICIES
from t3d.serve.schema import IGNORED, UNSUPPORTED, ChatBody, CompletionBody

MODELS = {"/v1/chat/completions": ChatBody, "/v1/completions": CompletionBody}
BASE = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
    "/v1/completions": {"prompt": "a"},
}
SLOW = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-2, 5),
    st.floats(),
    st.floats(0, 1),
    st.text(max_size=8),
    st.sampled_from(["one", "sampling", "random", "adaptive", "tiny", "broken", "\ud800", "<|mask|>", "\x00", "user"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def http(server):
    with httpx2.Client(base_url=server.url, timeout=60) as client:
        yield client


def check(response) -> None:
    """A success is an OpenAI object or stream; a refusal says why."""
    assert response.status_code in (200, 400, 404, 429), (response.status_code, response.text)
    if response.status_code == 200:
        if response.headers["content-type"].startswith("text/event-stream"):
            assert response.text.endswith("data: [DONE]\n\n")
        else:
            assert response.json()["choices"]
        return
    error = response.json()["error"]
    assert error["message"]
    assert error["message"].isprintable()
    assert error["type"] == ("rate_limit_error" if response.status_code == 429 else "invalid_request_error")


def encode(body) -> bytes:
    return json.dumps(body).encode()  # with NaN and Infinity, as some clients do


@pytest.mark.parametrize("path", MODELS)
def test_any_value_in_any_field(http, path):
    names = sorted({*MODELS[path].model_fields, *UNSUPPORTED, *IGNORED, "nonsense"})

    @settings(SLOW, max_examples=60)
    @given(st.dictionaries(st.sampled_from(names), values, max_size=4))
    def run(some):
        body = BASE[path] | {"max_tokens": 6} | some
        limit = body.get("max_completion_tokens", body["max_tokens"])
        if (isinstance(limit, int) and limit > 64) or limit is None:
            body["max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"] = (
                20000  # refused, not slow
            )
        check(http.post(path, content=encode(body), headers={"content-type": "application/json"}))

    run()


def within_bounds(f) -> st.SearchStrategy:
    """Values of a policy's setting that it says it takes."""
    if f.metadata["choices"]:
        return st.sampled_from(f.metadata["choices"])
    low, high = max(f.metadata["low"], -(10**9)), min(f.metadata["high"], 10**9)
    return st.integers(int(low), int(high)) if isinstance(f.default, int) else st.floats(low, high)


@pytest.mark.parametrize("path", MODELS)
def test_valid_settings_are_decoded(http, path):
    """Every combination of settings in their ranges gives an answer; nothing here may be refused."""
    given_fields = {
        "temperature": st.just(0) | st.floats(1e-4, 2),
        "top_p": st.floats(1e-6, 1),
        "top_k": st.integers(0, 1000),
        "n": st.integers(1, 3),
        "stop": st.text(min_size=1, max_size=3) | st.lists(st.text(min_size=1, max_size=3), max_size=4),
        "seed": st.integers(-(1 << 63), (1 << 63) - 1),
        "stream": st.booleans(),
        "block_size": st.integers(4, 64),
        "steps": st.integers(1, 4),
        "strategy": st.sampled_from(list(POLICIES)),
        "confidence": st.sampled_from(["untempered", "sampling"]),
        "stop_ids": st.lists(st.integers(0, 1 << 30), max_size=3),
        "ignore_eos": st.booleans(),
        "return_details": st.booleans(),
    } | {f.name: within_bounds(f) for policy in POLICIES.values() for f in fields(policy)}

    @settings(SLOW, max_examples=40)
    @given(st.fixed_dictionaries({}, optional=given_fields))
    def run(body):
        response = http.post(path, json=BASE[path] | {"max_tokens": 12} | body)
        assert response.status_code == 200, response.text
        check(response)

    run()


@settings(SLOW, max_examples=40)
@given(st.one_of(st.binary(max_size=60), values.map(encode), st.text(max_size=30).map(str.encode)))
def test_any_body(http, body):
    for path in MODELS:
        check(http.post(path, content=body, headers={"content-type": "application/json"}))


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
        b'{"prompt": "a", "seed": 1' + b"0" * 10_000 + b"}",
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "\\udfff": 1}',
        b'{"prompt": "a", "stream_options": {"\\ud800": 1}, "stream": true}',
        b'{"prompt": "a", "prompt": []}',
        b'{"prompt": [[]]}',
        b'{"prompt": [[-1]]}',
        b'{"prompt": [99999999999999999999]}',
        b'\xff\xfe{\x00"\x00',
        b"\xef\xbb\xbf{}",
        b"",
        b"null",
    ],
)
def test_hostile_bodies(http, body):
    response = http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    check(response)


@settings(SLOW, max_examples=40)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_on_the_wire(server, http, data, request_line):
    """Not HTTP, or half of it, and gone."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall((b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n" if request_line else b"") + data)
    assert http.get("/health").json() == {"status": "ok"}


def test_nothing_is_left(http):
    import re

    text = http.get("/metrics").text
    for name in ("t3d_sequences_running", "t3d_sequences_waiting", "t3d_kv_cache_tokens"):
        found = re.findall(rf"^{name}\{{.*\}} (\S+)$", text, re.M)
        assert len(found) == 2
        assert set(found) == {"0.0"}
