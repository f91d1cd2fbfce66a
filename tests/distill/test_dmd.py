"""`dmd`: its gradient is that of KL between what is shown of student and teacher, enumerated; the fake model."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from t3d.distill import T3DConfig, T3DTrainer
from t3d.distill.batch import TrainingBatch, collate
from t3d.distill.data import StateDataset
from t3d.distill.objective import Ask
from t3d.distill.objectives import dmd
from t3d.distill.objectives.dmd import masked_again, show_others
from t3d.errors import T3DError
from tests.conftest import make_model
from tests.distill.test_layout import MASK, PAD, random_trajectory
from tests.distill.test_mean_field import runner
from tests.distill.test_objectives import dense_logprobs
from tests.distill.test_trainer import config, trajectories, weights


def make_batch(seed=0, documents=3, own=True, block_size=4, steps=None, **settings):
    """steps: in how many steps the student wrote each block."""
    rng = np.random.default_rng(seed)
    found = [random_trajectory(rng, block_size, int(rng.integers(1, 9)), 3) for _ in range(documents)]
    if steps:
        found = [replace(t, step_map=[s % steps for s in t.step_map]) for t in found]
    arguments = T3DConfig(output_dir="unused", objective="dmd", use_cpu=True, **settings)
    dataset = StateDataset(found, arguments, block_size, MASK, vocabulary=60)
    examples = [
        dataset.states(t, np.random.default_rng(i), *([] if own else [i])) for i, t in enumerate(found)
    ]  # without a place in the dataset they are the student's own
    return TrainingBatch(**collate(examples, PAD, block_size)), arguments.method


def conditional(joint: Tensor, ids: list[int], i: int) -> Tensor:
    """Log-probabilities of token i given the tokens of `ids` that are not the mask, from a joint `(words,) * n`."""
    words = joint.shape[0]
    rest = joint[tuple(slice(None) if ids[j] == words or j == i else ids[j] for j in range(len(ids)))]
    left = [j for j in range(len(ids)) if ids[j] == words or j == i]  # what the axes that remain stand for
    other = [axis for axis, j in enumerate(left) if j != i]
    rest = rest.sum(other) if other else rest
    return (rest / rest.sum()).log()


def marginal(joint: Tensor, shown: tuple[int, ...]) -> Tensor:
    hidden = [j for j in range(joint.dim()) if j not in shown]
    return joint.sum(hidden) if hidden else joint


def level_kl(q: Tensor, p: Tensor) -> Tensor:
    """1/n sum_k mean over V of k tokens of KL(q_V || p_V) / k, for joints `(words,) * n`."""
    n, total = q.dim(), 0.0
    for k in range(1, n + 1):
        sets = list(itertools.combinations(range(n), k))
        for shown in sets:
            a, b = marginal(q, shown), marginal(p, shown)
            total = total + (a * (a.log() - b.log())).sum() / (n * k * len(sets))
    return total


def product(tables: Tensor) -> Tensor:
    """The joint of independent tokens, from probabilities `(n, words)`."""
    joint = torch.ones((), dtype=tables.dtype)
    for row in tables:
        joint = joint[..., None] * row
    return joint


@pytest.mark.parametrize("fake", ["learned", "none"])
def test_the_gradient_is_that_of_the_kl_at_every_noise_level(monkeypatch, fake):
    """One block, any q and joint p of few words: gradients averaged over all samples and masks, against the enumerated
    divergence. Student, teacher and a fake model that knows the student's conditionals are tables."""
    torch.manual_seed(0)
    n, words = 3, 3
    joint = torch.randn([words] * n, dtype=torch.float64).flatten().softmax(0).view([words] * n)
    logits = torch.randn(n, words, dtype=torch.float64, requires_grad=True)
    (exact,) = torch.autograd.grad(level_kl(product(logits.softmax(-1)), joint), logits)
    total = expected_gradient(
        monkeypatch, lambda x: logits, product(logits.softmax(-1)).detach(), joint, logits, fake == "learned"
    )
    torch.testing.assert_close(total, exact, atol=1e-5, rtol=1e-5)


def test_it_is_so_for_a_last_step_after_others(monkeypatch):
    """The first token is written before the others, whose logits depend on it: then the student's joint is not a
    product, and its conditionals are the fake model's, not its own predictions."""
    torch.manual_seed(1)
    n, words = 3, 3
    joint = torch.randn([words] * n, dtype=torch.float64).flatten().softmax(0).view([words] * n)
    first = torch.randn(words, dtype=torch.float64)
    later = torch.randn(words, n - 1, words, dtype=torch.float64, requires_grad=True)
    own = torch.stack([p * product(t) for p, t in zip(first.softmax(0), later.softmax(-1), strict=True)])
    (exact,) = torch.autograd.grad(level_kl(own, joint), later)

    def student(x):
        return torch.cat([first[None], later[x[0]]])

    found = {
        learned: expected_gradient(monkeypatch, student, own.detach(), joint, later, learned)
        for learned in (True, False)
    }
    torch.testing.assert_close(found[True], exact, atol=1e-5, rtol=1e-5)
    assert (found[False] - exact).abs().max() > 1e-3  # the fake model is needed


