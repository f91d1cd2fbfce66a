"""A server with documents: a chat that it fills is the chat whose question was filled by hand."""

import httpx2
import pytest

from t3d.errors import T3DError
from t3d.serve.config import ServeConfig

pytest.importorskip("bm25s", reason="retrieval needs the extra t3d[retrieval]")

TEMPLATE = "Read: {context} Then say: {question}"


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    (folder / "cats.txt").write_text("A cat has 4 legs.")
    (folder / "birds.md").write_text("A bird has 2 legs and {question}.")
    return folder


@pytest.fixture(scope="module")
def urls(start, tiny, documents):
    """Of a server that retrieves, and of one that does not."""
    asked = ("--retrieve", str(documents), "--retrieve-passages", "1", "--template", TEMPLATE)
    return start(str(tiny), *asked).url, start(str(tiny)).url


def chat(url: str, *messages: str, **settings) -> dict:
    roles = ("system", "user", "assistant", "user")[-len(messages) :]
    body = {"messages": [{"role": r, "content": m} for r, m in zip(roles, messages, strict=True)], "max_tokens": 8}
    got = httpx2.post(f"{url}/v1/chat/completions", json=body | settings, timeout=60)
    assert got.status_code == 200, got.text
    return got.json()


@pytest.mark.parametrize(
    ("question", "source", "filled"),
    [
        ("How many for a cat?", "cats.txt", "Read: A cat has 4 legs. Then say: How many for a cat?"),
        ("A bird?", "birds.md", "Read: A bird has 2 legs and {question}. Then say: A bird?"),
        ("Hm?", None, "Read:  Then say: Hm?"),
    ],
)
def test_the_last_question_gets_the_best_passage(urls, question, source, filled):
    before = ("Be brief.", "A bird and a cat?", "Yes.")
    answer = chat(urls[0], *before, question, return_details=True)
    by_hand = chat(urls[1], *before, filled, return_details=True)
    ours, theirs = answer["choices"][0]["t3d"], by_hand["choices"][0]["t3d"]
    assert [passage["source"] for passage in ours["context"]] == ([source] if source else [])
    assert "context" not in theirs
    assert (ours["token_ids"], ours["prompt_tokens"]) == (theirs["token_ids"], theirs["prompt_tokens"])


def test_what_is_not_a_chat_is_left_as_it_is(urls):
    def completion(url):
        body = {"prompt": "A cat?", "max_tokens": 8, "return_details": True}
        return httpx2.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]["t3d"]

    ours, theirs = map(completion, urls)
    assert (ours["token_ids"], ours.keys()) == (theirs["token_ids"], theirs.keys())


def test_a_stream_and_a_count_of_tokens_see_the_same(urls):
    messages = [{"role": "user", "content": "A cat?"}]
    body = {"messages": messages, "max_tokens": 8, "stream": True, "return_details": True}
    with httpx2.stream("POST", f"{urls[0]}/v1/chat/completions", json=body, timeout=60) as got:
        assert '"context":[{"source":"cats.txt"' in "".join(got.iter_text())
    counted = httpx2.post(f"{urls[0]}/tokenize", json={"messages": messages}, timeout=60).json()["count"]
    assert counted == chat(urls[0], "A cat?")["usage"]["prompt_tokens"]


def test_bad_settings(tmp_path):
    with pytest.raises(T3DError, match=r"template must contain \{context\}, where what is retrieved goes"):
        ServeConfig(retrieve="x", template="{question}")
    with pytest.raises(T3DError, match="say where they are with --retrieve"):
        ServeConfig(template="{context} {question}")
    with pytest.raises(T3DError, match=r"retrieve: .*nowhere does not exist"):
        _ = ServeConfig(retrieve=str(tmp_path / "nowhere")).documents
