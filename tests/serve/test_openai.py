"""OpenAI's own client against the running server; answers equal those of the engine without a server."""

import asyncio

import openai
import pytest

from t3d.decoding import DecodingConfig

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Wie spät ist es? 😀"}]
CHAT = "system: Be brief.<|end|>user: Wie spät ist es? 😀<|end|>assistant: "


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny", "broken"]
    model = client.models.retrieve("tiny")
    assert (model.object, model.owned_by) == ("model", "t3d")
    assert model.t3d["block_size"] == 4
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("tinny")
    assert error.value.code == "model_not_found"


@pytest.mark.parametrize("temperature", [None, 0.9])
def test_chat_equals_offline(client, offline, temperature):
    """Greedy where nothing is said."""
    sampling = {} if temperature is None else {"temperature": temperature, "top_p": 0.8, "seed": 11}
    config = DecodingConfig(max_tokens=40, **sampling)
    (expected,) = offline.generate([CHAT], config)
    got = client.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=40, **sampling)
    assert got.object == "chat.completion"
    (choice,) = got.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == expected.text
    assert choice.finish_reason == expected.finish_reason
    assert got.usage.prompt_tokens == len(expected.prompt_ids)
    assert got.usage.completion_tokens == expected.length
    assert got.usage.total_tokens == len(expected.prompt_ids) + expected.length
    assert got._request_id.startswith("req_")


def test_prompts_samples_and_seed_equal_offline(client, offline):
    prompts = ["Once", "upon a time", "x"]
    config = DecodingConfig(max_tokens=25, n=3, temperature=1.2, top_k=30, seed=5, steps=2, stop=("q", "th"))
    expected = offline.generate(prompts, config)
    extra = {"steps": 2, "top_k": 30, "return_details": True}
    got = client.completions.create(
        model="tiny", prompt=prompts, n=3, temperature=1.2, seed=5, max_tokens=25, stop=["q", "th"], extra_body=extra
    )
    assert [c.index for c in got.choices] == list(range(9))
    for choice, trajectory in zip(got.choices, expected, strict=True):
        text = trajectory.text
        for stop in config.stop:
            text = text.partition(stop)[0]
        assert choice.text == text
        assert choice.finish_reason == trajectory.finish_reason
        n = trajectory.length
        assert choice.t3d["token_ids"] == trajectory.response_ids[:n]
        assert choice.t3d["step_map"] == trajectory.step_map[:n]
        assert choice.t3d["confidence"] == pytest.approx(trajectory.confidence[:n], abs=1e-4)
        assert choice.t3d["nfe"]["total"] == trajectory.nfe.total
        assert choice.t3d["tpf"] == pytest.approx(n / trajectory.nfe.denoise, abs=1e-4)
        assert len(choice.t3d["tokens"]) == n
    assert got.usage.completion_tokens == sum(t.length for t in expected)
    assert got.usage.prompt_tokens == sum(len(t.prompt_ids) for t in expected[::3])
    assert any(t.finish_reason == "stop" for t in expected)


def test_the_turns_before_the_last_are_found(client):
    """In whole pages of 32 positions."""
    messages, found = [{"role": "user", "content": "a question that nobody else asks here, " * 4}], []
    for _ in range(3):
        got = client.chat.completions.create(model="tiny", messages=messages, max_tokens=40, n=2)
        usage = got.usage
        found.append((usage.prompt_tokens_details.cached_tokens, usage.prompt_tokens))
        assert got.choices[0].message.content == got.choices[1].message.content  # greedy
        messages += [{"role": "assistant", "content": got.choices[0].message.content}, {"role": "user", "content": "?"}]
    assert found[0][0] <= 32  # what all chats begin with
    for (cached, prompt), (_, before) in zip(found[1:], found, strict=False):
        assert before - 32 <= cached <= prompt
        assert cached % 32 == 0


def test_prompts_as_token_ids(client, offline):
    (expected,) = offline.generate([[70, 71, 72]], DecodingConfig(max_tokens=16))
    for prompt in ([70, 71, 72], [[70, 71, 72]]):
        got = client.completions.create(model="tiny", prompt=prompt)
        assert got.choices[0].text == expected.text
        assert got.usage.completion_tokens == expected.length  # 16 at most, where nothing is said


