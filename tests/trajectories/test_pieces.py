import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t3d.tasks.word_problems import build_tokenizer
from t3d.trajectories.pieces import Pieces
from tests.trajectory_examples import make_trajectory


@pytest.fixture(scope="module")
def sdar(shared_data):
    from transformers import Qwen2TokenizerFast

    return Qwen2TokenizerFast.from_pretrained(shared_data / "sdar-4b-chat")


TEXTS = [
    "plain words 12",
    "naïve café",
    "日本語のテキスト",
    "🧪👩‍🔬 𓀀🪼 ok",
    "<b>&amp;</b>\n\n\t",
    "<|im_end|><think>",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text(sdar, text):
    ids = sdar.encode(text, add_special_tokens=False)
    pieces = Pieces(sdar)(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text


def test_a_character_in_several_tokens_belongs_to_the_last(sdar):
    ids = sdar.encode("a𓀀b", add_special_tokens=False)
    assert len(ids) > 3
    pieces = Pieces(sdar)(ids)
    assert [p for p in pieces if p] == ["a", "𓀀", "b"]


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 151_668), max_size=20))
def test_any_ids_have_pieces(sdar, ids):
    pieces = Pieces(sdar)(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == sdar.decode(ids, skip_special_tokens=False)


def test_pieces_of_a_trajectory_begin_with_the_prompts_tail():
    tokenizer = build_tokenizer()
    trajectory = make_trajectory(prompt=6, blocks=2)  # its ids are below 100
    pieces = Pieces(tokenizer).of(trajectory)
    assert len(pieces) == 2 + len(trajectory.response_ids)
    assert pieces[:2] == [tokenizer.decode([token]) for token in trajectory.prompt_ids[-2:]]
    assert len(Pieces(tokenizer).of(make_trajectory(prompt=8))) == 8
