"""A verified draft is what the decoder of one token at a time gives: the same tokens, or the same distribution."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from t3d.blocks import block_causal_mask
from t3d.decoding import DecodingConfig
from t3d.decoding.policy import FILLED, POLICIES, SHADOW
from t3d.decoding.sampling import distribution, sample
from t3d.decoding.speculation import accept
from t3d.engine import BlockEvent, Engine, FailedEvent, FinishedEvent, StepEvent
from t3d.engine.intake import make_requests
from t3d.errors import T3DError
from t3d.trajectories.record import validate
from tests.conftest import make_model
from tests.engine.test_equivalence import STOPS, engines, random_prompts
from tests.engine.test_session import drain

ALWAYS = {"flight": "s2d2", "verify_from": -1e9}
NEVER = {"flight": "s2d2", "verify_from": 1e9}
LINEAR = {"flight": "linear_spec"}


@pytest.fixture(scope="module")
def model():
    return make_model()


@torch.no_grad()
def next_logits(model, ids, block_size, causal):
    """Logits (vocab,) of the token behind `ids`. Tokens of whole blocks see each other as the cache has them, by blocks
    or, if `causal`, from left to right; those after them from left to right."""
    whole, n = len(ids) // block_size * block_size, len(ids) + 1
    mask = torch.ones(n, n, dtype=torch.bool).tril()
    if not causal:
        mask[:whole, :whole] = block_causal_mask(whole, block_size)
    row = torch.tensor([[*ids, model.config.mask_token_id]])
    logits = model(row, attention_mask=mask[None, None], position_ids=torch.arange(n)[None]).logits[0, -1].float()
    logits[model.config.mask_token_id] = -torch.inf
    return logits


def one_by_one(model, prompt, config, count):
    """The greedy decoder of one token at a time, everything computed from scratch: (token, probability) pairs."""
    ids, found = list(prompt), []
    for _ in range(count):
        p = next_logits(model, ids, config.block_size, config.flight == "linear_spec").softmax(-1)
        ids.append(int(p.argmax()))
        found.append((ids[-1], float(p.max())))
    return found


def outcome(t):
    return t.response_ids, t.step_map, t.length, t.finish_reason


def end_of(prompts, configs, page=16):
    """Places that the longest sequence can need, in whole pages."""
    sizes = [
        -(-(len(p) + c.max_tokens) // c.block_size + 1) * c.block_size for p, c in zip(prompts, configs, strict=True)
    ]
    return (max(sizes) // page + 2) * page


@st.composite
def greedy_configs(draw, flights=(ALWAYS, LINEAR)):
    return DecodingConfig(
        block_size=draw(st.sampled_from([1, 2, 3, 4, 7, 8])),
        max_tokens=draw(st.integers(1, 16)),
        stop_ids=STOPS,
        steps=1,
        **draw(st.sampled_from(flights)),
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_greedy_tokens_are_those_of_one_at_a_time(model, data):
    """Flights of both kinds beside ordinary decoding in one batch, with any budget, page size and chunking."""
    rng = random.Random(data.draw(st.integers(0, 10**6)))
    prompts = random_prompts(rng, data.draw(st.integers(1, 4)))
    configs = [data.draw(greedy_configs((ALWAYS, LINEAR, {"flight": "multi_block"}))) for _ in prompts]
    engine = data.draw(engines(model, end_of(prompts, configs)))
    for t, prompt, config in zip(engine.generate(prompts, configs), prompts, configs, strict=True):
        validate(t)
        if config.flight == "multi_block":
            assert outcome(t) == outcome(Engine(model).generate([prompt], config)[0])
            continue
        want = one_by_one(model, prompt, config, len(t.response_ids))
        assert t.response_ids == [token for token, _ in want]
        assert t.confidence == pytest.approx([p for _, p in want], abs=1e-4)
        if config.flight == "linear_spec":
            (plain,) = Engine(model).generate([prompt], replace(config, flight="multi_block", block_size=1))
            assert (t.response_ids[: t.length], t.length, t.finish_reason) == (
                plain.response_ids[: plain.length],
                plain.length,
                plain.finish_reason,
            )


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("flight", [ALWAYS, LINEAR])
def test_flex_attention_gives_the_same(model, flight, graphs):
    prompts = random_prompts(random.Random(2), 3, longest=30)
    config = DecodingConfig(max_tokens=6, stop_ids=STOPS, **flight)
    flex = Engine(model, attention="flex", page_size=16, kv_cache_tokens=96, cuda_graphs=graphs)
    assert list(map(outcome, flex.generate(prompts, config))) == list(
        map(outcome, Engine(model).generate(prompts, config))
    )


@pytest.mark.parametrize("flight", [{"flight": "s2d2"}, LINEAR])
def test_preemption_and_batch_change_no_draw(model, flight):
    prompts = random_prompts(random.Random(1), 12, longest=50)
    config = DecodingConfig(temperature=1.0, top_p=0.9, max_tokens=24, stop_ids=STOPS, **flight)
    want = Engine(model).generate(prompts, config)
    tight = Engine(model, kv_cache_tokens=112, page_size=8)
    assert list(map(outcome, tight.generate(prompts, config))) == list(map(outcome, want))
    assert tight.stats.preemptions > 0
    singles = [Engine(model).generate([p], config, seeds=[t.seed])[0] for p, t in zip(prompts, want, strict=True)]
    assert list(map(outcome, singles)) == list(map(outcome, want))


def p_value(counts, expected):
    """Of Pearson's chi-square test, cells that expect fewer than five joined. float64 (cells,)"""
    few = expected < 5
    counts, expected = (torch.cat([x[~few], x[few].sum()[None]]) for x in (counts, expected))
    kept = expected > 0
    statistic = ((counts - expected) ** 2 / expected)[kept].sum()
    return float(torch.special.gammaincc((kept.sum().double() - 1) / 2, statistic / 2))


