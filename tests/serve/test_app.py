"""What cannot be done to a server from outside: the application in this process, between a worker and a fake socket."""

import asyncio
import json

import pytest

from t3d import DecodingConfig, Engine, load_model
from t3d.errors import T3DError
from t3d.serve.app import create_app
from t3d.serve.config import ServeConfig
from t3d.serve.model import Served, name_of
from t3d.serve.schema import CompletionBody
from t3d.serve.worker import open_worker


@pytest.fixture
def served(tiny):
    config = ServeConfig(timeout=2)
    engine = Engine(*load_model(tiny, device="cpu"), max_batch_size=4)
    return Served(open_worker(engine, "tiny", max_queue=4), DecodingConfig()), config


async def call(app, method: str, path: str, body: dict | None, send):
    parts = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive():
        if parts:
            return parts.pop()
        await asyncio.Event().wait()

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "asgi": {"spec_version": "2.3"}, "http_version": "1.1", "method": method, "path": path}
    await app(scope | {"query_string": b"", "headers": headers, "scheme": "http"}, receive, send)


def collect(sent: list):
    async def send(message):
        sent.append(message)

    return send


def during(app, work):
    """Run the coroutine between the application's startup and its shutdown."""

    async def main():
        async with app.app.router.lifespan_context(app.app):
            return await asyncio.wait_for(work, 30)

    return asyncio.run(main())


def test_a_client_that_does_not_read_is_cut_off(served):
    model, config = served
    app = create_app([model], config)
    sent = []

    async def send(message):
        sent.append(message)
        if len(sent) > 1:
            await asyncio.Event().wait()  # the buffers between us are full, and stay so

    body = {"prompt": "abc", "stream": True, "max_tokens": 16000, "ignore_eos": True}

    async def work():
        await call(app, "POST", "/v1/completions", body, send)
        while not model.worker.session.done:
            await asyncio.sleep(0.01)

    during(app, work())
    assert len(sent) == 2
    assert model.worker._left == 0
    assert not model.worker._jobs


def test_a_fault_while_decoding_hurts_those_in_flight_only(served, monkeypatch):
    """They get 500; the next request is decoded by a new session; the log says why."""
    model, config = served
    app = create_app([model], config)
    first = model.worker.session
    real = type(first).step
    steps = []

    def step(session, isolate):
        steps.append(session)
        if len(steps) == 3:
            raise RuntimeError("out of memory")
        return real(session, isolate)

    monkeypatch.setattr(type(first), "step", step)
    lost, served_after = [], []

    async def work():
        body = {"prompt": "abc", "max_tokens": 40, "ignore_eos": True}
        await call(app, "POST", "/v1/completions", body, collect(lost))
        await call(app, "POST", "/v1/completions", body, collect(served_after))

    during(app, work())
    assert lost[0]["status"] == 500
    assert json.loads(lost[1]["body"])["error"]["message"] == "decoding failed (RuntimeError)"
    assert served_after[0]["status"] == 200
    assert model.worker.session is not first
    assert not model.worker._jobs


def test_a_model_that_cannot_go_on_is_reported(served, monkeypatch):
    model, config = served
    app = create_app([model], config)

    def fail(*_, **__):
        raise RuntimeError("no memory")

    monkeypatch.setattr(type(model.worker.session), "step", fail)
    monkeypatch.setattr(model.worker.engine, "open", fail)
    sent = [[], [], []]

    async def work():
        for answers in sent[:2]:
            await call(app, "POST", "/v1/completions", {"prompt": "abc"}, collect(answers))
        await call(app, "GET", "/health", None, collect(sent[2]))

    during(app, work())
    assert [answers[0]["status"] for answers in sent] == [500, 503, 503]


def test_a_cancelled_job_does_not_look_finished(served):
    """Whoever waits for its events may see the cancellation late: between two forwards, with one still to be read."""
    model, config = served
    app = create_app([model], config)

    async def work():
        requests = model.complete(CompletionBody(prompt="abc", max_tokens=400, ignore_eos=True))
        job = model.worker.submit(requests)
        batches = aiter(job)
        await anext(batches)
        job.queue.put_nowait([])
        job.cancel()
        await anext(batches)
        with pytest.raises(asyncio.CancelledError):
            await anext(batches)

    during(app, work())


def test_two_models_of_one_name_are_refused(served):
    model, config = served
    with pytest.raises(T3DError, match="two models have the same name"):
        create_app([model, model], config)


def test_names(tmp_path):
    folder = tmp_path / "student"
    folder.mkdir()
    odd = tmp_path / "a=b"
    odd.mkdir()
    assert name_of(str(folder)) == ("student", str(folder))
    assert name_of(f"mine={folder}") == ("mine", str(folder))
    assert name_of(str(odd)) == ("a=b", str(odd))
    assert name_of("JetLM/SDAR-1.7B-Chat") == ("JetLM/SDAR-1.7B-Chat", "JetLM/SDAR-1.7B-Chat")
    assert name_of("embedded") == ("embedded", "embedded")


def test_a_flight_that_needs_more_than_the_cache_is_the_clients_fault(tiny):
    """The text fits, what is computed beside it does not: refused before any work, and the message says what to do."""
    engine = Engine(*load_model(tiny, device="cpu"), max_batch_size=2, kv_cache_tokens=64)
    model = Served(open_worker(engine, "tiny", max_queue=4), DecodingConfig())
    app = create_app([model], ServeConfig(timeout=20))
    prompt = {"prompt": "abcd", "max_tokens": model.worker.longest - 4, "ignore_eos": True}
    sent = {flight: [] for flight in ("multi_block", "look_ahead")}

    async def work():
        for flight, answers in sent.items():
            await call(app, "POST", "/v1/completions", prompt | {"flight": flight}, collect(answers))

    during(app, work())
    assert sent["multi_block"][0]["status"] == 200
    assert sent["look_ahead"][0]["status"] == 400
    assert "lower max_tokens" in json.loads(sent["look_ahead"][1]["body"])["error"]["message"]
    assert model.worker.stats.failed == 0
