"""`cj_grpo`: its loss against loops, its states against what the decoder saw, and training that goes on exactly."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from t3d.distill import T3DConfig, T3DTrainer
from t3d.distill.answer_groups import decoding, own_groups
from t3d.distill.batch import TrainingBatch, collate
from t3d.distill.data import StateDataset
from t3d.distill.objective import Ask
from t3d.distill.rewards import Judge, advantages, find_reward, worth
from t3d.distill.sampler import DrawSampler
from t3d.engine import Engine
from t3d.errors import T3DError
from t3d.tasks import Problem, TaskConfig, get_task
from t3d.trajectories import NFE
from tests.conftest import make_model
from tests.distill.test_layout import MASK, PAD, decoder_logits, random_trajectory
from tests.distill.test_objectives import average, blocks_of, run
from tests.distill.test_trainer import config, trajectories, weights


def arguments(**settings):
    return T3DConfig(output_dir="unused", objective="cj_grpo", use_cpu=True, **settings)


def dataset_of(data, config, block_size=4):
    return StateDataset(data, config, block_size, MASK, vocabulary=60)


def logprob(model, answer, place, temperature=1.0):
    """log p of the token at `place`, float64, in the state before the step that committed it."""
    start = len(answer.prompt_ids)
    begin = (start + place) // answer.block_size * answer.block_size
    state = []
    for position in range(begin, begin + answer.block_size):
        shown = position < start or answer.step_map[position - start] < answer.step_map[place]
        state.append((answer.prompt_ids + answer.response_ids)[position] if shown else MASK)
    with torch.no_grad():
        logits = decoder_logits(model, answer, state, begin)[start + place - begin].double() / temperature
    logits[MASK] = -math.inf
    return float(logits.log_softmax(-1)[answer.response_ids[place]])


@given(
    seed=st.integers(0, 10**6),
    clip=st.sampled_from([0.01, 0.2, 1.0]),
    kl=st.sampled_from([0.0, 0.5]),
    temperature=st.sampled_from([1.0, 0.7]),
    equal=st.booleans(),
)
@examples(max_examples=12, deadline=None)
def test_the_loss_is_its_formula(seed, clip, kl, temperature, equal):
    """Scripted answers: their rewards, lengths and step maps are random, and one group's rewards may be equal."""
    rng, group = np.random.default_rng(seed), 3
    settings = arguments(rl_group=group, rl_clip=clip, rl_kl=kl, rl_temperature=temperature)
    data = [random_trajectory(rng, 4, int(rng.integers(1, 7)), 2) for _ in range(2)]
    answers = []
    for t in data:
        for _ in range(group):
            answer = random_trajectory(rng, 4, len(t.prompt_ids), int(rng.integers(1, 4)))
            answer.prompt_ids = t.prompt_ids
            answers.append(answer)
    verdicts = [bool(rng.integers(2)) for _ in answers]
    if equal:
        verdicts[:group] = [True] * group
    engine = SimpleNamespace(generate=lambda prompts, config, seeds: answers)
    found, told, _ = own_groups(
        engine, dataset_of(data, settings), [0, 1], settings.method, lambda _: verdicts, [seed, 0]
    )
    batch = TrainingBatch(**collate(found, PAD, 4))
    new, old, reference = (make_model(seed=s) for s in (1, 2, 3))
    with torch.no_grad():
        for mine, theirs in zip(old.parameters(), new.parameters(), strict=True):
            mine.lerp_(theirs, 0.9)  # ratios on both sides of the clip
        batch.old_logp = run(old, batch)(settings.method.policy(batch, MASK))
        loss, _ = settings.method.loss(batch, Ask(run(new, batch), run(reference, batch), MASK))

    per_step, used = [], 0
    for g in range(2):
        rewards = [float(v) for v in verdicts[g * group : (g + 1) * group]]
        for number, reward in enumerate(rewards):
            t, a = answers[g * group + number], reward - average(rewards)
            assert told[g * group + number][1] == reward
            if len(set(rewards)) == 1:
                continue
            used += 1
            for block in blocks_of(t):
                for step in sorted({t.step_map[i] for i in block}):
                    terms = []
                    for i in block:
                        if t.step_map[i] != step or i >= t.length:
                            continue
                        p, before, other = (logprob(m, t, i, temperature) for m in (new, old, reference))
                        r, d = math.exp(p - before), other - p
                        term = -min(r * a, min(max(r, 1 - clip), 1 + clip) * a)
                        terms.append(term + kl * (math.exp(d) - d - 1))
                    if terms:
                        per_step.append(average(terms))
    assert len(batch.item) == max(used, 1)
    assert float(loss) == pytest.approx(average(per_step), rel=2e-3, abs=1e-5)


