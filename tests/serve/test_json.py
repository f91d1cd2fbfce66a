"""Answers in JSON through OpenAI's client; `tests/engine/test_constrained.py` has all schemas and strategies."""

import json

import jsonschema
import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

from tests.serve.test_openai import MESSAGES


class Person(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=5)
    age: int = Field(ge=0, le=120)
    tall: bool


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_schema_whole_and_as_a_stream(client):
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": Person.model_json_schema()}}
    ask = {"model": "tiny", "messages": MESSAGES, "max_tokens": 150, "response_format": schema, "n": 3}
    ask |= {"temperature": 0.8, "seed": 2, "extra_body": {"steps": 2, "return_details": True}}
    choices = client.chat.completions.create(**ask).choices
    ended = [c for c in choices if c.finish_reason == "stop"]
    assert len(ended) > 1
    for choice in ended:
        Person.model_validate_json(choice.message.content)
        assert choice.t3d["tpf"] > 1.4
    texts = dict.fromkeys(range(3), "")
    for chunk in client.chat.completions.create(**ask, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == {c.index: c.message.content for c in choices}


def test_any_object(client):
    ask = {"model": "tiny", "prompt": "abc", "max_tokens": 60, "temperature": 1.0}
    for seed in range(4):
        extra = {"response_format": {"type": "json_object"}}
        (choice,) = client.completions.create(**ask, seed=seed, extra_body=extra).choices
        if choice.finish_reason == "stop":
            jsonschema.validate(json.loads(choice.text), {"type": "object"})
        else:
            assert choice.text.lstrip()[:1] in ("", "{")
    plain = client.completions.create(**ask, seed=1).choices[0].text
    text = {"response_format": {"type": "text"}}
    assert client.completions.create(**ask, seed=1, extra_body=text).choices[0].text == plain


@pytest.mark.parametrize(
    ("schema", "extra", "said"),
    [
        ({"type": "foo"}, {}, "the JSON schema cannot be kept to: Invalid type: foo"),
        ({}, {"strategy": "entropy"}, "works with strategy"),
        ({}, {"ignore_eos": True}, "stop token"),
        ({}, {"stop_ids": [70]}, "leave stop_ids out"),
    ],
)
def test_what_cannot_be_is_said(client, schema, extra, said):
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match=said):
        client.chat.completions.create(model="tiny", messages=MESSAGES, response_format=schema, extra_body=extra)