def test_without_a_seed_answers_differ_and_can_be_repeated(client):
    extra = {"return_details": True}
    settings = {"model": "tiny", "prompt": "abc", "temperature": 1.5, "max_tokens": 30}
    first, second = (client.completions.create(**settings, extra_body=extra) for _ in range(2))
    assert first.choices[0].text != second.choices[0].text
    again = client.completions.create(**settings, seed=first.choices[0].t3d["seed"])
    assert again.choices[0].text == first.choices[0].text


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"n": 3, "temperature": 1.0, "seed": 4},
        {"stop": ["e"], "temperature": 1.3, "seed": 6, "n": 2},
        {"extra_body": {"strategy": "low_confidence_dynamic", "threshold": 0.2, "block_size": 8}},
        {"extra_body": {"strategy": "low_confidence_dynamic", "threshold": 0.2, "blocks_in_flight": 3}},
        {"extra_body": {"flight": "look_ahead", "depth": 2, "steps": 2}},
        {"extra_body": {"strategy": "token_editing", "guidance_scale": 0.5}},
    ],
)
def test_a_stream_joins_to_the_whole_answer(client, settings):
    settings = {"model": "tiny", "messages": MESSAGES, "max_tokens": 50} | settings
    whole = client.chat.completions.create(**settings)
    texts, finish, pieces, usage = {}, {}, 0, None
    stream = client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True})
    for chunk in stream:
        assert chunk.object == "chat.completion.chunk"
        usage = chunk.usage or usage
        for choice in chunk.choices:
            assert choice.index not in finish  # nothing comes after the end
            if choice.index not in texts:
                assert choice.delta.role == "assistant"
                texts[choice.index] = ""
            texts[choice.index] += choice.delta.content or ""
            pieces += bool(choice.delta.content)
            if choice.finish_reason:
                finish[choice.index] = choice.finish_reason
    assert texts == {c.index: c.message.content for c in whole.choices}
    assert finish == {c.index: c.finish_reason for c in whole.choices}
    found = usage.prompt_tokens_details
    assert found.cached_tokens >= whole.usage.prompt_tokens_details.cached_tokens  # the same prompt for a second time
    assert usage == whole.usage.model_copy(update={"prompt_tokens_details": found})
    if usage.completion_tokens > 40:  # an answer that did not stop early
        assert pieces > 4 * len(texts)  # block by block


def test_a_stream_of_completions(client):
    settings = {"model": "tiny", "prompt": ["ab", "cd"], "max_tokens": 30}
    whole = client.completions.create(**settings)
    texts, usages = {0: "", 1: ""}, []
    for chunk in client.completions.create(**settings, stream=True):
        assert chunk.object == "text_completion"
        usages.append(chunk.usage)
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == {c.index: c.text for c in whole.choices}
    assert not any(usages)  # not asked for


def test_steps_can_be_watched(client):
    """The steps' tokens are the answer's, each told once, and the last chunk has the details."""
    extra = {"stream_steps": True, "return_details": True, "steps": 3}
    told, last = {}, None
    for chunk in client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=22, stream=True, extra_body=extra
    ):
        (choice,) = chunk.choices
        if choice.finish_reason:
            last = choice.t3d
        elif "places" in (choice.t3d or {}):
            d = choice.t3d
            told |= {p: (i, d["step"]) for p, i in zip(d["places"], d["token_ids"], strict=True)}
    n = len(last["token_ids"])
    assert [told[i] for i in range(n)] == list(zip(last["token_ids"], last["step_map"], strict=True))


def test_many_clients_at_once_equal_offline(server, offline):
    """Continuous batching: requests of all kinds and lengths, more than a batch holds, none notices the others."""
    cases = []
    for i in range(40):
        settings = {"max_tokens": 5 + 7 * (i % 9), "temperature": [0, 1.0][i % 2], "seed": i}
        cases.append((f"{'ab' * (i % 13)}{i}", settings, {"steps": 1 + i % 4}))
    expected = [
        offline.generate([prompt], DecodingConfig(**settings, **extra))[0].text for prompt, settings, extra in cases
    ]

    async def one(client, prompt, settings, extra, stream: bool) -> str:
        got = await client.completions.create(model="tiny", prompt=prompt, **settings, stream=stream, extra_body=extra)
        if not stream:
            return got.choices[0].text
        return "".join([chunk.choices[0].text async for chunk in got])

    async def everyone():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client, *case, i % 3 > 0) for i, case in enumerate(cases)))

    assert asyncio.run(everyone()) == expected


def test_a_request_that_fails_leaves_the_others_alone(server, client):
    good = {"model": "broken", "prompt": "abc", "max_tokens": 200, "extra_body": {"ignore_eos": True}}
    alone = client.completions.create(**good).choices[0].text

    async def together():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as c:
            bad = c.completions.create(model="broken", prompt="xyz")
            return await asyncio.gather(c.completions.create(**good), bad, return_exceptions=True)

    answer, error = asyncio.run(together())
    assert answer.choices[0].text == alone
    assert isinstance(error, openai.InternalServerError)
    assert "logits are not numbers" in str(error)
    with pytest.raises(openai.APIError, match="logits are not numbers"):
        list(client.completions.create(model="broken", prompt="xyz", stream=True))
    assert client.completions.create(**good).choices[0].text == alone


