"""Losses against a direct, slow computation: dense logits, Python loops over sequences, blocks and levels."""

import math

import numpy as np
import pytest
import torch
from conftest import make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_layout import MASK, PAD, random_trajectory

from t3d.distill import T3DConfig
from t3d.distill.data import StateDataset, TrainingBatch, collate
from t3d.distill.logprobs import choose_tokens, token_logprobs
from t3d.distill.objectives import OBJECTIVES


def make_case(seed, block_size=4, **settings):
    rng = np.random.default_rng(seed)
    trajectories = [
        random_trajectory(rng, block_size, int(rng.integers(1, 14)), int(rng.integers(1, 5))) for _ in range(3)
    ]
    config = T3DConfig(output_dir="unused", seed=seed, mask_exponent=1.0, use_cpu=True, **settings)
    dataset = StateDataset(trajectories, config, block_size, MASK, vocabulary=60)
    batch = TrainingBatch(**collate([dataset[i] for i in range(3)], PAD, block_size))
    return trajectories, config, batch


def run(model, batch):
    def forward(head):
        return model(
            input_ids=batch.input_ids,
            attention_mask=batch.layout.boolean_mask(),
            position_ids=batch.position,
            select=batch.select,
            head=head,
        )

    return forward


def dense_logprobs(model, batch):
    """float64 log-probabilities at every position, without the mask token, `(rows, length, vocab)`."""
    logits = model(batch.input_ids, batch.layout.boolean_mask(), batch.position).logits.double()
    logits[..., MASK] = -math.inf
    return logits.log_softmax(-1)


