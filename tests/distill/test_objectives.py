"""Losses against a direct, slow computation: dense logits, Python loops over sequences, blocks and levels."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from t3d.distill import T3DConfig
from t3d.distill.batch import TrainingBatch, collate
from t3d.distill.data import StateDataset
from t3d.distill.logprobs import choose_tokens, token_logprobs
from t3d.distill.objective import OBJECTIVES, Ask, total_loss
from t3d.distill.sampler import Draw
from tests.conftest import make_model
from tests.distill.test_layout import MASK, PAD, decoder_logits, random_trajectory

STATES = ["trajectory", "uniform", "all_masked"]


def make_case(seed, block_size=4, progress=1.0, **settings):
    rng = np.random.default_rng(seed)
    trajectories = [
        random_trajectory(rng, block_size, int(rng.integers(1, 14)), int(rng.integers(1, 5))) for _ in range(3)
    ]
    config = T3DConfig(output_dir="unused", seed=seed, mask_exponent=1.0, use_cpu=True, **settings)
    dataset = StateDataset(trajectories, config, block_size, MASK, vocabulary=60)
    batch = TrainingBatch(**collate([dataset[Draw(i, 0, progress)] for i in range(3)], PAD, block_size))
    return trajectories, config, batch


def run(model, batch):
    def forward(head, batch=batch):
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
        loss, metrics = config.method.loss(batch, Ask(run(student, batch), run(reference, batch), MASK))
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
        loss, _ = config.method.loss(batch, Ask(run(model, batch), None, MASK))
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
@pytest.mark.parametrize("state", ["same", "committed"])
def test_soft_is_the_divergence_to_the_reference(kind, top_k, state):
    trajectories, config, batch = make_case(
        3, objective="soft", soft_divergence=kind, soft_top_k=top_k, soft_state=state, states_per_sequence=2
    )
    student, reference = make_model(seed=1), make_model(seed=2)
    loss, _ = config.method.loss(batch, Ask(run(student, batch), run(reference, batch), MASK))
    q, p = (dense_logprobs(m, batch).detach().exp().flatten(0, 1)[batch.select] for m in (student, reference))
    if state == "committed":
        p, selected = [], set(batch.select.tolist())
        length = batch.input_ids.shape[1]
        rows = {r * length + c: key for key, x in noisy_tokens(trajectories, batch).items() for r, c, _ in x.values()}
        for place in batch.select.tolist():
            d, copy = rows[place]
            t = trajectories[d]
            tokens = noisy_tokens(trajectories, batch)[d, copy]
            shown = {i + len(t.prompt_ids) for i, (r, c, _) in tokens.items() if r * length + c not in selected}
            p.append(committed_logprobs(reference, t, int(batch.position.flatten()[place]), shown).exp())
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


@given(seed=st.integers(0, 10**6), k=st.sampled_from([0.0, 0.5, 3.0]), state=st.sampled_from(STATES))
@settings(max_examples=10, deadline=None)
def test_alpha_is_its_formula(seed, k, state):
    trajectories, config, batch = make_case(seed, objective="alpha", alpha_k=k, state=state, states_per_sequence=2)
    model = make_model(seed=3)
    with torch.no_grad():
        loss, _ = config.method.loss(batch, Ask(run(model, batch), None, MASK))
        logp = dense_logprobs(model, batch)
    blocks = {}
    for (d, copy), tokens in by_sequence(trajectories, batch).items():
        for r, c, target, _, block in tokens:
            blocks.setdefault((d, copy, block), []).append(float(logp[r, c, target]))
    scores = [sum(values) / len(values) for values in blocks.values()]
    expected = [(1 - math.exp(k * s)) / k if k else -s for s in scores]
    assert float(loss) == pytest.approx(sum(expected) / len(expected), rel=1e-4)


def test_alpha_gives_up_unlikely_blocks():
    """Its gradient in a block's log-probability is that of the cross-entropy, times exp(k s)."""
    _, config, batch = make_case(5, objective="alpha", alpha_k=2.0)
    grads = []
    for c in (config, make_case(5, objective="alpha", alpha_k=0.0)[1]):
        logits = torch.randn(len(batch.select), 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
        loss, _ = c.method.loss(batch, Ask(lambda head, x=logits: head(x, torch.eye(64)), None, MASK))
        grads.append(torch.autograd.grad(loss, logits)[0])
        logp = logits.detach().clone().index_fill_(1, torch.tensor(MASK), -torch.inf).log_softmax(-1)
    for block in batch.block.unique().tolist():
        here = batch.block == block
        s = logp[here].gather(1, batch.target[here, None]).mean()
        torch.testing.assert_close(grads[0][here], grads[1][here] * (2.0 * s).exp(), atol=1e-7, rtol=1e-4)


@given(seed=st.integers(0, 10**6), late=st.sampled_from([0.0, 1.5]), stop=st.sampled_from([0.0, 0.7]))
@settings(max_examples=8, deadline=None)
def test_dcd_stitches_the_teachers_distributions(seed, late, stop):
    trajectories, config, batch = make_case(seed, objective="dcd", late_weight=late, stop_ce=stop)
    student, teacher = make_model(seed=1), make_model(seed=2)
    with torch.no_grad():
        loss, metrics = total_loss(config.method, batch, Ask(run(student, batch), run(teacher, batch), MASK))
        q = dense_logprobs(student, batch)
    total = weights = 0.0
    ends = []
    for (d, _), tokens in noisy_tokens(trajectories, batch).items():
        t = trajectories[d]
        assert all(token == MASK for _, _, token in tokens.values())
        for block in blocks_of(t):
            steps = sorted({t.step_map[place] for place in block})
            for place in block:
                r, c, _ = tokens[place]
                p = committed_logprobs(teacher, t, place + len(t.prompt_ids))
                w = 1 + late * steps.index(t.step_map[place]) / max(len(steps) - 1, 1)
                total, weights = total + w * forward_kl(p, q[r, c]), weights + w
        r, c, _ = tokens[t.length - 1]
        ends.append(-float(q[r, c, t.response_ids[t.length - 1]]))
    expected = total / weights + stop * average(ends)
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    assert ("loss/stop" in metrics) == bool(stop)


@given(seed=st.integers(0, 10**6), by=st.sampled_from(["step", "rank"]), stop=st.sampled_from([0.0, 1.0, 5.0]))
@settings(max_examples=15, deadline=None)
def test_late_and_stop_tokens_weigh_as_asked_for(seed, by, stop):
    """Of any objective; here of `path` with one level, which is then the weighted mean of each sequence's losses."""
    settings = {"objective": "path", "late_weight": 2.0, "late_by": by, "stop_weight": stop}
    trajectories, config, batch = make_case(seed, **settings)
    model = make_model(seed=3)
    with torch.no_grad():
        loss, _ = config.method.loss(batch, Ask(run(model, batch), None, MASK))
        logp = dense_logprobs(model, batch)
    means = []
    for (d, _), tokens in by_sequence(trajectories, batch).items():
        t = trajectories[d]
        total = weights = 0.0
        for r, c, target, rank, number in tokens:
            (block,) = (b for b in blocks_of(t) if (b[0] + len(t.prompt_ids)) // t.block_size == number)
            place = int(batch.position[r, c]) - len(t.prompt_ids)
            steps = sorted({t.step_map[i] for i in block})
            when, most = (steps.index(t.step_map[place]), len(steps)) if by == "step" else (rank, len(block))
            w = (1 + 2.0 * when / max(most - 1, 1)) * (stop if place == t.length - 1 else 1.0)
            total, weights = total - w * float(logp[r, c, target]), weights + w
        means.append(total / weights if weights else 0.0)
    assert float(loss) == pytest.approx(average(means), rel=1e-4, abs=1e-6)


def noisy_tokens(trajectories, batch):
    """Every noisy copy's response tokens, read from the input alone: {(document, copy): {place: (row, column, id)}}."""
    found = {}
    for r, c in (batch.copy > 0).nonzero().tolist():
        d, copy, p = (int(x[r, c]) for x in (batch.document, batch.copy, batch.position))
        place = p - len(trajectories[d].prompt_ids)
        if place >= 0:
            found.setdefault((d, copy), {})[place] = (r, c, int(batch.input_ids[r, c]))
    return found


def blocks_of(trajectory):
    """The places of each block's response tokens, in order."""
    found = {}
    for place in range(len(trajectory.response_ids)):
        found.setdefault((place + len(trajectory.prompt_ids)) // trajectory.block_size, []).append(place)
    return list(found.values())


def average(values):
    return sum(values) / len(values) if values else 0.0


def certainty_by_hand(trajectories, batch, logp, counted, parts, config, entropy_parts):
    total = 0.0
    for part in parts:
        ce, entropy = [], []
        for (d, copy), tokens in noisy_tokens(trajectories, batch).items():
            for place, (r, c, _) in tokens.items():
                if (copy - 1) % 2 != part or not counted(d, copy, place):
                    continue
                p = logp[r, c]
                target = trajectories[d].response_ids[place]
                ce.append(-float(p[target]))
                if part in entropy_parts and int(p.argmax()) == target:
                    tempered = [math.exp(float(x) / config.certainty_temperature) for x in p if x > -math.inf]
                    entropy.append(-sum(x / sum(tempered) * math.log(x / sum(tempered)) for x in tempered))
        total += average(ce) + config.certainty_weight * average(entropy)
    return total


@given(seed=st.integers(0, 10**6), copies=st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_dparallel_is_its_formula(seed, copies):
    trajectories, config, batch = make_case(seed, objective="dparallel", states_per_sequence=copies)
    model = teach(make_model(seed=3), trajectories, batch)
    with torch.no_grad():
        loss, metrics = config.method.loss(batch, Ask(run(model, batch), None, MASK))
        logp = dense_logprobs(model, batch)
    noisy = noisy_tokens(trajectories, batch)

    def counted(d, copy, place):
        return noisy[d, copy][place][2] == MASK and place < trajectories[d].length

    expected = certainty_by_hand(trajectories, batch, logp, counted, (0, 1), config, (0, 1))
    assert float(loss) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert metrics["loss/entropy"] > 0 or not metrics["share_right"]
    for (d, copy), tokens in noisy.items():
        if copy % 2 == 0:  # the complement of the copy before it
            assert all((x[2] == MASK) != (noisy[d, copy - 1][place][2] == MASK) for place, x in tokens.items())


def teach(model, trajectories, batch):
    """The model with a head that makes some predictions right, which random ones hardly are."""
    frequent = max(set(batch.target.tolist()), key=batch.target.tolist().count) if len(batch.target) else 2
    hidden = model.model(
        input_ids=batch.input_ids,
        attention_mask={"full_attention": batch.layout.boolean_mask()},
        position_ids=batch.position,
    ).last_hidden_state.flatten(0, 1)[batch.select]
    with torch.no_grad():
        model.lm_head.weight[frequent] += 0.2 * hidden.mean(0) if len(hidden) else 0.0
    return model


@given(seed=st.integers(0, 10**6), copies=st.integers(1, 4), progress=st.sampled_from([0.0, 0.3, 1.0]))
@settings(max_examples=15, deadline=None)
def test_pseudo_trajectory_grows_from_half_a_block_to_all_of_it(seed, copies, progress):
    trajectories, config, batch = make_case(
        seed, block_size=8, progress=progress, objective="pseudo_trajectory", states_per_sequence=copies
    )
    noisy = noisy_tokens(trajectories, batch)
    supervised = set(batch.select.tolist())
    length = batch.input_ids.shape[1]
    learnt = {}
    for (d, copy), tokens in noisy.items():
        t = trajectories[d]
        for block in blocks_of(t):
            width = max(int((0.5 + 0.5 * progress) * len(block)), 1)
            masks = [place for place in block if tokens[place][2] == MASK]
            windows = [block[i : i + width] for i in range(0, len(block), width)]
            order = {place: (t.step_map[place], -t.confidence[place], place) for place in block}

            def fits(window, copy=copy, masks=masks, block=block, order=order):
                inside = [place for place in masks if place in window]
                behind = [place for place in block if place > window[-1]]
                last = sorted(window, key=order.get)
                first_part = sorted(inside) == sorted(last[len(last) - len(inside) :]) and inside
                second_part = sorted(inside) == sorted(last[: len(inside)])
                return sorted(masks) == sorted(inside + behind) and (first_part if copy % 2 else second_part)

            window = next(filter(fits, windows))
            learnt[d, copy] = learnt.get((d, copy), set()) | {place for place in masks if place in window}
            if progress == 1.0 and copy % 2:
                assert len(masks) == math.ceil(0.8 * len(block))
        for place, (r, c, _) in tokens.items():
            assert place not in learnt[d, copy] or place >= t.length or r * length + c in supervised

    model = teach(make_model(seed=3, block_size=8), trajectories, batch)
    with torch.no_grad():
        loss, _ = config.method.loss(batch, Ask(run(model, batch), None, MASK))
        logp = dense_logprobs(model, batch)

    def counted(d, copy, place):
        r, c, _ = noisy[d, copy][place]
        return r * length + c in supervised

    expected = certainty_by_hand(trajectories, batch, logp, counted, (0, 1), config, (0,))
    assert float(loss) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def committed_logprobs(model, t, position, shown=()):
    """The model's distribution before the step that committed the token at `position`; it sees `shown`, too."""
    start, begin = len(t.prompt_ids), position // t.block_size * t.block_size
    state = [
        (t.prompt_ids + t.response_ids)[i]
        if i < start or t.step_map[i - start] < t.step_map[position - start] or i in shown
        else MASK
        for i in range(begin, begin + t.block_size)
    ]
    with torch.no_grad():
        logits = decoder_logits(model, t, state, begin)[position - begin].double()
    logits[MASK] = -math.inf
    return logits.log_softmax(-1)


def forward_kl(logp, logq):
    return sum(math.exp(float(a)) * (float(a) - float(b)) for a, b in zip(logp, logq, strict=True) if a > -math.inf)


@given(seed=st.integers(0, 10**6), near=st.integers(1, 3), copies=st.integers(1, 2))
@settings(max_examples=15, deadline=None)
def test_tad_is_its_formula(seed, near, copies):
    trajectories, config, batch = make_case(
        seed, objective="tad", tad_near=near, states_per_sequence=copies, tad_kl_weight=0.7
    )
    student, teacher = make_model(seed=1), make_model(seed=2)
    with torch.no_grad():
        loss, _ = config.method.loss(batch, Ask(run(student, batch), run(teacher, batch), MASK))
        logq, logp = dense_logprobs(student, batch), dense_logprobs(teacher, batch)
    ce, kl = [], []
    for (d, _), tokens in noisy_tokens(trajectories, batch).items():
        t = trajectories[d]
        for block in blocks_of(t):
            masked = [place for place in block if tokens[place][2] == MASK]
            steps = sorted({t.step_map[place] for place in masked})  # those still to come
            assert masked == [place for place in block if t.step_map[place] >= steps[0]]
            for place in masked:
                if place >= t.length:
                    continue
                r, c, _ = tokens[place]
                if t.step_map[place] in steps[:near]:
                    ce.append(-float(logq[r, c, t.response_ids[place]]))
                else:
                    kl.append(forward_kl(logp[r, c], logq[r, c]))
    assert float(loss) == pytest.approx(average(ce) + 0.7 * average(kl), rel=1e-4, abs=1e-6)


@given(seed=st.integers(0, 10**6), copies=st.integers(1, 2), denoising=st.sampled_from([0.0, 0.3]))
@settings(max_examples=8, deadline=None)
def test_consistency_is_its_formula(seed, copies, denoising):
    trajectories, config, batch = make_case(
        seed, objective="consistency", states_per_sequence=copies, cdlm_distill=0.9, cdlm_denoising=denoising
    )
    student, teacher = make_model(seed=1), make_model(seed=2)
    with torch.no_grad():
        loss, _ = config.method.loss(batch, Ask(run(student, batch), run(teacher, batch), MASK))
        logq = dense_logprobs(student, batch)
    noisy = noisy_tokens(trajectories, batch)
    distil, agree, ce = [], [], []
    size = 3 if denoising else 2
    for d, t in enumerate(trajectories):
        start = len(t.prompt_ids)
        for first in range(1, size * copies, size):
            now, later = noisy[d, first], noisy[d, first + 1]
            for block in blocks_of(t):
                new = [p for p in block if now[p][2] == MASK and later[p][2] != MASK]
                still = [p for p in block if later[p][2] == MASK]
                assert new
                assert all(now[p][2] == MASK for p in still)
                assert all(t.step_map[a] < t.step_map[b] for a in new for b in still)
                for p in new:
                    distil.append(forward_kl(committed_logprobs(teacher, t, p + start), logq[now[p][0], now[p][1]]))
                for p in still:
                    agree.append(forward_kl(logq[later[p][0], later[p][1]], logq[now[p][0], now[p][1]]))
                if denoising:
                    masked = [p for p in block if noisy[d, first + 2][p][2] == MASK]
                    ce.append(average([-float(logq[noisy[d, first + 2][p][:2]][t.response_ids[p]]) for p in masked]))
    expected = 0.9 * average(distil) + config.cdlm_consistency * average(agree) + denoising * average(ce)
    assert float(loss) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_the_later_state_is_not_pulled_to_the_earlier_one():
    """`consistency` alone must not move what the student predicts at y*."""
    _, config, batch = make_case(5, objective="consistency", cdlm_distill=0.0)
    student, teacher = make_model(seed=1), make_model(seed=2)
    hidden = []

    def forward(head):
        def keep(h, w):
            h.retain_grad()
            hidden.append(h)
            return head(h, w)

        return run(student, batch)(keep)

    loss, _ = config.method.loss(batch, Ask(forward, run(teacher, batch), MASK))
    loss.backward()
    moved = hidden[0].grad.abs().sum(1) > 0
    assert torch.equal(moved, batch.part == 1)
    assert moved.any()


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "mean_field"])
def test_a_batch_without_supervised_positions_costs_nothing(name):
    trajectories, config, batch = make_case(0, objective=name)
    trajectory = trajectories[0]
    dataset = StateDataset([trajectory], config, 4, MASK, vocabulary=60)
    example = dataset[0]
    for key in example.keys() - {"item", "block_size", "input_ids", "copy", "position", "group"}:
        example[key] = example[key][:0]
    batch = TrainingBatch(**collate([example], PAD, 4))
    student, reference = make_model(seed=1), make_model(seed=2)
    loss, metrics = config.method.loss(batch, Ask(run(student, batch), run(reference, batch), MASK))
    loss.backward()
    assert loss.item() == 0 or name in ("t3d", "ddo")
    assert all(np.isfinite(value.item()) for value in metrics.values())
    assert all(w.grad is None or not w.grad.any() for w in student.parameters())


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
