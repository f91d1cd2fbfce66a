"""Retrieval: the passages of the user's own documents that have most to do with a question, by BM25."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from t3d.errors import T3DError, characters
from t3d.tasks.records import read_records

ENDINGS = (".txt", ".md", ".jsonl")
WORD = r"(?u)\b\w+\b"


@dataclass(frozen=True)
class Passage:
    """A part of a document. `source` is the document's path below the folder, with the line of a record."""

    source: str
    text: str


class Index:
    """Passages that can be searched by their words, in any language that has spaces; upper and lower case are one."""

    def __init__(self, passages: list[Passage]):
        bm25s = _library()
        self.passages = passages
        self._tokenize = lambda texts: bm25s.tokenize(
            texts, stopwords=None, token_pattern=WORD, return_ids=False, show_progress=False
        )
        self._index = bm25s.BM25()
        self._index.index(self._tokenize([passage.text for passage in passages]), show_progress=False)

    def search(self, question: str, count: int) -> list[Passage]:
        """At most `count` passages, the best first; none that shares no word with the question."""
        count = min(count, len(self.passages))
        found, scores = self._index.retrieve(self._tokenize([question]), k=count, show_progress=False)
        return [self.passages[i] for i, score in zip(found[0], scores[0], strict=True) if score > 0]


@dataclass(frozen=True)
class Documents:
    """The documents in a folder or file, cut into passages of at most so many `words`, and how many of them to find.

    Raises:
        T3DError: one line: there are no documents, one holds no words or cannot be read, or bm25s is missing.
    """

    path: str
    passages: int
    words: int

    def __post_init__(self):
        index_of(self.path, self.words)

    def search(self, question: str) -> list[Passage]:
        """The best first."""
        return list(_found(self, question))


@lru_cache(1024)  # a chat with details asks twice
def _found(documents: Documents, question: str) -> tuple[Passage, ...]:
    return tuple(index_of(documents.path, documents.words).search(question, documents.passages))


def fill(template: str, question: str, documents: Documents | None) -> str:
    """The template with the question and, of documents, the passages found for it, blank lines between."""
    parts = {"{question}": question}
    if documents is not None and "{context}" in template:
        parts["{context}"] = "\n\n".join(passage.text for passage in documents.search(question))
    return re.sub("|".join(map(re.escape, parts)), lambda match: parts[match[0]], template)  # in one go: no nesting


def check_template(template: str, name: str, retrieves: bool) -> None:
    """Raises T3DError if the question, or what is retrieved if anything is, has no place in the template `name`."""
    for part, what in (("{question}", "the question"), ("{context}", "what is retrieved"))[: 1 + retrieves]:
        if part not in template:
            raise T3DError(f"{name} must contain {part}, where {what} goes, got {template!r}")


@cache
def index_of(path: str, words: int) -> Index:
    """The passages, of at most so many words, of the documents in a folder (with those below it) or file; read once.

    Raises:
        T3DError: one line: there are no documents, one holds no words or cannot be read, or bm25s is missing.
    """
    _library()
    return Index([part for document in _documents(Path(path)) for part in _passages(document, words)])


def _documents(path: Path) -> Iterator[Passage]:
    if not path.exists():
        raise T3DError(f"retrieve: {path} does not exist")
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [file for file in files if file.suffix.lower() in ENDINGS and file.is_file()]
    if not files:
        raise T3DError(f"retrieve: {path} holds no documents; they are files that end in {', '.join(ENDINGS)}")
    for file in files:
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        for document in _records(file, name) if file.suffix.lower() == ".jsonl" else [Passage(name, _text(file))]:
            if not re.search(WORD, document.text):
                raise T3DError(f"retrieve: {document.source} holds no text; leave it out")
            yield document


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise T3DError(f"retrieve: cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise T3DError(f"retrieve: {file} is not UTF-8 text ({error.reason})") from error


def _records(file: Path, name: str) -> Iterator[Passage]:
    for where, record in read_records(file):
        if not isinstance(record.get("text"), str):
            raise T3DError(f"retrieve: {file}, {where}: no field 'text' that is a text")
        yield Passage(f"{name}, {where}", characters(record["text"], f"retrieve: {file}, {where}"))


def _passages(document: Passage, words: int) -> Iterator[Passage]:
    """The document cut after every so many words; white space inside a passage stays as it is."""
    spans = [match.span() for match in re.finditer(r"\S+", document.text)]
    for first in range(0, len(spans), words):
        part = spans[first : first + words]
        text = document.text[part[0][0] : part[-1][1]]
        if re.search(WORD, text):
            yield Passage(document.source, text)


def _library():
    try:
        import bm25s
    except ImportError as error:
        raise T3DError("retrieve needs bm25s, which is missing: pip install 't3d[retrieval]'") from error
    return bm25s
