"""A model of every family, served as any other."""

import json
import urllib.request

import pytest

from t3d import DecodingConfig, Engine
from t3d.models import FAMILIES, save_model
from t3d.models.recommended import recommended
from tests.conftest import make_model
from tests.serve.conftest import byte_tokenizer


@pytest.fixture(scope="module")
def models():
    ids = byte_tokenizer()
    size, tokens = len(ids), {"eos_token_id": ids.eos_token_id}
    made = {family: make_model(family=family, vocab_size=size, **tokens) for family in FAMILIES}
    return made | {"shifted": make_model(family="block_llama", vocab_size=size, logits_shift=1, **tokens)}


def post(server, body: dict) -> str:
    asked = json.dumps(body).encode()
    request = urllib.request.Request(f"{server.url}/v1/completions", asked, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return response.read().decode()


def test_every_family_answers_as_offline(start, models, tmp_path):
    tokenizer = byte_tokenizer()
    for name, model in models.items():
        save_model(model, tmp_path / name, tokenizer)
    server = start(*(f"{name}={tmp_path / name}" for name in models), "--kv-cache-tokens", "2048")
    for name, model in models.items():
        asked = {"model": name, "prompt": "the answer", "max_tokens": 12, "temperature": 0}
        text = json.loads(post(server, asked))["choices"][0]["text"]
        stream = post(server, asked | {"stream": True, "stream_steps": True}).split("\n\n")
        chunks = [json.loads(line[6:])["choices"][0] for line in stream if line.startswith("data: {")]
        written = {}
        for step in (chunk["t3d"] for chunk in chunks if "t3d" in chunk):
            written |= dict(zip(step["places"], step["token_ids"], strict=True))
        (offline,) = Engine(model, tokenizer).generate(
            ["the answer"], DecodingConfig(**recommended(model), max_tokens=12)
        )
        assert text == offline.text == "".join(chunk["text"] for chunk in chunks)
        assert [written[place] for place in range(offline.length)] == offline.response_ids[: offline.length]
