"""The draws: reproducible from their names alone, and of the right distribution."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from t3d.decoding.sampling import derive_seed, sample, uniform


def splitmix(x):
    """splitmix64's finaliser in Python's own integers."""
    x ^= x >> 30
    x = x * 0xBF58476D1CE4E5B9 % 2**64
    x ^= x >> 27
    x = x * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


@given(
    seed=st.integers(-(2**63), 2**63 - 1), position=st.integers(0, 2**31), step=st.integers(0, 99), s=st.integers(0, 3)
)
def test_uniform_is_the_hash_it_says(seed, position, step, s):
    x = seed % 2**64
    for part in (s, position, step):
        x = splitmix((x + 0x9E3779B97F4A7C15 * (part + 1)) % 2**64)
    got = uniform(*(torch.tensor([v]) for v in (seed, position, step)), stream=s)
    assert float(got) == (x >> 40) / 2**24


def test_uniform_is_uniform_and_uncorrelated():
    n = 200_000
    seed, position = torch.arange(n) // 1000, torch.arange(n) % 1000
    a = uniform(seed, position, torch.zeros(n, dtype=torch.int64))
    b = uniform(seed, position, torch.ones(n, dtype=torch.int64))
    assert 0 <= float(a.min()) < float(a.max()) < 1
    counts = torch.histc(a, 20, 0, 1)
    assert float(((counts - n / 20) ** 2 / (n / 20)).sum()) < 45  # chi-square, 19 degrees of freedom: p about .001
    for other in (b, a.roll(1), a.roll(1000)):
        assert abs(float(torch.corrcoef(torch.stack([a, other]))[0, 1])) < 5 / math.sqrt(n)


def test_derived_seeds_differ():
    seeds = {derive_seed(base, index, number) for base in range(10) for index in range(100) for number in range(5)}
    assert len(seeds) == 5000
    assert all(0 <= s < 2**63 for s in seeds)


def draw(logits, temperature=1.0, top_k=0, top_p=1.0, u=None, own=False, entropy=False):
    rows = len(logits)
    return sample(
        logits.clone(),
        torch.full((rows,), temperature),
        torch.full((rows,), top_k),
        torch.full((rows,), top_p),
        torch.rand(rows) if u is None else u,
        torch.full((rows,), own),
        entropy=entropy,
    )


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.5, 0, 1.0), (1.0, 3, 1.0), (2.0, 4, 0.7)]
)
def test_frequencies_are_the_distribution(temperature, top_k, top_p):
    logits = torch.tensor([0.3, 2.0, -1.0, 1.2, -torch.inf, 0.9])
    want = (logits / temperature).softmax(0)
    order = want.argsort(descending=True)
    kept = order[: top_k or None]
    share = want[kept] / want[kept].sum()
    kept = kept[share.cumsum(0) - share < top_p]
    expected = torch.zeros(6).index_copy(0, kept, want[kept] / want[kept].sum())
    n = 50_000
    u = (torch.arange(n) + 0.5) / n  # every quantile once: frequencies are exact up to 1/n per token
    tokens, _, _, _ = draw(logits.expand(n, 6), temperature, top_k, top_p, u)
    got = torch.bincount(tokens, minlength=6) / n
    assert torch.allclose(got, expected, atol=1e-3)
    assert got[4] == 0


def test_confidence_does_not_depend_on_temperature_unless_asked():
    torch.manual_seed(0)
    logits, u = torch.randn(100, 20), torch.rand(100)
    for temperature, top_k in ((0.5, 0), (2.0, 5)):
        tokens, confidence, _, _ = draw(logits, temperature, top_k, u=u)
        assert torch.allclose(confidence, logits.softmax(-1)[torch.arange(100), tokens])
        same, own, _, _ = draw(logits, temperature, top_k, u=u, own=True)
        assert torch.equal(tokens, same)
        if not top_k:
            assert torch.allclose(own, (logits / temperature).softmax(-1)[torch.arange(100), tokens])
        else:
            assert bool((own > (logits / temperature).softmax(-1)[torch.arange(100), tokens]).all())


def test_greedy_is_argmax_with_its_probability():
    torch.manual_seed(0)
    logits = torch.randn(50, 30)
    tokens, confidence, entropy, _ = draw(logits, temperature=0.0, entropy=True)
    p = logits.softmax(-1)
    assert torch.equal(tokens, p.argmax(-1))
    assert torch.allclose(confidence, p.max(-1).values)
    assert torch.allclose(entropy, -(p * p.log()).sum(-1), atol=1e-5)


def test_entropy_with_impossible_tokens():
    logits = torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf], [5.0, -torch.inf, -torch.inf, -torch.inf]])
    _, _, entropy, _ = draw(logits, temperature=0.0, entropy=True)
    assert torch.allclose(entropy, torch.tensor([math.log(2), 0.0]), atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_row_is_drawn_alike_whatever_is_beside_it(data):
    rows = data.draw(st.integers(2, 6))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    logits, u = torch.randn(rows, 12), torch.rand(rows)
    temperature = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 0.7, 1.3]), min_size=rows, max_size=rows)))
    top_k = torch.tensor(data.draw(st.lists(st.sampled_from([0, 3]), min_size=rows, max_size=rows)))
    top_p = torch.tensor(data.draw(st.lists(st.sampled_from([1.0, 0.6]), min_size=rows, max_size=rows)))
    own = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    together = sample(logits.clone(), temperature, top_k, top_p, u, own)
    for i in range(rows):
        one = slice(i, i + 1)
        single = sample(logits[one].clone(), temperature[one], top_k[one], top_p[one], u[one], own[one])
        assert int(single[0]) == int(together[0][i])
        assert float(single[1]) == pytest.approx(float(together[1][i]), rel=1e-5)


def test_the_last_quantile_never_draws_an_impossible_token():
    logits = torch.tensor([[1.0, 2.0, 0.5, -torch.inf]])
    for _ in range(3):
        tokens, _, _, _ = draw(logits, u=torch.tensor([1 - 2.0**-24]))
        assert int(tokens) == 2
