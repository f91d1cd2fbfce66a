"""Stage 1: the teacher answers the training prompts; tokens and step maps go to the store."""

import hashlib
from dataclasses import dataclass, replace

from tqdm import tqdm

from t3d.config import Recipe
from t3d.engine import Engine, FinishedEvent
from t3d.log import log
from t3d.pipeline.folder import RunFolder
from t3d.pipeline.inputs import Inputs
from t3d.pipeline.settings import settings
from t3d.pipeline.versions import versions
from t3d.tasks import Problem
from t3d.trajectories import TrajectoryDataset, TrajectoryWriter
from t3d.trajectories.fingerprint import model_fingerprint, tokenizer_fingerprint


@dataclass(frozen=True)
class Job:
    """One response to write."""

    problem: Problem
    prompt_ids: list[int]
    sample: int
    seed: int


def sequence_seed(base: int | str, prompt_id: str, sample: int) -> int:
    """A sequence's own seed, `0 .. 2**63 - 1`: of what it is, not of where in a batch or a run it happens to be."""
    digest = hashlib.sha256(f"{base}/{prompt_id}/{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def check_rollout(recipe: Recipe, inputs: Inputs) -> None:
    """Raises T3DError for settings that the model cannot decode with, or prompts that do not fit it."""
    decoding = recipe.rollout.decoding(recipe.seed)
    make_engine(recipe, inputs).stream(inputs.train_prompts, decoding)  # checks; decodes when iterated


def rollout_jobs(recipe: Recipe, inputs: Inputs, number: int = 0) -> list[Job]:
    """Every response of the rollout, in order; other seeds in every round."""
    decoding = recipe.rollout.decoding(recipe.seed)
    base = f"{decoding.seed}/round{number}" if number else decoding.seed
    return [
        Job(problem, prompt, sample, sequence_seed(base, problem.id, sample))
        for problem, prompt in zip(inputs.train_problems, inputs.train_prompts, strict=True)
        for sample in range(decoding.n)
    ]


def make_engine(recipe: Recipe, inputs: Inputs) -> Engine:
    return Engine(*inputs.teacher, **vars(recipe.engine))


def rollout(run: RunFolder, recipe: Recipe, inputs: Inputs, number: int = 0) -> None:
    """Decode what RUN/rollout does not hold yet, chunk by chunk; RUN/rollout-K for the K-th of the later rounds.

    A chunk is decoded and stored as a whole. So a chunk that a kill cut short is decoded again with the same batches,
    and even confidences, which may depend on the batch in their last bits, come out as in an uninterrupted run.
    """
    folder = run / (f"rollout-{number}" if number else "rollout")
    work, decoding = rollout_jobs(recipe, inputs, number), replace(recipe.rollout.decoding(recipe.seed), n=1)
    decoder = make_engine(recipe, inputs)
    prompts = hashlib.sha256(repr([(job.problem.id, job.prompt_ids) for job in work]).encode()).hexdigest()
    metadata = {
        "kind": "rollout",
        "model_fingerprint": model_fingerprint(decoder.model),
        "tokenizer_fingerprint": tokenizer_fingerprint(decoder.tokenizer),
        "prompts_sha256": prompts,
        "recipe": settings(recipe, "rollout") | ({"round": number} if number else {}),
        "versions": versions(),
    }
    chunk = recipe.rollout.chunk
    with TrajectoryWriter(folder, metadata, shard_size=chunk, flush_seconds=float("inf")) as writer:
        done = writer.done()
        with tqdm(total=len(work), initial=len(done), desc="rollout", unit="seq", disable=None) as bar:
            for start in range(0, len(work), chunk):
                part = [job for job in work[start : start + chunk] if (job.problem.id, job.sample) not in done]
                for trajectory in decode(decoder, part, decoding, inputs.task, bar):
                    writer.write(trajectory)
                writer.flush()
    _say(TrajectoryDataset(folder))


def decode(decoder: Engine, part: list[Job], decoding, task, bar) -> list:
    """The trajectories of `part`, in order, named and verified."""
    found = {}
    for event in decoder.stream([job.prompt_ids for job in part], decoding, seeds=[job.seed for job in part]):
        if isinstance(event, FinishedEvent):
            found[event.index] = event.trajectory
            bar.update()
    verdicts = task.judge_all([found[i].text for i in range(len(part))], [job.problem for job in part])
    return [
        replace(
            found[i],
            prompt_id=job.problem.id,
            sample=job.sample,
            question=job.problem.question,
            answer=job.problem.answer,
            correct=verdicts[i].correct,
        )
        for i, job in enumerate(part)
    ]


def _say(dataset: TrajectoryDataset) -> None:
    verdicts = [verdict for verdict in dataset.column("correct") if verdict is not None]
    lengths, reasons = dataset.column("length"), dataset.column("finish_reason")
    correct = f", {sum(verdicts) / len(verdicts):.1%} of {len(verdicts)} correct" if verdicts else ""
    log.info(
        "rollout: %d trajectories, %.1f tokens on average, %d cut at max_tokens%s",
        len(dataset), sum(lengths) / len(lengths), reasons.count("length"), correct,
    )  # fmt: skip
