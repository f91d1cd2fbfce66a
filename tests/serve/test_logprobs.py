"""Log-probabilities, the prompt given back, and tokens of texts: OpenAI's and vLLM's forms, the engine's numbers."""

import httpx2
import openai
import pytest

from t3d.decoding import DecodingConfig
from tests.serve.test_openai import CHAT, MESSAGES


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def http(server):
    with httpx2.Client(base_url=server.url, timeout=60) as client:
        yield client


def expected(offline, prompt, top, **settings):
    (trajectory,) = offline.generate([prompt], DecodingConfig(**settings), logprobs=top)
    return trajectory, trajectory.logprobs[: trajectory.length]


@pytest.mark.parametrize(
    "extra", [{}, {"blocks_in_flight": 3, "strategy": "low_confidence_dynamic", "threshold": 0.1}, {"steps": 2}]
)
def test_of_a_chat(client, offline, extra):
    sampling = {"temperature": 1.2, "seed": 5}
    trajectory, noted = expected(offline, CHAT, 3, max_tokens=30, **sampling, **extra)
    ask = {"model": "tiny", "messages": MESSAGES, "max_tokens": 30, "extra_body": extra} | sampling
    (choice,) = client.chat.completions.create(**ask, logprobs=True, top_logprobs=3).choices
    assert choice.message.content == trajectory.text
    content = choice.logprobs.content
    assert [one.logprob for one in content] == pytest.approx(noted.token.tolist(), abs=1e-4)
    for one, ids, values in zip(content, noted.ids.tolist(), noted.values.tolist(), strict=True):
        assert [other.logprob for other in one.top_logprobs] == pytest.approx(values, abs=1e-4)
        assert len({other.token for other in one.top_logprobs}) == 3  # also where they are halves of characters
        tokens = [bytes(other.bytes).decode(errors="replace") for other in one.top_logprobs]
        assert tokens == [offline.tokenizer.decode([token]) for token in ids]
    whole = b"".join(bytes(one.bytes) for one in content if not one.token.startswith("<|"))
    assert whole.decode(errors="replace") == choice.message.content
    alone = client.chat.completions.create(**ask, logprobs=True).choices[0].logprobs.content
    assert [(one.token, one.top_logprobs) for one in alone] == [(one.token, []) for one in content]
    assert client.chat.completions.create(**ask).choices[0].logprobs is None
    parts = [
        chunk.choices[0].logprobs
        for chunk in client.chat.completions.create(**ask, logprobs=True, top_logprobs=3, stream=True)
    ]
    assert [one for part in parts if part for one in part.content] == content


@pytest.mark.parametrize("echo", [False, True])
def test_of_completions(client, offline, echo):
    prompts, settings = ["Zwölf 😀", "abc"], {"max_tokens": 24, "stop": ["q"], "seed": 3, "temperature": 1.0}
    ask = {"model": "tiny", "prompt": prompts, "echo": echo, "logprobs": 2, "n": 2} | settings
    choices = client.completions.create(**ask).choices
    want = offline.generate(prompts, DecodingConfig(n=2, **settings), logprobs=2)
    for choice, trajectory in zip(choices, want, strict=True):
        prompt, n = prompts[choice.index // 2], len(trajectory.prompt_ids) * echo
        told, noted = choice.logprobs, trajectory.logprobs[: trajectory.length]
        assert choice.text == (prompt if echo else "") + trajectory.text.partition("q")[0]
        assert told.token_logprobs[:n] == told.top_logprobs[:n] == [None] * n  # what was given was not predicted
        assert told.token_logprobs[n:] == pytest.approx(noted.token.tolist(), abs=1e-4)
        ids = [*trajectory.prompt_ids * echo, *trajectory.response_ids[: trajectory.length]]
        assert len(told.tokens) == len(told.text_offset) == len(ids)
        for place, (top, token) in enumerate(zip(told.top_logprobs[n:], told.tokens[n:], strict=True)):
            assert top[token] == told.token_logprobs[n + place]
            assert 2 <= len(top) <= 3
            assert max(top.values()) == pytest.approx(noted.values[place, 0], abs=1e-4)
        for token, offset in zip(told.tokens, told.text_offset, strict=True):
            if token.isascii() and len(token) == 1 and offset < len(choice.text):
                assert choice.text[offset] == token
    texts, tokens = dict.fromkeys(range(4), ""), {n: [] for n in range(4)}
    for chunk in client.completions.create(**ask, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens if choice.logprobs else []
    assert texts == {choice.index: choice.text for choice in choices}
    assert tokens == {choice.index: choice.logprobs.tokens for choice in choices}


def test_the_prompt_comes_back_alone(client):
    plain = client.completions.create(model="tiny", prompt=[70, 71, 72], max_tokens=9).choices[0]
    choice = client.completions.create(model="tiny", prompt=[70, 71, 72], max_tokens=9, echo=True).choices[0]
    assert choice.text == "ghi" + plain.text
    assert choice.logprobs is None


def test_tokens_of_a_text(http, offline):
    text = "the Käse 😀<|end|>"
    got = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    ids = offline.tokenizer.encode(text, add_special_tokens=False)
    assert got["tokens"] == ids
    assert (got["count"], got["max_model_len"]) == (len(ids), 16384)
    assert got["token_strs"] == offline.tokenizer.convert_ids_to_tokens(ids)
    assert http.post("/detokenize", json={"model": "tiny", "tokens": ids}).json() == {"prompt": text}
    assert http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


def test_tokens_of_a_chat(http, client, offline):
    got = http.post("/tokenize", json={"model": "tiny", "messages": MESSAGES}).json()
    assert got["tokens"] == offline.tokenizer.encode(CHAT, add_special_tokens=False)
    assert got["token_strs"] is None
    usage = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=1).usage
    assert usage.prompt_tokens == got["count"]
    body = {"messages": MESSAGES, "add_generation_prompt": False}
    assert http.post("/tokenize", json=body).json()["count"] == got["count"] - len("assistant: ")


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/tokenize", {}, "give either prompt or messages"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "give either prompt or messages"),
        ("/tokenize", {"prompt": "\ud800"}, "surrogate"),
        ("/tokenize", {"prompt": "a", "return_token_str": True}, "return_token_str"),
        ("/detokenize", {"tokens": [264]}, "token ids of tiny lie in 0..262, got 264"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [0], "model": "gpt-4"}, "does not exist"),
    ],
)
def test_what_is_wrong_is_said(http, path, body, said):
    import json

    headers = {"content-type": "application/json"}
    response = http.post(path, content=json.dumps(body).encode(), headers=headers)
    assert response.status_code == (404 if "exist" in said else 400)
    assert said in response.json()["error"]["message"]
