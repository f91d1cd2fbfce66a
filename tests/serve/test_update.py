"""New weights while the server answers: nobody fails, nothing is mixed, and a bad folder changes nothing."""

import asyncio
import json
import os
import shutil
import signal

import pytest

from t3d import DecodingConfig, Engine, load_model
from t3d.errors import T3DError
from t3d.models import save_model
from t3d.models.recommended import recommend
from t3d.serve.app import create_app
from t3d.serve.config import ServeConfig
from t3d.serve.model import Served
from t3d.serve.worker import open_worker
from tests.conftest import make_model
from tests.serve.conftest import byte_tokenizer
from tests.serve.test_app import call, collect, during

ASK = {"prompt": "what all of these prompts begin with, which takes more than a page; and then ", "max_tokens": 40}


def student(folder, seed=1, **changes):
    tokenizer = byte_tokenizer()
    changes = {"vocab_size": len(tokenizer), "max_position_embeddings": 16384} | changes
    save_model(make_model(seed=seed, eos_token_id=tokenizer.eos_token_id, **changes), folder, tokenizer)
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    folder = student(tmp_path_factory.mktemp("model") / "other")
    recommend(folder, {"steps": 2})
    return folder


@pytest.fixture(scope="module")
def before(tiny):
    return answers(tiny, 1)[0]


@pytest.fixture
def served(tiny):
    engine = Engine(*load_model(tiny, device="cpu"), max_batch_size=3, prefix_cache=True)
    return Served(open_worker(engine, "tiny", max_queue=64), DecodingConfig(), str(tiny))


def answers(folder, count, steps=None):
    engine = Engine(*load_model(folder, device="cpu"))
    config = DecodingConfig(max_tokens=40, steps=steps)
    return [t.text for t in engine.generate([f"{ASK['prompt']}{n}" for n in range(count)], config)]


def post(app, path, body, sent):
    return asyncio.ensure_future(call(app, "POST", path, body, collect(sent)))


def body_of(sent) -> dict:
    return json.loads(sent[1]["body"])


def test_who_has_begun_ends_on_the_old_weights_and_who_waits_begins_on_the_new(served, tiny, other):
    app = create_app([served], ServeConfig(weight_updates=True))
    old, waited, new = answers(tiny, 8), answers(other, 8), answers(other, 8, steps=2)
    sent, updated, after = [[] for _ in range(8)], [], [[] for _ in range(8)]

    async def work():
        asked = [post(app, "/v1/completions", ASK | {"prompt": f"{ASK['prompt']}{n}"}, s) for n, s in enumerate(sent)]
        while not served.worker.stats.running:
            await asyncio.sleep(0)
        change = post(app, "/update_weights_from_disk", {"model_path": str(other)}, updated)
        await asyncio.gather(change, *asked)
        again = [post(app, "/v1/completions", ASK | {"prompt": f"{ASK['prompt']}{n}"}, s) for n, s in enumerate(after)]
        await asyncio.gather(*again)

    during(app, work())
    assert body_of(updated)["success"]
    assert [one[0]["status"] for one in [*sent, *after]] == [200] * 16
    texts = [body_of(one)["choices"][0]["text"] for one in sent]
    assert all(text in (old[n], waited[n]) for n, text in enumerate(texts))  # never a mixture
    assert any(text == before for text, before in zip(texts, old, strict=True))
    assert body_of(updated)["num_paused_requests"] == sum(
        text != before for text, before in zip(texts, old, strict=True)
    )
    assert [body_of(one)["choices"][0]["text"] for one in after] == new  # though the prompts were in the old cache
    assert served.worker.stats.cached_tokens > 0
    assert served.default.steps == 2  # as the new folder recommends
    assert served.worker.stats.finished == 16


def test_a_hang_up_reads_the_same_folder_again(start, before, tiny, tmp_path):
    import time

    import httpx2

    folder = shutil.copytree(tiny, tmp_path / "model")
    server = start(f"tiny={folder}", "--weight-updates")
    with httpx2.Client(base_url=server.url, timeout=60) as http:

        def text():
            return http.post("/v1/completions", json=ASK | {"prompt": f"{ASK['prompt']}0"}).json()["choices"][0]["text"]

        assert text() == before
        new = student(tmp_path / "new", seed=5)
        shutil.rmtree(folder)
        os.rename(new, folder)
        os.kill(server.process.pid, signal.SIGHUP)
        stderr = server.process.output / "stderr"
        end = time.monotonic() + 60
        while "are served now" not in stderr.read_text():
            assert time.monotonic() < end
            time.sleep(0.02)
        assert text() == answers(folder, 1)[0]
        shutil.rmtree(folder)
        os.kill(server.process.pid, signal.SIGHUP)
        while "the old weights go on being served" not in stderr.read_text():
            assert time.monotonic() < end
            time.sleep(0.02)
        assert len(stderr.read_text().splitlines()) == 3
        assert http.post("/v1/completions", json=ASK).status_code == 200
        said = http.post("/update_weights_from_disk", json={"model_path": str(folder)})
        assert said.status_code == 400
        assert said.json()["error"]["code"] == "weights_refused"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (None, "nowhere"),
        ({"hidden": 64}, "hidden_size is 64, not 32"),
        ({"block_size": 8}, "block_size is 8, not 4"),
        ("template", "another tokenizer or chat template"),
        ("recommended", "stepps"),
    ],
)
def test_a_folder_that_does_not_fit_changes_nothing(served, before, tiny, tmp_path, changes, said):
    folder = tmp_path / "nowhere"
    if isinstance(changes, dict):
        student(folder, **changes)
    elif changes is not None:
        student(folder)
        if changes == "recommended":
            recommend(folder, {"stepps": 2})
        else:
            (folder / "chat_template.jinja").write_text("another")
    app, refused, after = create_app([served], ServeConfig(weight_updates=True)), [], []

    async def work():
        await post(app, "/update_weights_from_disk", {"model_path": str(folder)}, refused)
        await post(app, "/v1/completions", ASK | {"prompt": f"{ASK['prompt']}0"}, after)

    during(app, work())
    assert refused[0]["status"] == 400
    assert said in body_of(refused)["error"]["message"]
    assert body_of(after)["choices"][0]["text"] == before
    assert served.path == str(tiny)


def test_only_where_it_is_asked_for(served):
    app, sent = create_app([served], ServeConfig()), []

    async def work():
        await post(app, "/update_weights_from_disk", {"model_path": "nowhere"}, sent)

    during(app, work())
    assert sent[0]["status"] == 404
    with pytest.raises(T3DError, match="set an API key"):
        ServeConfig(host="0.0.0.0", weight_updates=True)
