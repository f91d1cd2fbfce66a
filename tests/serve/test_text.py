"""Deltas join to the whole text, whatever the tokens and the cuts."""

import gzip

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from t3d.serve.text import TextStream
from tests.serve.conftest import byte_tokenizer

TOKENIZER = byte_tokenizer()
SPECIAL = TOKENIZER.convert_tokens_to_ids(["<|end|>", "<|mask|>"])


def stream(tokenizer, ids, cuts, stop=()):
    texts, out = TextStream(tokenizer, stop), []
    for first, last in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        out.append(texts.push(ids[first:last]))
    return [*out, texts.finish()], texts


@st.composite
def tokens(draw):
    """Text of all kinds of characters, garbage, and special tokens, in pieces."""
    pieces = st.one_of(
        st.text(max_size=6).map(lambda s: TOKENIZER.encode(s, add_special_tokens=False)),
        st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=12),
        st.sampled_from(SPECIAL).map(lambda t: [t]),
    )
    ids = [token for piece in draw(st.lists(pieces, max_size=8)) for token in piece]
    return ids, sorted(draw(st.lists(st.integers(0, len(ids)), max_size=12)))


@settings(max_examples=150, deadline=None)
@given(tokens())
def test_deltas_join_to_the_text(case):
    ids, cuts = case
    deltas, _ = stream(TOKENIZER, ids, cuts)
    assert "".join(deltas) == TOKENIZER.decode(ids, skip_special_tokens=True)


@settings(max_examples=100, deadline=None)
@given(st.text(min_size=1, max_size=12), st.data())
def test_never_half_a_character(text, data):
    """What is whole in the end has no replacement character on the way."""
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    cuts = list(range(1, len(ids))) if data.draw(st.booleans()) else []
    deltas, _ = stream(TOKENIZER, ids, cuts)
    assert "".join(deltas) == text
    assert all(("�" in delta) <= ("�" in text) for delta in deltas)


@settings(max_examples=150, deadline=None)
@given(
    st.text("ab c", max_size=30), st.lists(st.text("ab c", min_size=1, max_size=4), min_size=1, max_size=3), st.data()
)
def test_stop_strings_never_leak(text, stop, data):
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=12)))
    deltas, texts = stream(TOKENIZER, ids, cuts, stop)
    got = "".join(deltas)
    # what a reader who sees the pieces as they come may know: the first stop string in any of the cut texts
    seen = ""
    for end in [*cuts, len(ids)]:
        seen = TOKENIZER.decode(ids[:end])
        found = [seen.index(s) for s in stop if s in seen]
        if found:
            assert texts.stopped
            assert got == seen[: min(found)]
            break
    else:
        assert not texts.stopped
        assert got == text
    assert not any(s in got for s in stop)


def test_text_comes_as_soon_as_it_is_certain():
    texts = TextStream(TOKENIZER, ["the end"])
    assert texts.push(TOKENIZER.encode("So the", add_special_tokens=False)) == "So "
    assert texts.push(TOKENIZER.encode("n", add_special_tokens=False)) == "then"
    a, b, c, d = (TOKENIZER.convert_tokens_to_ids(x) for x in ("ð", "Ł", "ĺ", "Ģ"))  # 😀 byte by byte
    assert [texts.push([t]) for t in (a, b, c, d)] == ["", "", "", "😀"]
    assert texts.push([a]) == ""
    assert texts.finish() == "�"


def test_garbage_is_not_held_back_for_ever():
    texts, byte = (
        TextStream(TOKENIZER),
        TOKENIZER.convert_tokens_to_ids("Ģ"),
    )  # a continuation byte that continues nothing
    got = [texts.push([byte] * 4) for _ in range(50)]
    assert len("".join(got)) >= 4 * 50 - 8
    assert len("".join(got) + texts.finish()) == 4 * 50


def test_a_real_tokenizer(shared_data):
    spec = gzip.decompress((shared_data / "sdar-4b-chat" / "tokenizer.json.gz").read_bytes())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(spec.decode()))
    text = "Zażółć gęślą jaźń — 你好，世界！ \U0001f469\u200d\U0001f469\u200d\U0001f467"
    text += " x² ≠ ∑ 𝔊<|im_end|>\n\n    def f(x):\treturn x"
    ids = tokenizer.encode(text, add_special_tokens=False)
    for size in (1, 3, 4):
        deltas, _ = stream(tokenizer, ids, list(range(size, len(ids), size)))
        assert "".join(deltas) == tokenizer.decode(ids, skip_special_tokens=True)
        assert not any("�" in delta for delta in deltas)