@pytest.mark.parametrize(
    ("flight", "cut"), [(ALWAYS, {}), (LINEAR, {}), (ALWAYS, {"temperature": 1.3, "top_k": 5, "top_p": 0.9})]
)
def test_sampled_tokens_have_the_distribution_of_one_at_a_time(flight, cut):
    """The joint distribution of two tokens; a decoder that takes every draft fails the same test."""
    model, count = make_model(vocab_size=8, seed=3), 1500
    prompt = [2, 3, 4, 5, 6, 2]  # the block's last two places are left
    config = DecodingConfig(block_size=4, max_tokens=2, stop_ids=(), **({"temperature": 1.0} | cut), **flight)

    def law(ids):
        logits = next_logits(model, ids, 4, config.flight == "linear_spec")
        return distribution(logits[None], config.temperature, config.top_k, config.top_p)[0].double()

    first = law(prompt)
    joint = torch.cat([first[x] * law([*prompt, x]) for x in range(8)])

    def drawn(settings):
        found = Engine(model, max_batch_size=500).generate([prompt] * count, settings, seeds=range(count))
        cells = torch.tensor([8 * t.response_ids[0] + t.response_ids[1] for t in found])
        return torch.bincount(cells, minlength=64).double()

    assert p_value(drawn(config), count * joint) > 1e-3
    assert p_value(drawn(replace(config, flight="multi_block", steps=1)), count * joint) < 1e-6


def test_acceptance_is_exact_and_wrong_rules_are_seen():
    generator, n = torch.Generator().manual_seed(0), 40_000
    p, q = torch.randn(2, 6, generator=generator).mul(1.5).softmax(-1)
    u, v, w = torch.rand(3, n, generator=generator)
    zero = torch.zeros(n, dtype=torch.int64)
    draft = sample(p.log().expand(n, 6).clone(), zero + 1.0, zero, zero + 1.0, w, zero.bool())[0]
    accepted, other = accept(draft, p.expand(n, 6), q.expand(n, 6), u, v)

    def fit(tokens):
        return p_value(torch.bincount(tokens, minlength=6).double(), n * q.double())

    from_q = torch.searchsorted(q.cumsum(0), v).clamp(max=5)
    assert fit(torch.where(accepted, draft, other)) > 1e-3
    assert fit(torch.where(accepted, draft, from_q)) < 1e-6  # replaced by a draw from q, not from what is left of it
    assert fit(torch.where(u < q[draft], draft, other)) < 1e-6  # accepted without regard to p


@pytest.mark.parametrize("strategy", ["low_confidence_dynamic", "entropy_bounded_eb", "low_confidence_static"])
@pytest.mark.parametrize("window", [None, 2])
def test_what_is_not_verified_is_the_policy_s(model, strategy, window):
    prompts = random_prompts(random.Random(3), 6)
    config = DecodingConfig(
        block_size=8,
        steps=3,
        window=window,
        strategy=strategy,
        threshold=0.5,
        temperature=0.7,
        max_tokens=20,
        stop_ids=STOPS,
    )
    got, want = (Engine(model).generate(prompts, replace(config, **kind)) for kind in (NEVER, {}))
    for a, b in zip(got, want, strict=True):
        assert (*outcome(a), a.nfe) == (*outcome(b), b.nfe)
        assert a.confidence == pytest.approx(b.confidence, abs=1e-5)


