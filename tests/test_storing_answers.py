"""The loop that rollouts, evaluations and `eval_every` share."""

from dataclasses import replace

import pytest

from t3d import DecodingConfig, Engine
from t3d.answers import Job, answers, store_answers
from t3d.decoding.sampling import derive_seed
from t3d.distill.held_out import HeldOut
from t3d.tasks import TaskConfig, get_task
from t3d.tasks.word_problems import build_tokenizer
from t3d.trajectories import TrajectoryDataset, TrajectoryWriter
from tests.conftest import make_model

SETTING = DecodingConfig(steps=2, max_tokens=12, temperature=1.0)


@pytest.fixture(scope="module")
def parts():
    tokenizer, task = build_tokenizer(), get_task(TaskConfig(name="word_problems"))
    model = make_model(vocab_size=len(tokenizer) + 1, eos_token_id=tokenizer.eos_token_id)
    problems = task.problems("dev", 5)
    jobs = [
        Job(p, task.prompt(p, tokenizer), sample, 10 * i + sample) for i, p in enumerate(problems) for sample in (0, 1)
    ]
    return Engine(model, tokenizer, max_batch_size=3), task, jobs


def stored(folder):
    """Without what depends on the batch."""
    found = {(t.prompt_id, t.sample): replace(t, confidence=[], nfe=None) for t in TrajectoryDataset(folder)}
    return dict(sorted(found.items()))


def test_what_is_stored_is_not_decoded_again(parts, tmp_path, monkeypatch):
    monkeypatch.setattr("t3d.answers.GROUP_SECONDS", 600)  # groups of four, however slow the machine is
    engine, task, jobs = parts
    with TrajectoryWriter(tmp_path / "whole", {}) as writer:
        assert list(store_answers(writer, engine, jobs, SETTING, task, together=4)) == [0, 4, 8, 10]
    for attempt in (jobs[3:7], jobs):
        with TrajectoryWriter(tmp_path / "continued", {}) as writer:
            counts = list(store_answers(writer, engine, attempt, SETTING, task))
    assert (counts[0], counts[-1]) == (4, 10)
    assert stored(tmp_path / "continued") == stored(tmp_path / "whole")
    plain = engine.generate([j.prompt_ids for j in jobs], SETTING, seeds=[j.seed for j in jobs])
    for job, expected in zip(jobs, plain, strict=True):
        found = stored(tmp_path / "whole")[job.key]
        assert (found.response_ids, found.seed) == (expected.response_ids, job.seed)
        assert found.correct == task.verify(expected.text, job.problem)
        assert (found.question, found.answer) == (job.problem.question, job.problem.answer)


def test_what_had_ended_before_an_error_is_stored(parts, tmp_path, monkeypatch):
    monkeypatch.setattr("t3d.answers.GROUP_SECONDS", 600)
    engine, task, jobs = parts

    class Failing:
        tokenizer = engine.tokenizer

        def stream(self, *args, **kwargs):
            for event in engine.stream(*args, **kwargs):
                yield event
                if getattr(event, "index", None) == 4 and hasattr(event, "trajectory"):
                    raise RuntimeError("cable")

    with TrajectoryWriter(tmp_path, {}) as writer:
        counts = store_answers(writer, Failing(), jobs, SETTING, task)
        assert next(counts) == 0
        told = next(counts)
        with pytest.raises(RuntimeError, match="cable"):
            next(counts)
    assert told == len(TrajectoryDataset(tmp_path)) >= 1


def test_held_out_problems_are_counted_as_the_engine_and_the_task_say(parts):
    engine, task, _ = parts
    problems = task.problems("dev", 5)
    held_out = HeldOut(task, problems, engine.tokenizer, [4, 1], 12, {"max_batch_size": 2})
    found = [held_out(engine.model, part, 2) for part in (0, 1)]
    total = {name: tuple(map(sum, zip(*(f[name] for f in found), strict=True))) for name in found[0]}
    prompts, seeds = [task.prompt(p, engine.tokenizer) for p in problems], [derive_seed(0, i, 0) for i in range(5)]
    right = 0.0
    for steps in (4, 1):
        plain = engine.generate(prompts, DecodingConfig(steps=steps, max_tokens=12), seeds=seeds)
        hits = sum(bool(task.verify(t.text, p)) for t, p in zip(plain, problems, strict=True))
        assert total[f"accuracy/steps_{steps}"] == (hits, 5)
        assert total[f"tpf/steps_{steps}"] == (sum(t.length for t in plain), sum(t.nfe.predicting for t in plain))
        right += hits
    assert total["accuracy"] == (right, 10)
    assert held_out(engine.model, 5, 6) == {}


def test_answers_are_named_after_their_problems(parts):
    engine, task, jobs = parts
    ended = [answer for group in answers(engine, jobs, SETTING, task) for answer in group]
    assert {(a.trajectory.prompt_id, a.trajectory.sample) for a in ended} == {job.key for job in jobs}
    assert all(a.trajectory.correct == a.verdict.correct and a.seconds >= 0 for a in ended)
