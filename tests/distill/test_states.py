from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from t3d.distill.states import (
    RATIOS,
    commit_rank,
    draw_groups,
    random_rank,
    replace_with_random,
    trajectory_mask,
    uniform_mask,
)


@st.composite
def sequences(draw):
    """Response tokens of one sequence: block ids (with a prompt tail in the first block), steps, confidences."""
    block_size = draw(st.integers(1, 8))
    start = draw(st.integers(0, block_size - 1))
    length = draw(st.integers(1, 30))
    block = np.arange(start, start + length) // block_size
    step = np.array(draw(st.lists(st.integers(0, 5), min_size=length, max_size=length)))
    confidence = np.array(draw(st.lists(st.sampled_from([0.1, 0.5, 0.9]), min_size=length, max_size=length)))
    return block, step, confidence


def runs(block):
    return [np.flatnonzero(block == b) for b in np.unique(block)]


@given(sequences())
def test_ranks_number_each_block_in_commit_order(sequence):
    block, step, confidence = sequence
    rank = commit_rank(block, step, confidence)
    for where in runs(block):
        by_hand = sorted(where, key=lambda i: (step[i], -confidence[i], i))
        assert [rank[i] for i in by_hand] == list(range(len(where)))


@given(sequences(), st.integers(0, 99), st.booleans(), st.sampled_from(["trajectory", "reversed", "random"]))
def test_masks_hold_the_last_committed_tokens_of_every_block(sequence, seed, per_block, order):
    block, step, confidence = sequence
    rank = commit_rank(block, step, confidence)
    mask = trajectory_mask(block, rank, np.random.default_rng(seed), 2.0, per_block, order)
    ratios = []
    for where in runs(block):
        masked = mask[where]
        n = len(where)
        possible = [r for r in RATIOS if np.ceil(r * n) == masked.sum()]
        assert possible, f"{masked.sum()} of {n} masked is no ceil(r * n)"
        ratios.append(set(possible))
        assert masked.any()
        if order == "trajectory" and not masked.all():
            assert rank[where][masked].min() > rank[where][~masked].max()
        if order == "reversed" and not masked.all():
            assert rank[where][masked].max() < rank[where][~masked].min()
    if not per_block:
        assert set.intersection(*ratios), "one ratio must explain every block of the sequence"


@given(sequences(), st.integers(0, 99), st.integers(1, 4))
def test_groups_are_consecutive_blocks_in_which_noise_rises(sequence, seed, size):
    block, step, confidence = sequence
    rng = np.random.default_rng(seed)
    group = draw_groups(block, size, rng)
    members = {}
    for number, first in zip(block.tolist(), group.tolist(), strict=True):
        members.setdefault(first, []).append(number)
    order = np.unique(block).tolist()
    for first, found in members.items():
        found = sorted(set(found))
        at = order.index(first)
        assert found == order[at : at + len(found)]
        assert len(found) <= size
    masks = {
        "trajectory": trajectory_mask(block, commit_rank(block, step, confidence), rng, 1.0, True, group=group),
        "uniform": uniform_mask(block, rng, group)[0],
    }
    for kind, mask in masks.items():
        for found in members.values():
            count = [((block == b).sum(), mask[block == b].sum()) for b in sorted(set(found))]
            for (n, a), (m, b) in pairwise(count):
                assert (
                    b >= min(a, m)
                    if kind == "uniform"
                    else any(np.ceil(r * n) == a and np.ceil(q * m) == b for r in RATIOS for q in RATIOS if r <= q)
                )


def test_ratios_follow_the_stated_distribution():
    block = np.zeros(4, dtype=int)
    rng = np.random.default_rng(0)
    counts = np.zeros(5)
    for _ in range(4000):
        counts[trajectory_mask(block, np.arange(4), rng, exponent=2.0).sum()] += 1
    weight = RATIOS**2
    np.testing.assert_allclose(counts[[4, 3, 2, 1]] / 4000, weight / weight.sum(), atol=0.025)


@given(sequences(), st.integers(0, 99))
def test_uniform_masks_weigh_by_their_number(sequence, seed):
    block = sequence[0]
    mask, weight = uniform_mask(block, np.random.default_rng(seed))
    for where in runs(block):
        assert 1 <= mask[where].sum() <= len(where)
        np.testing.assert_allclose(weight[where], 1 / mask[where].sum())


@given(sequences(), st.integers(0, 99))
def test_random_ranks_are_an_order_of_each_block(sequence, seed):
    block = sequence[0]
    rank = random_rank(block, np.random.default_rng(seed))
    for where in runs(block):
        assert sorted(rank[where]) == list(range(len(where)))


@given(st.integers(0, 99), st.floats(0, 1))
def test_random_tokens_replace_masks_only(seed, ratio):
    rng = np.random.default_rng(seed)
    ids = np.arange(2000) % 50
    masked = rng.random(2000) < 0.5
    noisy = replace_with_random(ids, masked, ratio, vocabulary=60, mask_id=55, rng=rng)
    assert (noisy[~masked] == ids[~masked]).all()
    swapped = masked & (noisy != 55)
    assert abs(swapped.sum() / masked.sum() - ratio) < 0.07
    assert noisy[swapped].max(initial=0) < 60
