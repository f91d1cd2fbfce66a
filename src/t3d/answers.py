"""Answers to problems, decoded, verified and stored as they end: the loop of rollouts, evaluations and `eval_every`.

What an objective decodes while it trains (`t3d.distill.contexts`) is another matter: answers to stored prompts, wanted
in order and all at once, and forgotten after the step.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from operator import attrgetter

from t3d.decoding.config import DecodingConfig
from t3d.engine import Engine, FinishedEvent
from t3d.tasks import Problem, Task, Verdict
from t3d.trajectories import CONTEXT, MESSAGES, Trajectory, TrajectoryWriter

JUDGED_TOGETHER = 64  # answers verified at a time, at most
GROUP_SECONDS = 2.0  # after which those that have ended are verified, however few


@dataclass(frozen=True)
class Job:
    """One answer to write."""

    problem: Problem
    prompt_ids: list[int]
    sample: int
    seed: int

    @property
    def key(self) -> tuple[str, int]:
        """What the store calls the answer."""
        return self.problem.id, self.sample


@dataclass(frozen=True)
class Answer:
    """trajectory: named after its problem, with the verdict. seconds: of decoding since the answer before it."""

    trajectory: Trajectory
    verdict: Verdict
    seconds: float


def answers(
    engine: Engine, jobs: list[Job], decoding: DecodingConfig, task: Task, together: int = JUDGED_TOGETHER
) -> Iterator[list[Answer]]:
    """The answers in groups as they end, at most `together`; a group, perhaps an empty one, comes every few seconds.

    What had ended before an error or Ctrl-C still comes. Seconds are kept with each answer, so they are right whatever
    a kill takes away: it takes the time of what it takes. Judging, and what is done with a group, is not decoding.
    """
    ended: list[tuple[FinishedEvent, float]] = []

    def group() -> list[Answer]:
        found = [(jobs[event.index], event.trajectory, seconds) for event, seconds in ended]
        ended.clear()
        if not found:
            return []
        verdicts = task.judge_all([t.text for _, t, _ in found], [job.problem for job, _, _ in found])
        return [
            Answer(_named(trajectory, job, verdict, task), verdict, seconds)
            for (job, trajectory, seconds), verdict in zip(found, verdicts, strict=True)
        ]

    events = engine.stream(
        [job.prompt_ids for job in jobs],
        replace(task.guided(decoding, engine.tokenizer), n=1),
        seeds=[job.seed for job in jobs],
        names=[job.problem.id for job in jobs],
    )
    start = handed = time.perf_counter()
    try:
        for event in events:
            now = time.perf_counter()
            if isinstance(event, FinishedEvent):
                ended.append((event, now - start))
                start = now
            if len(ended) == together or now - handed >= GROUP_SECONDS:
                yield group()
                handed = time.perf_counter()
                start += handed - now
    except (Exception, KeyboardInterrupt):
        yield group()
        raise
    yield group()


def store_answers(
    writer: TrajectoryWriter,
    engine: Engine,
    jobs: list[Job],
    decoding: DecodingConfig,
    task: Task,
    *,
    together: int = JUDGED_TOGETHER,
    row: Callable[[Answer], Trajectory] = attrgetter("trajectory"),
) -> Iterator[int]:
    """Write the answers that `writer` does not have yet, each as the `row` that is made of it.

    Yields how many of the jobs the writer has: first those of earlier attempts, then as groups of them end.
    """
    done = writer.done()
    todo = [job for job in jobs if job.key not in done]
    count = len(jobs) - len(todo)
    yield count
    for group in answers(engine, todo, decoding, task, together):
        for answer in group:
            writer.write(row(answer))
        writer.flush_if_due()
        count += len(group)
        yield count


def _named(trajectory: Trajectory, job: Job, verdict: Verdict, task: Task) -> Trajectory:
    problem, extra = job.problem, {}
    if problem.messages is not None:  # `question` tells a chat for people
        extra = {MESSAGES: task.messages(problem, task.prompt_text(problem))}
    asked = problem.question if problem.messages is None else problem.messages[-1]["content"]
    if passages := task.retrieved(asked):
        extra[CONTEXT] = [asdict(passage) for passage in passages]
    return replace(
        trajectory,
        prompt_id=problem.id,
        sample=job.sample,
        question=problem.question,
        answer=problem.answer,
        correct=verdict.correct,
        extra=trajectory.extra | extra,
    )