def by_sequence(trajectories, batch):
    """For each noisy sequence the supervised `(row, column, target, rank)`, found again from the input alone."""
    groups = {}
    rows, length = batch.input_ids.shape
    supervised = set(batch.select.tolist())
    for r in range(rows):
        for c in range(length):
            d, copy, p = (int(x[r, c]) for x in (batch.document, batch.copy, batch.position))
            if r * length + c not in supervised:
                continue
            t = trajectories[d]
            i = p - len(t.prompt_ids)
            block = [
                j for j in range(len(t.response_ids)) if (j + len(t.prompt_ids)) // t.block_size == p // t.block_size
            ]
            rank = sorted(block, key=lambda j: (t.step_map[j], -t.confidence[j], j)).index(i)
            groups.setdefault((d, copy), []).append((r, c, t.response_ids[i], rank, p // t.block_size))
    return groups


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > -30 else x


@given(
    seed=st.integers(0, 10**6),
    k=st.integers(1, 5),
    copies=st.integers(1, 2),
    unit=st.sampled_from(["sequence", "block"]),
    reduction=st.sampled_from(["mean", "sum"]),
)
@settings(max_examples=25, deadline=None)
def test_t3d_is_its_formula(seed, k, copies, unit, reduction):
    trajectories, config, batch = make_case(
        seed, path_k=k, states_per_sequence=copies, ddo_unit=unit, ddo_reduction=reduction, beta=0.7
    )
    student, reference = make_model(seed=1), make_model(seed=2)
    with torch.no_grad():
        loss, metrics = OBJECTIVES["t3d"].loss(batch, run(student, batch), run(reference, batch), config, MASK)
        lp_s, lp_r = dense_logprobs(student, batch), dense_logprobs(reference, batch)

    ddo_terms, path_terms = [], []
    for tokens in by_sequence(trajectories, batch).values():
        units = [tokens] if unit == "sequence" else [[t for t in tokens if t[4] == b] for b in {t[4] for t in tokens}]
        for members in units:
            real = fake = 0.0
            for r, c, target, _, _ in members:
                choice = int(lp_r[r, c].argmax())
                real += float(lp_s[r, c, target] - lp_r[r, c, target])
                fake += float(lp_s[r, c, choice] - lp_r[r, c, choice])
            if reduction == "mean":
                real, fake = real / len(members), fake / len(members)
            ddo_terms.append(-log_sigmoid(config.beta * real) - config.alpha * log_sigmoid(-config.beta * fake))
        levels = []
        for level in range(1, math.ceil(4 / k) + 1):
            losses = [-float(lp_s[r, c, target]) for r, c, target, rank, _ in tokens if rank < level * k]
            levels.append(sum(losses) / len(losses) if losses else 0.0)
        path_terms.append(sum(levels) / len(levels))
    ddo, path = sum(ddo_terms) / len(ddo_terms), sum(path_terms) / len(path_terms)
    assert float(metrics["loss/ddo"]) == pytest.approx(ddo, rel=1e-4, abs=1e-5)
    assert float(metrics["loss/path"]) == pytest.approx(path, rel=1e-4)
    assert float(loss) == pytest.approx(ddo + config.path_lambda * path, rel=1e-4)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=10, deadline=None)
def test_sft_is_block_diffusion_cross_entropy(seed):
    trajectories, config, batch = make_case(seed, objective="sft", states_per_sequence=2)
    model = make_model(seed=3)
    with torch.no_grad():
        loss, _ = OBJECTIVES["sft"].loss(batch, run(model, batch), None, config, MASK)
        logp = dense_logprobs(model, batch)
    masks = {}  # every masked token counts in its block's 1/|M|, supervised or not
    for r, c in (batch.input_ids == MASK).nonzero().tolist():
        key = (int(batch.document[r, c]), int(batch.copy[r, c]), int(batch.layout.block[r, c]))
        masks[key] = masks.get(key, 0) + 1
    blocks = {}
    for (d, copy), tokens in by_sequence(trajectories, batch).items():
        for r, c, target, _, block in tokens:
            key = (d, copy, block)
            blocks[key] = blocks.get(key, 0.0) - float(logp[r, c, target]) / masks[key]
    assert float(loss) == pytest.approx(sum(blocks.values()) / len(blocks), rel=1e-4)


@pytest.mark.parametrize("kind", ["forward", "reverse", "js"])
@pytest.mark.parametrize("top_k", [0, 5])
def test_soft_is_the_divergence_to_the_reference(kind, top_k):
    _, config, batch = make_case(3, objective="soft", soft_divergence=kind, soft_top_k=top_k)
    student, reference = make_model(seed=1), make_model(seed=2)
    loss, _ = OBJECTIVES["soft"].loss(batch, run(student, batch), run(reference, batch), config, MASK)
    q, p = (dense_logprobs(m, batch).detach().exp().flatten(0, 1)[batch.select] for m in (student, reference))
    total = 0.0
    for qi, pi in zip(q, p, strict=True):
        kept = [v for v in range(64) if v != MASK]
        if top_k:
            kept = sorted(kept, key=lambda v: -float(pi[v]))[:top_k]
        qi, pi = ([float(x[v]) / sum(float(x[w]) for w in kept) for v in kept] for x in (qi, pi))
        middle = [(a + b) / 2 for a, b in zip(qi, pi, strict=True)]
        pairs = {"forward": [(pi, qi)], "reverse": [(qi, pi)], "js": [(pi, middle), (qi, middle)]}[kind]
        total += sum(a * math.log(a / b) for x, y in pairs for a, b in zip(x, y, strict=True)) / len(pairs)
    assert loss.item() == pytest.approx(total / len(q), rel=1e-4)
    loss.backward()
    assert all(w.grad.isfinite().all() for w in student.parameters())


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunked_logprobs_and_gradients_equal_dense_ones(chunk):
    torch.manual_seed(0)
    hidden = torch.randn(10, 8, requires_grad=True)
    weight = torch.randn(20, 8, requires_grad=True)
    tokens = torch.randint(0, 19, (10, 2))

    def dense():
        logits = hidden @ weight.T
        return logits[:, :19].log_softmax(-1).gather(1, tokens)

    expected, actual = dense(), token_logprobs(hidden, weight, tokens, 19, chunk)
    torch.testing.assert_close(actual, expected)
    coefficients = torch.randn(10, 2)
    for a, b in zip(
        torch.autograd.grad((actual * coefficients).sum(), (hidden, weight)),
        torch.autograd.grad((expected * coefficients).sum(), (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_the_reference_never_chooses_the_mask_and_samples_at_its_temperature():
    hidden = torch.ones(4000, 1)
    weight = torch.log(torch.tensor([[0.1], [0.3], [0.2], [0.4]]))  # token 3 is the mask
    assert (choose_tokens(hidden, weight, 3) == 1).all()
    torch.manual_seed(0)
    share = torch.bincount(choose_tokens(hidden, weight, 3, temperature=1.0), minlength=4) / 4000
    torch.testing.assert_close(share, torch.tensor([0.1, 0.3, 0.2, 0.0]) / 0.6, atol=0.03, rtol=0)
