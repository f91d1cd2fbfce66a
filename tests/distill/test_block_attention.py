"""Attention by blocks and cheap recomputation give the results and the gradients of the plain way."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from t3d.blocks import Layout
from t3d.distill import T3DConfig
from t3d.distill.batch import TrainingBatch, collate, when_committed
from t3d.distill.data import StateDataset
from t3d.distill.recompute import checkpoint_layers, recompute_cheap
from t3d.errors import T3DError
from tests.conftest import make_model
from tests.distill.test_layout import MASK, PAD, random_trajectory


def make_batch(seed, block_size=4, documents=3, pack_length=10**6, blocks=4, **settings):
    rng = np.random.default_rng(seed)
    trajectories = [
        random_trajectory(rng, block_size, int(rng.integers(1, 40)), int(rng.integers(1, blocks + 1)))
        for _ in range(documents)
    ]
    settings = {"objective": "soft", "mask_exponent": 1.0, "random_ratio": 0.0} | settings
    config = T3DConfig(output_dir="unused", seed=seed, use_cpu=True, **settings)
    dataset = StateDataset(trajectories, config, block_size, MASK, vocabulary=60)
    return TrainingBatch(**collate([dataset[i] for i in range(documents)], PAD, block_size, pack_length))


def results(attention, batch, prepare=lambda model: None, block_size=4, autocast=False):
    """Logits at supervised positions, and every weight's gradient of a random combination of them."""
    model = make_model(block_size=block_size)
    model.set_attn_implementation(attention)
    prepare(model)
    model.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(
            batch.input_ids, batch.layout.attention_mask(attention), batch.position, select=batch.select
        ).float()
    torch.manual_seed(0)
    (logits * torch.randn_like(logits)).sum().backward()
    return logits.detach(), [weight.grad for weight in model.parameters()]


@given(
    seed=st.integers(0, 10**6),
    block_size=st.sampled_from([1, 3, 4, 8, 32]),
    copies=st.integers(1, 3),
    pack_length=st.sampled_from([0, 1, 200, 10**6]),
    blocks=st.sampled_from([2, 40]),  # of up to 64 queries, and of several chunks
    restated=st.booleans(),
    size=st.integers(1, 4),
)
@settings(max_examples=25, deadline=None)
def test_logits_and_gradients_are_those_of_a_dense_mask(seed, block_size, copies, pack_length, blocks, restated, size):
    blocks = max(min(blocks, 160 // block_size), 1)
    settings = {"states_per_sequence": copies, "group_size": size}
    batch = make_batch(seed, block_size, pack_length=pack_length, blocks=blocks, **settings)
    if restated:  # noisy blocks several times, in any order and with gaps
        batch = when_committed(batch, torch.arange(len(batch.part)) % 3 > 0, MASK)
    logits, gradients = results("block_sdpa", batch, block_size=block_size)
    expected, dense = results("sdpa", batch, block_size=block_size)
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)
    for a, b in zip(gradients, dense, strict=True):
        torch.testing.assert_close(a, b, atol=2e-3 * float(b.abs().max()), rtol=1e-3)


@pytest.mark.parametrize("prepare", [recompute_cheap, checkpoint_layers])
def test_recomputation_changes_nothing(prepare):
    batch = make_batch(1, blocks=20)
    logits, gradients = results("block_sdpa", batch, prepare)
    expected, plain = results("block_sdpa", batch)
    torch.testing.assert_close(logits, expected, atol=0, rtol=0)
    for a, b in zip(gradients, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6 * float(b.abs().max()), rtol=1e-6)


def test_mixed_precision_computes_attention_in_bfloat16():
    batch = make_batch(2)
    logits, gradients = results("block_sdpa", batch, autocast=True)
    expected, dense = results("sdpa", batch, autocast=True)
    torch.testing.assert_close(logits, expected, atol=0.3, rtol=0.1)
    for a, b in zip(gradients, dense, strict=True):
        assert torch.nn.functional.cosine_similarity(a.ravel(), b.ravel(), 0) > 0.98


def test_gradients_in_bfloat16_are_sums_of_float32():
    """As close to the gradients of the same rounded inputs as one rounding at the end allows."""
    from t3d.block_attention import _BlockAttention, plan

    layout = make_batch(3, blocks=40).layout
    tokens = int((layout.document >= 0).sum())
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, tokens, 8), torch.randn(2, tokens, 8), torch.randn(2, tokens, 8)
    weights = torch.randn_like(q)

    def gradients(dtype):
        leaves = [x.bfloat16().to(dtype).requires_grad_() for x in (q, k, v)]
        out = _BlockAttention.apply(*leaves, plan(layout), 8**-0.5)
        return torch.autograd.grad(out, leaves, weights.bfloat16().to(dtype))

    for half, full in zip(gradients(torch.bfloat16), gradients(torch.float32), strict=True):
        assert half.dtype == torch.bfloat16
        error = (half.float() - full).norm() / full.norm()
        assert error < 2.5e-3, error  # one rounding costs 1.7e-3; sums rounded piece by piece cost 4e-3


def test_an_attention_that_knows_no_block_mask_is_refused():
    batch = make_batch(0)
    with pytest.raises(T3DError, match=r"flash_attention_2.*use sdpa"):
        batch.layout.attention_mask("flash_attention_2")


def test_work_grows_with_what_is_seen():
    """Documents beside each other cost their sum, not their square, and padding costs nothing."""
    from t3d.block_attention import plan

    def pairs(layout):
        start, end, prefix, limit, own = plan(layout).pieces.T
        return int(((end - start) * (limit - prefix + end - own)).sum())

    rng = np.random.default_rng(0)
    config = T3DConfig(output_dir="unused", use_cpu=True)
    dataset = StateDataset([random_trajectory(rng, 4, 50, 60)], config, 4, MASK, vocabulary=60)
    one = TrainingBatch(**collate([dataset[0]], PAD, 4)).layout
    width = one.document.shape[1]
    beside = [torch.cat([getattr(one, name)] * 4, 1) for name in ("copy", "position")]
    document = torch.arange(4).repeat_interleave(width)[None]
    assert pairs(Layout(document, *beside, 4)) == 4 * pairs(one)
    padded = [
        torch.nn.functional.pad(x, (0, 99), value=v) for x, v in ((one.document, -1), (one.copy, 0), (one.position, 0))
    ]
    assert pairs(Layout(*padded, 4)) == pairs(one) < width * width / 2
