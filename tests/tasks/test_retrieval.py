import json
import sys

import pytest

from t3d.errors import T3DError
from t3d.tasks import Problem, TaskConfig, get_task
from t3d.tasks.retrieval import index_of

LIBRARY = pytest.importorskip("bm25s", reason="retrieval needs the extra t3d[retrieval]")
TEMPLATE = "{context}\n\nNow: {question}"


@pytest.fixture
def documents(tmp_path):
    folder = tmp_path / "notes"
    (folder / "below").mkdir(parents=True)
    (folder / "cats.txt").write_text("Cats sleep.\n\nA cat has four legs, and so has a dog.")
    (folder / "below" / "birds.md").write_text("# Birds\nParrots have 2 legs.")
    (folder / "more.jsonl").write_text('{"text": "Snakes have none."}\n{"text": "Löwen jagen {question}."}\n')
    (folder / "picture.png").write_bytes(b"\x89PNG")
    return folder


def task(documents, **settings):
    return get_task(TaskConfig(retrieve=str(documents), template=TEMPLATE, **settings))


def found(task, question: str) -> list[str]:
    return [passage.source for passage in task.retrieved(question)]


def test_the_best_passages_come_first_and_others_not_at_all(documents):
    asked = task(documents)
    assert found(asked, "How many legs has a CAT?") == ["cats.txt", "below/birds.md"]
    assert found(asked, "löwen?") == ["more.jsonl, line 2"]
    assert found(asked, "2") == ["below/birds.md"]
    assert found(asked, "xyz") == found(asked, "") == []
    assert found(task(documents, retrieve_passages=1), "How many legs has a cat?") == ["cats.txt"]
    assert found(task(documents / "cats.txt"), "legs") == ["cats.txt"]


def test_documents_are_cut_into_passages(documents):
    texts = [p.text for p in index_of(str(documents / "cats.txt"), 4).passages]
    assert texts == ["Cats sleep.\n\nA cat", "has four legs, and", "so has a dog."]


def test_context_goes_into_the_prompt_and_nothing_inside_it_is_filled(documents):
    asked = task(documents)
    assert asked.prompt_text(Problem("", "Wen jagen Löwen?")) == "Löwen jagen {question}.\n\nNow: Wen jagen Löwen?"
    assert asked.prompt_text(Problem("", "xyz {context}?")) == "\n\nNow: xyz {context}?"
    chat = [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "Hm."}]
    chat.append({"role": "user", "content": "Parrots?"})
    text = "# Birds\nParrots have 2 legs.\n\nNow: Parrots?"
    assert asked.prompt_text(Problem("", "told for people", messages=chat)) == text
    plain = get_task(TaskConfig(template="{context} {question}"))  # other braces stay as they are
    assert plain.prompt_text(Problem("", "Hm?")) == "{context} Hm?"
    assert plain.retrieved("Hm?") == []


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "holds no documents; they are files that end in .txt, .md, .jsonl"),
        ({"a.txt": "Cats.", "b.txt": " \n"}, "b.txt holds no text"),
        ({"a.md": "--- ***"}, "a.md holds no text"),
        ({"a.jsonl": ""}, "a.jsonl holds no records"),
        ({"a.jsonl": '{"text": "Cats."}\n{"txt": "Dogs."}'}, "a.jsonl, line 2: no field 'text'"),
        ({"a.jsonl": '{"text": "Cats."}\n{"text": ""}'}, "a.jsonl, line 2 holds no text"),
        ({"a.jsonl": json.dumps({"text": "\ud800"})}, "half of a surrogate pair"),
        ({"a.txt": b"\xff\xfe\xff"}, "a.txt is not UTF-8 text"),
    ],
)
def test_documents_that_cannot_be_searched(tmp_path, files, said):
    for name, text in files.items():
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(T3DError) as error:
        task(tmp_path).prompt_text(Problem("", "Cats?"))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_settings_that_make_no_sense(documents, monkeypatch):
    with pytest.raises(T3DError, match=r"task.template must contain \{context\}"):
        get_task(TaskConfig(retrieve=str(documents)))
    with pytest.raises(T3DError, match=r"task\.retrieve_words must be at least 1, got 0"):
        task(documents, retrieve_words=0)
    with pytest.raises(T3DError, match="nowhere does not exist"):
        task(documents / "nowhere").retrieved("Hm?")
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(T3DError, match=r"missing: pip install 't3d\[retrieval\]'"):
        task(documents / "more.jsonl").retrieved("Hm?")