def test_verifies_what_promises_enough(model):
    """Between always and never; every round commits, and a block costs a draft for each."""
    prompts = random_prompts(random.Random(4), 10)
    config = DecodingConfig(block_size=8, max_tokens=24, stop_ids=(), threshold=0.5, flight="s2d2")
    config = replace(config, strategy="low_confidence_dynamic", verify_doubt=0.5)
    found = Engine(model).generate(prompts, config)
    assert 0 < sum(t.nfe.verify for t in found) < sum(t.nfe.denoise for t in found)
    for t in found:
        validate(t)
    dear = Engine(model).generate(prompts, replace(config, verify_cost=3.0))
    assert sum(t.nfe.verify for t in dear) < sum(t.nfe.verify for t in found)


def test_cost_in_forwards(model):
    """Two forwards per round, and one where a single mask is left."""
    config = DecodingConfig(max_tokens=16, stop_ids=(), **LINEAR)
    (t,) = Engine(model).generate([[7, 8, 9, 10, 11, 12, 13, 14]], config)
    single = rounds = 0
    for base in range(0, 16, 4):
        steps = t.step_map[base : base + 4]
        rounds += steps[-1] + 1
        single += len(set(steps)) > 1 and steps.count(steps[-1]) == 1
    assert (t.nfe.prefill, t.nfe.denoise, t.nfe.verify, t.nfe.commit) == (0, rounds - single, rounds, 0)
    assert t.nfe.predicting == t.nfe.total == 2 * rounds - single
    (letters,) = Engine(model).generate([[7, 8]], replace(config, block_size=1))
    assert (letters.nfe.denoise, letters.nfe.verify) == (0, 16)


@pytest.mark.parametrize("flight", [{"flight": "s2d2"}, LINEAR])
def test_stream_tells_every_step_in_order(model, flight):
    config = DecodingConfig(max_tokens=10, stop_ids=(), n=2, temperature=1.0, block_size=4, **flight)
    seen, blocks, done = {}, {}, {}
    requests = make_requests([[7, 8, 9], [10, 11]], config, None, None, model, None)
    session = Engine(model, max_batch_size=3).open(requests)
    for request in requests:
        session.add(request, watch=True)
    for event in drain(session):
        key = (event.index, event.sample)
        assert key not in done
        if isinstance(event, StepEvent):
            for place, token in zip(event.places, event.token_ids, strict=True):
                assert place not in seen.setdefault(key, {})
                seen[key][place] = (token, event.step)
        elif isinstance(event, BlockEvent):
            blocks.setdefault(key, []).extend(zip(event.token_ids, event.step_map, strict=True))
            assert [seen[key][place] for place in range(len(blocks[key]))] == blocks[key]
        elif isinstance(event, FinishedEvent):
            done[key] = event.trajectory
    assert len(done) == 4
    for key, t in done.items():
        assert blocks[key] == list(zip(t.response_ids, t.step_map, strict=True))


@pytest.mark.parametrize("flight", [ALWAYS, LINEAR])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_numbers_that_are_none_fail_their_sequence_alone(flight, temperature):
    model = make_model(seed=5)
    with torch.no_grad():
        model.model.embed_tokens.weight[11] = torch.nan
    config = DecodingConfig(max_tokens=4, temperature=temperature, stop_ids=(), seed=3, **flight)
    prompts = [[7, 8], [11, 8], [9]]
    message = "^prompt 1: the model's logits are not numbers .* at position 2, step 0"
    with pytest.raises(T3DError, match=message):
        Engine(model).generate(prompts, config)
    requests = make_requests(prompts, config, None, None, model, None)
    session = Engine(model).open(requests)
    for request in requests:
        session.add(request)
    events = drain(session, isolate=True)
    assert [e.index for e in events if isinstance(e, FailedEvent)] == [1]
    got = {e.index: e.trajectory for e in events if isinstance(e, FinishedEvent)}
    for index in (0, 2):  # neither draws token 11
        (alone,) = Engine(model).generate([prompts[index]], config, seeds=[requests[index].seed])
        assert outcome(got[index]) == outcome(alone)


def test_a_policy_that_revises_is_refused():
    for name, policy in POLICIES.items():
        if {FILLED, SHADOW} & policy.needs:
            with pytest.raises(T3DError, match="use another"):
                DecodingConfig(strategy=name, flight="s2d2")