def test_groups_without_spread_give_nothing():
    settings = arguments(rl_group=2)
    data = trajectories(2)
    answers = [data[0], data[0], data[1], data[1]]
    engine = SimpleNamespace(generate=lambda prompts, config, seeds: answers)
    found, _, _ = own_groups(engine, dataset_of(data, settings), [0, 1], settings.method, lambda a: [True] * 4, [0])
    batch = TrainingBatch(**collate(found, PAD, 4))
    assert len(batch.select) == len(batch.advantage) == len(batch.block) == 0
    assert batch.tokens > 0  # there is something to run, where other processes wait


@pytest.mark.parametrize("settings", [{"rl_steps": 1}, {"rl_steps": 2}, {"rl_steps": 4}, {"rl_threshold": 0.3}])
def test_states_are_those_that_the_decoder_saw(settings):
    """The confidence of a token is its untempered probability when it was committed; each is asked for once."""
    config = arguments(rl_group=3, **settings)
    model, dataset = make_model(), dataset_of(trajectories(3), config)
    seen = []

    def judge(answers):
        seen.extend(answers)
        return [number % 3 == 0 for number in range(len(answers))]

    found, _, _ = own_groups(Engine(model, max_batch_size=4), dataset, [0, 1, 2], config.method, judge, [0, 0])
    batch = TrainingBatch(**collate(found, PAD, 4))
    with torch.no_grad():
        logp = run(model, batch)(config.method.policy(batch, MASK))
    document, position = (x.flatten()[batch.select].tolist() for x in (batch.document, batch.position))
    places = [(d, p - len(seen[d].prompt_ids)) for d, p in zip(document, position, strict=True)]
    assert sorted(places) == [(d, i) for d, answer in enumerate(seen) for i in range(answer.length)]
    confidence = [seen[d].confidence[i] for d, i in places]
    torch.testing.assert_close(logp.exp(), torch.tensor(confidence), atol=1e-5, rtol=1e-3)
    if settings == {"rl_steps": 1}:
        assert batch.copy.max() == 1  # one noisy copy is the whole policy
    assert len({tuple(answer.response_ids) for answer in seen[:3]}) > 1


def has_token(answers):
    return [7 in answer.response_ids[: answer.length] for answer in answers]


def trainer(folder, model=None, judge=has_token, **settings):
    settings = {"objective": "cj_grpo", "round_interval": 0, "rl_group": 4} | settings
    return T3DTrainer(model or make_model(), config(folder, **settings), trajectories(), judge=judge)


def test_what_is_rewarded_becomes_frequent(tmp_path):
    training = trainer(tmp_path, max_steps=40, rl_updates=2, rl_kl=0.0, save_steps=100, logging_steps=4)
    training.train()
    rewards = [entry["answers/reward"] for entry in training.state.log_history if "answers/reward" in entry]
    assert rewards[-1] > rewards[0] + 0.3
    assert training.state.log_history[0]["clipped"] >= 0


@pytest.mark.parametrize("settings", [{}, {"round_interval": 2, "gradient_accumulation_steps": 2}])
def test_a_run_that_ends_between_updates_resumes_exactly(tmp_path, settings):
    """The checkpoint of step 4 is the first update of the second round of three; that of step 6 is between rounds."""
    settings = {"max_steps": 8, "rl_updates": 3, "rl_steps": 2, "save_steps": 2, **settings}
    settings["per_device_train_batch_size"] = 4 // settings.get("gradient_accumulation_steps", 1)
    whole = trainer(tmp_path, **settings)
    whole.train()
    for step in (4, 6):
        again = trainer(tmp_path, **settings)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        for (name, a), b in zip(weights(whole.model).items(), weights(again.model).values(), strict=True):
            assert torch.equal(a, b), (step, name)
    assert (tmp_path / "checkpoint-4" / "answers-00000.pt").exists()
    assert not (tmp_path / "checkpoint-6" / "answers-00000.pt").exists()
    (tmp_path / "checkpoint-4" / "answers-00000.pt").unlink()
    with pytest.raises(T3DError, match="lacks the answers in use"):
        trainer(tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_a_batch_is_drawn_for_as_many_steps_as_learn_from_it():
    """5 items in steps of 2: the last batch of an epoch is filled up, and every item is drawn."""
    sampler = DrawSampler(5, 2, 1, seed=3, times=3)
    draws = [draw.item for draw in sampler]
    assert len(draws) == len(sampler) == 18 == 2 * sampler.max_steps
    steps = [draws[i : i + 2] for i in range(0, 18, 2)]
    assert [steps[i] for i in (0, 3, 6)] == [steps[i] for i in (1, 4, 7)] == [steps[i] for i in (2, 5, 8)]
    assert sorted(draws[0:2] + draws[6:8] + draws[12:13]) == list(range(5))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rl_group": 1}, "rl_group must be at least 2"),
        ({"rl_temperature": 0.0}, "rl_temperature must be above 0"),
        ({"rl_clip": 0.0}, "rl_clip must lie in 0..1, above 0"),
        ({"rl_reward": "acuracy"}, "train.rl_reward is .*did you mean 'accuracy'"),
        ({"rl_reward": "no_such_module:f"}, "train.rl_reward: cannot import 'no_such_module:f'.*PYTHONPATH"),
        ({"rl_reward": "math:tau"}, "'math:tau' is no function"),
    ],
)
def test_bad_settings_are_one_line(settings, words):
    with pytest.raises(T3DError, match=words) as error:
        arguments(**settings)
    assert "\n" not in str(error.value)


