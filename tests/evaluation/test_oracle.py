"""The oracle's forwards are the fewest that a search over the decoder's own states finds."""

import functools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from t3d import DecodingConfig, Engine
from t3d.blocks import block_causal_mask
from t3d.decoding.guarantee import reference_setting
from t3d.decoding.policy import POLICIES
from t3d.errors import T3DError
from t3d.evaluation import oracle as module
from t3d.evaluation.oracle import agreement, fewest, oracle
from tests.conftest import make_model

PROMPTS = [[7 + i, 8, 9 + i, 10, 11, 12 + i][: 1 + i % 6] for i in range(8)]


@functools.cache
def decoded(block_size: int, seed: int = 0, max_tokens: int = 16, **more):
    """(model, engine, reference settings, reference answers)"""
    model = make_model(block_size=block_size, seed=seed, **more)
    engine = Engine(model)
    config = reference_setting(DecodingConfig(max_tokens=max_tokens, stop_ids=()).at(block_size))
    return model, engine, config, engine.generate(PROMPTS, config)


def plainly_agreeing(model, t, start, state) -> int:
    """The places by the model's plain forward on what a decoder has in front of it: no copies, no batch."""
    whole, size, mask_id = [*t.prompt_ids, *t.response_ids], t.block_size, model.config.mask_token_id
    start -= t.origin  # from the first token
    shown = [token if state >> i & 1 else mask_id for i, token in enumerate(whole[start : start + size])]
    ids = torch.tensor([whole[:start] + shown])
    mask = block_causal_mask(t.origin + ids.shape[1], size)[None, None, t.origin :, t.origin :]
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=torch.arange(ids.shape[1])[None]).logits[0]
    logits[:, mask_id] = -torch.inf
    places = (i for i in range(len(shown)) if not state >> i & 1)
    return sum(1 << i for i in places if int(logits[start + i].argmax()) == whole[start + i])


def brute_force(given: int, size: int, agree) -> int:
    """Fewest forwards by trying everything, one state after the other."""

    @functools.cache
    def left(state: int) -> float:
        if state == (1 << size) - 1:
            return 0
        places = agree(state)
        return 1 + min((left(state | s) for s in range(1, 1 << size) if s & places == s), default=float("inf"))

    return left(given)


def driven(turns, table: dict[int, int]) -> int:
    """What the search returns where states agree as in the table."""
    answer, asked = None, set()
    while True:
        try:
            states = turns.send(answer)
        except StopIteration as done:
            return done.value
        assert not asked & set(states)  # nothing is computed twice
        asked |= set(states)
        answer = [table.get(s, 0) for s in states]


@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 5])
def test_the_fewest_forwards_of_all_ways(block_size):
    model, _, _, references = decoded(block_size)
    for t, found in zip(references, oracle(model, references, batch_size=3), strict=True):
        wanted = 0
        for start in range(
            len(t.prompt_ids) // block_size * block_size, len(t.prompt_ids + t.response_ids), block_size
        ):
            given = (1 << max(0, len(t.prompt_ids) - start)) - 1
            agree = functools.partial(plainly_agreeing, model, t, start)
            wanted += brute_force(given, block_size, agree)
        assert found == wanted


@pytest.mark.parametrize("family", ["a2d-qwen3", "Fast_dLLM_Qwen"])
def test_blocks_that_begin_at_the_response_and_logits_of_the_next_token(family):
    model, _, _, references = decoded(4, max_tokens=14, family=family)
    for t, found in zip(references, oracle(model, references, batch_size=3), strict=True):
        first, end, wanted = t.origin + len(t.prompt_ids), t.origin + len(t.prompt_ids + t.response_ids), 0
        assert (first % 4 == 0 and end % 4 == 2) == t.anchored == (family == "a2d-qwen3")
        for start in range(first // 4 * 4, end, 4):
            agree = functools.partial(plainly_agreeing, model, t, start)
            wanted += brute_force((1 << max(0, first - start)) - 1, min(4, end - start), agree)
        assert found == wanted


def test_full_attention_is_refused():
    model, _, _, references = decoded(4, family="llada")
    with pytest.raises(T3DError, match="the oracle needs blocks that see only earlier ones"):
        oracle(model, references)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5), st.data())
def test_search_in_any_table_of_agreement(size, data):
    """Every state agrees somewhere, but what agrees is arbitrary: to commit all that agrees need not be best."""
    full = (1 << size) - 1
    given_bits = data.draw(st.integers(0, full - 1))
    table = {
        s: data.draw(st.integers(1, full).map(lambda bits, s=s: bits & ~s or ~s & full & -(~s & full)))
        for s in range(full)
    }

    def run(exact: bool) -> int:
        return driven(fewest(given_bits, size, exact), table)

    best = brute_force(given_bits, size, table.__getitem__)
    assert run(exact=True) == best
    assert best <= run(exact=False) <= (full & ~given_bits).bit_count()


def test_committing_less_can_be_faster():
    # places 0 and 1 agree at first; with both filled 2 and 3 come one by one, with 0 alone all the others at once
    table = {0b0000: 0b0011, 0b0011: 0b0100, 0b0111: 0b1000, 0b0001: 0b1110, 0b0010: 0b0001}
    assert driven(fewest(0, 4, exact=True), table) == 2
    assert driven(fewest(0, 4, exact=False), table) == 3


def test_nothing_agrees():
    assert driven(fewest(0b001, 4), {}) == 3  # one place at a time


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 5), st.sampled_from([2, 4, 8]), st.data())
def test_no_policy_writes_the_same_in_fewer_forwards(seed, block_size, data):
    model, engine, config, references = decoded(block_size, seed)
    least = oracle(model, references)
    assert all(n <= t.nfe.denoise for n, t in zip(least, references, strict=True))
    others = {"token_editing", "wino", "credit"}  # these revise, or change what is proposed
    name = data.draw(st.sampled_from(sorted(POLICIES.keys() - others)))
    speed, changes = POLICIES[name].speed(), {"strategy": name}
    if speed is not None:
        changes[speed.name] = data.draw(st.sampled_from(speed.metadata["values"]))
    else:
        changes["steps"] = data.draw(st.integers(1, block_size))
    for t, reference, n in zip(engine.generate(PROMPTS, replace(config, **changes)), references, least, strict=True):
        if t.response_ids == reference.response_ids:
            assert t.nfe.denoise >= n


def test_all_that_agrees_at_once_is_an_upper_bound(monkeypatch):
    model, _, _, references = decoded(8, 3)
    exact = oracle(model, references)
    monkeypatch.setattr(module, "EXACT", 0)
    greedy = oracle(model, references)
    assert all(a <= b <= t.nfe.denoise for a, b, t in zip(exact, greedy, references, strict=True))
    assert exact != [t.nfe.denoise for t in references]  # there is something to win


def test_batches_rows_and_copies_change_nothing(monkeypatch):
    model, _, _, references = decoded(4)
    asked = [
        (i, start, state)
        for i, t in enumerate(references)
        for start in range((len(t.prompt_ids) + 3) // 4 * 4, len(t.prompt_ids + t.response_ids), 4)
        for state in (0, 1, 5, 14)
    ]
    wanted = [plainly_agreeing(model, references[i], start, state) for i, start, state in asked]
    assert agreement(model, references, asked, 4) == wanted
    monkeypatch.setattr(module, "NOISY", 8)  # two states a row
    assert agreement(model, references, asked, 1) == wanted
