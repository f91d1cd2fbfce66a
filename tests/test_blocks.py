import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from t3d.blocks import CLEAN, PADDING, Layout, block_causal_mask


@given(length=st.integers(1, 70), block_size=st.integers(1, 33))
def test_a_block_sees_itself_and_all_earlier_blocks(length, block_size):
    mask = block_causal_mask(length, block_size)
    assert mask.dtype == torch.bool
    for q in range(length):
        for k in range(length):
            assert mask[q, k].item() == (k // block_size <= q // block_size)


def layouts():
    return st.tuples(
        st.integers(1, 9),  # block size
        st.lists(st.tuples(st.integers(1, 20), st.integers(1, 3)), min_size=1, max_size=3),  # (clean length, copies)
        st.integers(0, 5),  # padding
        st.integers(1, 3),  # blocks of a group
    )


def build(block_size, documents, padding, size):
    """size: of the groups in which noisy blocks see each other, counted from position 0; the last may be shorter."""
    tokens = []
    for d, (length, copies) in enumerate(documents):
        tokens += [(d, CLEAN, p) for p in range(length)]
        tokens += [(d, c, p) for c in range(1, copies + 1) for p in range(length)]
    tokens += [(PADDING, CLEAN, 0)] * padding
    document, copy, position = torch.tensor(tokens).T[:, None]
    block = position // block_size
    return tokens, Layout(document, copy, position, block_size, torch.where(copy == CLEAN, block, block // size * size))


@given(layouts())
@settings(max_examples=50, deadline=None)
def test_training_rows_follow_the_rule_token_by_token(case):
    tokens, layout = build(*case)
    size = case[-1]
    mask = layout.boolean_mask()[0, 0]
    for q, (dq, cq, pq) in enumerate(tokens):
        for k, (dk, ck, pk) in enumerate(tokens):
            bq, bk = pq // layout.block_size, pk // layout.block_size
            if dq != dk:
                expected = False
            elif cq == CLEAN:
                expected = ck == CLEAN and bk <= bq
            else:
                first = bq // size * size
                expected = (ck == CLEAN and bk < first) or (ck == cq and first <= bk <= bq)
            assert mask[q, k].item() == expected, (tokens[q], tokens[k])
    assert mask.any(-1).all(), "a row that sees nothing makes softmax NaN"


@given(layouts())
@settings(max_examples=30, deadline=None)
def test_with_the_shift_the_token_before_predicts(case):
    tokens, layout = build(*case)
    select = torch.arange(len(tokens))[layout.document[0] != PADDING].flip(0)
    assert torch.equal(layout.predictors(select, 0), select)
    for asked, found in zip(select.tolist(), layout.predictors(select, 1).tolist(), strict=True):
        (d, c, p), first = tokens[asked], layout.group[0, asked].item() * layout.block_size
        if p > 0:
            d, c, p = d, c if p > first else CLEAN, p - 1
        assert tokens[found] == (d, c, p)


@given(layouts())
@settings(max_examples=10, deadline=None)
def test_flex_attention_mask_is_the_boolean_mask(case):
    from torch.nn.attention.flex_attention import create_mask

    _, layout = build(*case)
    block_mask = layout.flex_mask()
    length = layout.document.shape[1]
    dense = create_mask(block_mask.mask_mod, 1, 1, length, length, device="cpu")
    assert torch.equal(dense, layout.boolean_mask())