@pytest.mark.parametrize(
    ("settings", "code", "said"),
    [
        ({"model": "gpt-4"}, "model_not_found", "'gpt-4' does not exist; there is tiny, broken"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"temperature": 3}, "invalid_value", "temperature"),
        ({"temperature": 1e-9}, "invalid_value", "at least 0.0001"),
        ({"top_p": 0}, "invalid_value", "top_p"),
        ({"n": 0}, "invalid_value", "n: "),
        ({"n": 128, "max_tokens": 8, "extra_body": {"steps": 9}}, None, "steps = 9 is more than block_size = 4"),
        ({"stop": [""]}, "invalid_value", "stop"),
        ({"stop": ["a"] * 17}, "invalid_value", "16 stop strings"),
        ({"max_tokens": 20000}, "context_length_exceeded", "maximum context length is 16384 tokens"),
        ({"messages": [{"role": "user", "content": "a" * 17000}]}, "context_length_exceeded", "17018 in the messages"),
        ({"messages": [{"role": "user", "content": "<|mask|>"}]}, None, "contains the mask token"),
        ({"messages": [{"role": "tool", "content": "a", "tool_call_id": "b"}]}, "invalid_value", "messages.0.role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}]},
            "invalid_value",
            "messages.0.content",
        ),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "unsupported_parameter", "'tools'"),
        ({"logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs"),
        ({"top_logprobs": 2}, "invalid_value", "only for logprobs = true"),
        ({"frequency_penalty": 0.5}, "unsupported_parameter", "'frequency_penalty'"),
        ({"response_format": {"type": "xml"}}, "invalid_value", "response_format"),
        ({"extra_body": {"step": 1}}, "unknown_parameter", "step (did you mean 'steps'?)"),
        ({"extra_body": {"strategy": "low_confidence"}}, None, "unknown strategy 'low_confidence'"),
        ({"extra_body": {"block_size": 65}}, None, "block_size must be at most 64"),
        ({"extra_body": {"stream_steps": True}}, "invalid_value", "only for stream"),
    ],
)
def test_what_is_wrong_is_said(client, settings, code, said):
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as error:
        client.chat.completions.create(**{"model": "tiny", "messages": MESSAGES} | settings)
    assert error.value.code == code
    assert said in error.value.body["message"]
    assert error.value.type == "invalid_request_error"


def test_parameters_that_ask_for_nothing_are_accepted(client):
    plain = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=9)
    got = client.chat.completions.create(
        model="tiny",
        messages=[
            {**MESSAGES[0], "name": "x"},
            {"role": "user", "content": [{"type": "text", "text": MESSAGES[1]["content"]}]},
        ],
        max_tokens=9,
        frequency_penalty=0,
        presence_penalty=0.0,
        logit_bias={},
        logprobs=False,
        response_format={"type": "text"},
        tools=[],
        user="me",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
    )
    assert got.choices[0].message.content == plain.choices[0].message.content


def test_every_setting_of_policies_and_flights_can_be_asked_for(client, offline):
    """And changes what it should: several blocks in flight other tokens, look-ahead only the forwards."""
    (plain,) = offline.generate([[70, 71, 72]], DecodingConfig(max_tokens=24, steps=2))

    def ask(**extra):
        extra |= {"return_details": True, "steps": 2}
        return client.completions.create(model="tiny", prompt=[70, 71, 72], max_tokens=24, extra_body=extra).choices[0]

    ahead = ask(flight="look_ahead", depth=2)
    assert ahead.t3d["token_ids"] == plain.response_ids[: plain.length]
    assert ahead.t3d["nfe"]["denoise"] <= plain.nfe.denoise
    several = ask(blocks_in_flight=3, enter=0.25, force=0.5)
    (want,) = offline.generate(
        [[70, 71, 72]], DecodingConfig(max_tokens=24, steps=2, blocks_in_flight=3, enter=0.25, force=0.5)
    )
    assert several.t3d["token_ids"] == want.response_ids[: want.length]


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"flight": "look_ahaed"}, "did you mean 'look_ahead'"),
        ({"depht": 2}, "did you mean 'depth'"),
        ({"flight": "look_ahead", "depth": 4}, "depth"),
        ({"flight": "look_ahead", "blocks_in_flight": 2}, "look_ahead has depth"),
        ({"blocks_in_flight": "two"}, "blocks_in_flight"),
        ({"negative_prompt": "no"}, "guidance_scale"),
    ],
)
def test_wrong_settings_are_the_clients_fault(client, extra, said):
    with pytest.raises(openai.BadRequestError, match=said):
        client.completions.create(model="tiny", prompt=[70, 71, 72], max_tokens=8, extra_body=extra)
