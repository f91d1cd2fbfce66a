"""`mean_field`: its gradient is that of KL(q || p), enumerated for a small joint; its parts against slow ones."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from t3d.distill import T3DConfig
from t3d.distill.batch import TrainingBatch, collate
from t3d.distill.contexts import turns
from t3d.distill.data import StateDataset
from t3d.distill.logprobs import CHUNK
from t3d.distill.objective import Ask
from t3d.distill.objectives import mean_field
from t3d.distill.objectives.mean_field import _terms, masked_one_by_one, place_in_block
from t3d.trajectories import NFE, Trajectory
from tests.conftest import make_model
from tests.distill.test_layout import MASK, PAD, random_trajectory
from tests.distill.test_objectives import run


def make_batch(seed=0, documents=3, packed=False, block_size=4, **settings):
    rng = np.random.default_rng(seed)
    trajectories = [random_trajectory(rng, block_size, int(rng.integers(1, 9)), 3) for _ in range(documents)]
    config = T3DConfig(output_dir="unused", objective="mean_field", mask_exponent=1.0, use_cpu=True, **settings)
    dataset = StateDataset(trajectories, config, block_size, MASK, vocabulary=60)
    examples = [dataset[i] for i in range(documents)]
    return TrainingBatch(**collate(examples, PAD, block_size, 200 if packed else 1)), config


def test_the_gradient_is_that_of_the_reverse_kl_to_the_joint(monkeypatch):
    """One block of n masked positions, any q and any joint p of few words: the objective's gradients, averaged over all
    fills x ~ q, against that of the enumerated KL(q || p). Student and teacher are tables in place of networks."""
    torch.manual_seed(0)
    n, words = 4, 3
    joint = torch.randn([words] * n, dtype=torch.float64).flatten().softmax(0).view([words] * n)
    logits = torch.randn(n, words, dtype=torch.float64, requires_grad=True)
    fills = list(itertools.product(range(words), repeat=n))

    logq = logits.log_softmax(-1)
    of_fill = torch.stack([sum(logq[i, x[i]] for i in range(n)) for x in fills])
    kl = (of_fill.exp() * (of_fill - torch.stack([joint[x].log() for x in fills]))).sum()
    (exact,) = torch.autograd.grad(kl, logits)

    trajectory = Trajectory(
        prompt_ids=[words + 1] * n,
        response_ids=[0] * n,
        step_map=list(range(n)),
        confidence=[0.5] * n,
        length=n,
        finish_reason="stop",
        nfe=NFE(),
        block_size=n,
    )
    settings = {"objective": "mean_field", "mf_anchor": 0.0, "mf_forward": 0.0, "random_ratio": 0.0}
    config = T3DConfig(output_dir="unused", use_cpu=True, **settings)
    dataset = StateDataset([trajectory], config, n, mask_id=words, vocabulary=words)
    states = (dataset.states(trajectory, np.random.default_rng(seed)) for seed in itertools.count())
    batch = next(b for s in states if len((b := TrainingBatch(**collate([s], words + 1, n, 1))).select) == n)
    head = torch.eye(words + 1, words, dtype=torch.float64)  # the last row is the mask's

    def teacher(take, asked):
        hidden = []
        for place in asked.select.tolist():
            row, column = divmod(place, asked.input_ids.shape[1])
            block = (asked.copy[row] == asked.copy[row, column]).nonzero().flatten()
            ids = asked.input_ids[row, block[asked.position[row, block].argsort()]].tolist()
            assert ids.count(words) == 1  # one position is asked for, the others are filled
            hidden.append(joint[tuple(slice(None) if token == words else token for token in ids)].log())
        return take(torch.stack(hidden), head)

    total = torch.zeros_like(logits)
    for x, probability in zip(fills, of_fill.detach().exp(), strict=True):
        monkeypatch.setattr(mean_field, "choose_tokens", lambda *_, x=x: torch.tensor(x))
        loss, _ = config.method.loss(batch, Ask(lambda take: take(logits, head), teacher, words))
        total += probability * torch.autograd.grad(loss * n, logits)[0]  # the loss is a mean over positions
    torch.testing.assert_close(total, exact, atol=1e-5, rtol=1e-5)


def test_it_fits_the_vocabulary_of_a_real_model():
    """1,200 positions and 151,936 tokens, forward and backward: no tensor is wider than a chunk of positions."""
    vocabulary, positions, width = 151_936, 1200, 4
    torch.manual_seed(0)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    hidden = torch.randn(positions, width, requires_grad=True)
    batch = make_batch(documents=1)[0]
    batch = replace(
        batch,
        block=torch.arange(positions) // 4,
        target=torch.randint(0, vocabulary, (positions,)),
        weight=torch.ones(positions),
        labelled=torch.ones(positions),
        input_ids=torch.zeros(1, positions, dtype=torch.long),
        select=torch.arange(positions),
    )
    config = T3DConfig(output_dir="unused", objective="mean_field", use_cpu=True, mf_copies=1)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            nonlocal largest
            result = function(*arguments, **(keywords or {}))
            sizes = [x.untyped_storage().nbytes() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
            largest = max(largest, *sizes, 0)
            return result

    def teacher(take, asked):
        return take(hidden.detach()[::4] + 1, weight.detach())

    with pytest.MonkeyPatch.context() as patch, Watch():
        patch.setattr(mean_field, "masked_one_by_one", lambda *_: None)
        loss, _ = config.method.loss(batch, Ask(lambda take: take(hidden, weight), teacher, 3))
        loss.backward()
    assert loss.isfinite()
    assert hidden.grad.isfinite().all()
    assert largest <= 4 * vocabulary * CHUNK < 4 * vocabulary * positions


def test_every_teacher_copy_masks_one_position_and_fills_the_others():
    for seed, packed in itertools.product(range(4), (False, True)):
        batch, _ = make_batch(seed, packed=packed, states_per_sequence=1 + seed % 2, group_size=1 + seed % 3)
        torch.manual_seed(seed)
        fill = torch.randint(2, 60, batch.target.shape)
        turn = place_in_block(batch.block)
        copies = int(turn.max()) + 1
        asked = masked_one_by_one(batch, fill, turn, copies, MASK)
        model = make_model()
        with torch.no_grad():
            logits = model(asked.input_ids, asked.layout.boolean_mask(), asked.position, select=asked.select)
        length = batch.input_ids.shape[1]
        for i, place in enumerate(batch.select.tolist()):
            row, column = divmod(place, length)
            ids = batch.input_ids.clone()
            flat = ids.view(-1)
            flat[batch.select] = fill
            flat[place] = MASK  # by hand: everything filled but this one position
            layout = batch.layout
            with torch.no_grad():
                expected = model(ids, layout.boolean_mask(), batch.position).logits[row, column]
            torch.testing.assert_close(logits[i], expected, atol=2e-4, rtol=1e-4)


def test_fewer_copies_ask_a_random_part_of_the_positions():
    batch, _ = make_batch(1)
    torch.manual_seed(0)
    turn = place_in_block(batch.block, shuffle=True)
    for block in batch.block.unique():
        assert sorted(turn[batch.block == block].tolist()) == list(range(int((batch.block == block).sum())))
    asked = masked_one_by_one(batch, batch.target, turn, 1, MASK)
    assert asked.input_ids.shape == batch.input_ids.shape
    assert (asked.input_ids == MASK).sum() == len(batch.block.unique())


@pytest.mark.parametrize(("share", "size"), [(0.0, 1), (0.3, 3), (1.0, 2)])
def test_the_loss_is_its_formula(share, size):
    batch, config = make_batch(2, mf_anchor=0.5, mf_forward=share, group_size=size)
    batch.labelled[::2] = 1.0
    student, teacher = make_model(seed=1), make_model(seed=2)
    with torch.no_grad():
        loss, metrics = config.method.loss(batch, Ask(run(student, batch), runner(teacher, batch), MASK))
        logits = student(batch.input_ids, batch.layout.boolean_mask(), batch.position).logits.double()
        logits[..., MASK] = -torch.inf
        logq = logits.log_softmax(-1).flatten(0, 1)[batch.select]
        fill = logq.argmax(-1)
        terms, anchor = [], []
        for i, place in enumerate(batch.select.tolist()):
            ids = batch.input_ids.clone()
            ids.view(-1)[batch.select] = fill
            ids.view(-1)[place] = MASK
            other = teacher(ids, batch.layout.boolean_mask(), batch.position).logits.double().flatten(0, 1)[place]
            other[MASK] = -torch.inf
            logp = other.log_softmax(-1)
            reverse = sum(float(logq[i, v].exp() * (logq[i, v] - logp[v].clamp(min=-12))) for v in range(63))
            forward = sum(float(logp[v].exp() * (logp[v] - logq[i, v])) for v in range(63))
            terms.append((1 - share) * reverse + share * forward)
            if batch.labelled[i]:
                anchor.append(-float(logq[i, batch.target[i]]))
    expected = np.mean(terms) + 0.5 * np.mean(anchor)
    assert abs(float(loss) - expected) < 1e-4 * abs(expected)
    assert abs(float(metrics["loss/kl"]) - np.mean(terms)) < 1e-3


def runner(model, batch):
    return lambda head, other=batch: run(model, other)(head)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_chunked_terms_have_the_dense_gradient(share):
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(12, 8, requires_grad=True)
    teacher_hidden, target = torch.randn(5, 8), torch.randint(0, 11, (5,))
    kl, logp = _terms(hidden, weight, teacher_hidden, weight.detach(), target, 11, share, -1e3)
    logq = (hidden @ weight[:11].T).log_softmax(-1)
    other = (teacher_hidden @ weight[:11].detach().T).log_softmax(-1)
    expected = ((1 - share) * logq.exp() * (logq - other) + share * other.exp() * (other - logq)).sum(-1)
    torch.testing.assert_close(kl, expected)
    both = [
        torch.autograd.grad(x.sum() + y.sum(), (hidden, weight))
        for x, y in ((kl, logp), (expected, logq.gather(1, target[:, None])[:, 0]))
    ]
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b)


def test_shares_are_spread_evenly():
    assert [turns(step, 0.5) for step in range(6)] == [False, True] * 3
    assert not any(turns(step, 0.0) for step in range(10))
    assert all(turns(step, 1.0) for step in range(10))


def test_training_with_on_policy_contexts_resumes_exactly(tmp_path):
    from t3d.distill import T3DTrainer
    from tests.distill.test_trainer import config, trajectories, weights

    settings = {"objective": "mean_field", "max_steps": 6, "save_steps": 3, "round_interval": 0}
    data = trajectories()
    for trajectory in data:
        trajectory.correct = True
    whole = T3DTrainer(make_model(), config(tmp_path, **settings), data)
    whole.train()
    again = T3DTrainer(make_model(), config(tmp_path, **settings), data)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for (name, a), b in zip(weights(whole.model).items(), weights(again.model).values(), strict=True):
        assert torch.equal(a, b), name