def expected_gradient(monkeypatch, student, own: Tensor, joint: Tensor, parameters: Tensor, learned: bool) -> Tensor:
    """The objective's gradient over samples from `own`, `(words,) * n`, and over masks, where `student(x)` gives the
    logits `(n, words)` that wrote the sample x."""
    n, words = own.dim(), own.shape[0]
    trajectory = replace(
        random_trajectory(np.random.default_rng(0), n, n, 1),
        prompt_ids=[words + 1] * n,
        response_ids=[0] * n,
        step_map=[0] * n,
        confidence=[0.5] * n,
        length=n,
    )
    arguments = T3DConfig(output_dir="unused", objective="dmd", use_cpu=True, dmd_floor=-1e3)
    dataset = StateDataset([trajectory], arguments, n, mask_id=words, vocabulary=words)
    batch = TrainingBatch(**collate([dataset.states(trajectory, np.random.default_rng(0))], words + 1, n))
    head = torch.eye(words + 1, words, dtype=torch.float64)  # the last row is the mask's

    def table(distribution: Tensor):
        def ask(take, asked):
            row = asked.input_ids[0]
            block = (asked.copy[0] > 0).nonzero().flatten()
            ids = row[block[asked.position[0, block].argsort()]].tolist()
            places = (asked.position.flatten()[asked.select] - n).tolist()
            return take(torch.stack([conditional(distribution, ids, i) for i in places]), head)

        return ask

    total = torch.zeros_like(parameters)
    for x in itertools.product(range(words), repeat=n):
        sample = replace(batch, target=torch.tensor(x))
        for k in range(1, n + 1):
            sets = list(itertools.combinations(range(n), k))
            for chosen in sets:
                again = torch.tensor([i in chosen for i in range(n)])
                monkeypatch.setattr(dmd, "masked_again", lambda *_, again=again: again)
                logits = student(x)
                ask = Ask(lambda take, _, logits=logits: take(logits, head), table(joint), words)
                ask.critic = table(own) if learned else None
                loss, _ = arguments.method.loss(sample, ask)
                total += own[x] / (n * len(sets)) * torch.autograd.grad(loss, parameters)[0]
    return total


def test_the_number_of_masks_is_uniform_and_the_places_are_random():
    torch.manual_seed(0)
    block = torch.arange(30_000) // 4
    block[-2:] += 1  # two blocks of two
    for noise, most in ((1.0, 4), (0.5, 2), (0.1, 1)):
        again = masked_again(block, noise)[: 4 * 7499].view(-1, 4)
        number = again.sum(1)
        assert number.unique().tolist() == list(range(1, most + 1))
        torch.testing.assert_close(again.float().mean(0), torch.full((4,), (most + 1) / 8), atol=0.02, rtol=0)
        assert all(abs((number == k).float().mean() - 1 / most) < 0.02 for k in range(1, most + 1))
    assert 0 < masked_again(block, 1.0)[-2:].sum() <= 2


@pytest.mark.parametrize("heat", [1.0, 0.5])
@pytest.mark.parametrize(("steps", "critic"), [(1, True), (3, True), (3, False)])
def test_the_loss_is_its_formula(monkeypatch, steps, critic, heat):
    settings = {"late_weight": 1.0, "states_per_sequence": 2, "on_policy_temperature": heat}
    batch, objective = make_batch(2, steps=steps, **settings)
    torch.manual_seed(0)
    again = masked_again(batch.block)
    monkeypatch.setattr(dmd, "masked_again", lambda *_: again)
    student, teacher, fake = (make_model(seed=seed) for seed in (1, 2, 3))
    ask = Ask(runner(student, batch), runner(teacher, batch), MASK, runner(fake, batch) if critic else None)
    with torch.no_grad():
        loss, _ = objective.loss(batch, ask)
        values = torch.zeros(len(again), dtype=torch.float64)
        shown = batch.input_ids.clone()
        shown.view(-1)[batch.select] = torch.where(again, MASK, batch.target)
        other = replace(batch, input_ids=shown)
        logp, logf = (dense_logprobs(m, other).flatten(0, 1)[batch.select] for m in (teacher, fake))
        for i in again.nonzero().flatten().tolist():
            before = batch.input_ids.clone()
            written = (batch.block == batch.block[i]) & (batch.step < batch.step[i])
            before.view(-1)[batch.select[written]] = batch.target[written]
            logq = dense_logprobs(student, replace(batch, input_ids=before)).flatten(0, 1)[batch.select[i]]
            logq = (logq / heat).log_softmax(-1)
            f = logf[i] if critic else logq
            values[i] = sum(float(logq[v].exp() * (f[v].clamp(min=-12) - logp[i, v].clamp(min=-12))) for v in range(63))
    each = []
    for block in batch.block.unique():
        here = again & (batch.block == block)
        each.append(float((values * batch.weight)[here].sum() / batch.weight[here].sum()))
    assert float(loss) == pytest.approx(np.mean(each), rel=1e-4, abs=1e-5)