def test_verdicts_are_asked_for_where_they_are_needed(tmp_path):
    with pytest.raises(T3DError, match=r"needs verdicts: give T3DTrainer `judge`"):
        trainer(tmp_path, judge=None)
    trainer(tmp_path, judge=None, rl_reward="format", max_steps=1, save_steps=100).train()
    with pytest.raises(T3DError, match="has no verdict; use rl_reward=format"):
        trainer(tmp_path, judge=lambda answers: [None] * len(answers)).train()


def shortness(text, trajectory, forwards):
    return -len(text) - forwards


def nothing(text, trajectory, forwards):
    return math.nan


def test_rewards():
    (answer,) = trajectories(1)
    answer.correct, answer.finish_reason, answer.nfe, answer.text = True, "length", NFE(denoise=3, commit=9), "four"
    assert worth("accuracy", answer, 0.0, 12) == 1.0
    assert worth("accuracy", answer, 0.4, 12) == pytest.approx(1 - 0.4 * 3 / 12)
    assert worth("format", answer, 0.0, 12) == 0.0
    assert find_reward(f"{__name__}:shortness") is shortness
    assert worth(f"{__name__}:shortness", answer, 0.0, 12) == -7
    with pytest.raises(T3DError, match="returned nan for"):
        worth(f"{__name__}:nothing", answer, 0.0, 12)
    assert advantages([1, 0, 0, 0.1, 0.1, 0.1], 3).tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3, 0, 0, 0])
    assert advantages([0.1] * 6, 6).tolist() == [0.0] * 6


def test_a_task_judges_answers_to_its_problems_and_to_others():
    task = get_task(TaskConfig(name="word_problems"))
    problems = task.problems("train", 2)
    answers = trajectories(3)
    texts = [f"\\boxed{{{problems[0].answer}}}", "\\boxed{-1}", "\\boxed{5}"]
    for answer, text, problem in zip(answers, texts, [*problems, Problem("other", "?", "5")], strict=True):
        answer.text, answer.prompt_id, answer.question, answer.answer = (
            text,
            problem.id,
            problem.question,
            problem.answer,
        )
    assert Judge(task, problems)(answers) == [True, False, True]


def test_answers_are_decoded_as_asked_for():
    method = arguments(rl_steps=9, rl_temperature=0.7).method
    assert (decoding(method, 4).steps, decoding(method, 4).temperature) == (4, 0.7)
    method = arguments(rl_threshold=0.6).method
    assert (decoding(method, 4).strategy, decoding(method, 4).threshold) == ("low_confidence_dynamic", 0.6)


def test_workers_decode_the_same_answers(tmp_path):
    """Two rounds, so that the workers get the weights of the second."""
    ray = pytest.importorskip("ray", reason="needs t3d[ray]")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=80 * 2**20)
    runs = [weights(make_model())]
    try:
        for engine in ({}, {"workers": 1}):
            settings = config(tmp_path, objective="cj_grpo", rl_group=4, rl_updates=2, max_steps=4, save_steps=100)
            training = T3DTrainer(make_model(), settings, trajectories(), judge=has_token, engine=engine)
            training.train()
            runs.append(weights(training.model))
    finally:
        ray.shutdown()
    before, here, there = runs
    assert all(torch.equal(weight, there[name]) for name, weight in here.items())
    assert any(not torch.equal(weight, before[name]) for name, weight in here.items())