def test_steps_with_trajectories_are_cross_entropy():
    batch, objective = make_batch(3, own=False, dmd_anchor=0.5, on_policy_share=0.5)
    student = make_model(seed=1)
    loss, metrics = objective.loss(batch, Ask(runner(student, batch), None, MASK))
    logq = dense_logprobs(student, batch).flatten(0, 1)[batch.select]
    assert (batch.input_ids.flatten()[batch.select] == MASK).all()
    expected = -logq.gather(1, batch.target[:, None])[batch.labelled.bool()].mean()
    assert float(loss) == pytest.approx(0.5 * float(expected), rel=1e-4)
    assert float(metrics["loss/anchor"]) == pytest.approx(float(expected), rel=1e-4)


def test_the_fake_model_learns_what_the_student_writes(tmp_path):
    """Its cross-entropy on the student's samples falls below the teacher's, although the student stays."""
    settings = {"objective": "dmd", "fake_updates": 4, "fake_learning_rate": 1e-2, "learning_rate": 0.0}
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(8)  # a student that is surer than a fresh one, so that there is more to learn
    arguments = config(tmp_path, max_steps=12, save_steps=100, round_interval=0, on_policy_steps=[1], **settings)
    trainer = T3DTrainer(model, arguments, trajectories())
    trainer.train()
    batch = trainer._own_contexts(TrainingBatch(**trainer.data_collator([trainer.train_dataset[i] for i in range(12)])))
    losses = []
    for network in (trainer.reference.model, trainer.critic.model.eval()):
        torch.manual_seed(0)
        with torch.no_grad():
            loss = arguments.method.critic_loss(batch, runner_in(network), MASK)
        losses.append(float(loss))
    assert losses[1] < losses[0] - 0.1


def runner_in(model):
    def forward(head, batch):
        return model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask("block_sdpa"),
            position_ids=batch.position,
            select=batch.select,
            head=lambda hidden, _: model.lm_head(hidden, head),
        )

    return forward


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("tie", [False, True])
def test_a_resumed_run_ends_with_the_same_student_and_fake_model(tmp_path, share, tie):
    settings = {"objective": "dmd", "max_steps": 6, "save_steps": 3, "round_interval": 0, "on_policy_share": share}
    whole = T3DTrainer(make_model(tie=tie), config(tmp_path, fake_updates=2, **settings), trajectories())
    whole.train()
    again = T3DTrainer(make_model(tie=tie), config(tmp_path, fake_updates=2, **settings), trajectories())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for mine, other in ((whole.model, again.model), (whole.critic.model, again.critic.model)):
        for (name, a), b in zip(weights(mine).items(), weights(other).values(), strict=True):
            assert torch.equal(a, b), name
    moved = zip(whole.critic.model.parameters(), whole.reference.model.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in moved)


def test_the_teacher_is_asked_at_what_is_shown():
    batch, _ = make_batch(4, states_per_sequence=2)
    torch.manual_seed(0)
    again = masked_again(batch.block)
    shown = show_others(batch, again, MASK)
    assert (shown.input_ids.flatten()[shown.select] == MASK).all()
    assert torch.equal(shown.target, batch.target[again])
    assert int((shown.input_ids == MASK).sum()) == int(again.sum())


def test_without_updates_there_is_no_fake_model(tmp_path):
    settings = {"objective": "dmd", "max_steps": 2, "fake_updates": 0, "round_interval": 0}
    trainer = T3DTrainer(make_model(), config(tmp_path, **settings), trajectories())
    before = weights(trainer.model)
    trainer.train()
    assert trainer.critic is None
    assert any(not torch.equal(w, before[name]) for name, w in weights(trainer.model).items())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dmd_noise": 0.0}, "dmd_noise must lie in 0..1, above 0"),
        ({"fake_updates": -1}, "fake_updates must not be negative"),
        ({"fake_learning_rate": -1.0}, "fake_learning_rate must not be negative"),
        ({"on_policy_share": 0.5, "dmd_anchor": 0.0}, "set on_policy_share=1"),
        ({"on_policy_temperature": 0.0}, "objective dmd needs it above 0"),
        ({"lora_rank": 2}, "dmd trains a whole copy beside the student"),
    ],
)
def test_bad_settings_are_one_line(tmp_path, settings, words):
    with pytest.raises(T3DError, match=words) as caught:
        config(tmp_path, objective="dmd", **settings)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_without_a_fake_model_is_refused(tmp_path):
    settings = {"objective": "dmd", "max_steps": 4, "round_interval": 0, "save_steps": 2}
    T3DTrainer(make_model(), config(tmp_path, fake_updates=0, **settings), trajectories()).train()
    again = T3DTrainer(make_model(), config(tmp_path, **settings), trajectories())
    with pytest.raises(T3DError, match="holds no critic to continue with"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
