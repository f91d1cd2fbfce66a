"""Stage 1: the teacher answers the training prompts; tokens and step maps go to the store."""

import hashlib
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from t3d.answers import JUDGED_TOGETHER, Job, store_answers
from t3d.blocks import geometry
from t3d.config import Recipe
from t3d.decoding import DecodingConfig
from t3d.engine import make_engine
from t3d.engine.progress import Bar
from t3d.errors import T3DError
from t3d.log import log
from t3d.pipeline.folder import RunFolder
from t3d.pipeline.inputs import Inputs, check_prompts
from t3d.pipeline.settings import differences, settings
from t3d.pipeline.versions import versions
from t3d.trajectories import TrajectoryDataset, TrajectoryWriter, as_begun
from t3d.trajectories.fingerprint import check_tokenizer, model_fingerprint, tokenizer_fingerprint


def sequence_seed(base: int | str, prompt_id: str, sample: int) -> int:
    """A sequence's own seed, `0 .. 2**63 - 1`: of what it is, not of where in a batch or a run it happens to be."""
    digest = hashlib.sha256(f"{base}/{prompt_id}/{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def check_rollout(recipe: Recipe, inputs: Inputs) -> None:
    """Raises T3DError for settings that the model cannot decode with, or prompts that do not fit it."""
    if recipe.rollout.source is not None:
        adopted(recipe, inputs)
        return
    if recipe.rollout.quantized != (recipe.model.quantize is not None):
        raise T3DError(
            "model.quantize: a student would learn what a quantised teacher says; set rollout.quantized=true too if it "
            "shall, or quantise in `t3d eval` alone"
            if recipe.model.quantize
            else "rollout.quantized=true needs model.quantize"
        )
    names = [problem.id for problem in inputs.train_problems]
    decoding = inputs.task.guided(recipe.rollout.decoding(recipe.seed), inputs.teacher[1])
    check_prompts(recipe, *inputs.teacher, inputs.train_prompts, names, [decoding])


def rollout_jobs(recipe: Recipe, inputs: Inputs, number: int = 0, again: set[str] | None = None) -> list[Job]:
    """Every response of the rollout, in order; other seeds in every round.

    again: ids of problems; then it is their retries, whose samples are numbered after the others.
    """
    decoding = recipe.rollout.decoding(recipe.seed)
    base = f"{decoding.seed}/round{number}" if number else decoding.seed
    samples = range(decoding.n) if again is None else range(decoding.n, decoding.n + recipe.rollout.retries)
    return [
        Job(problem, prompt, sample, sequence_seed(base, problem.id, sample))
        for problem, prompt in zip(inputs.train_problems, inputs.train_prompts, strict=True)
        if again is None or problem.id in again
        for sample in samples
    ]


def rollout(run: RunFolder, recipe: Recipe, inputs: Inputs, number: int = 0) -> None:
    """Decode what RUN/rollout does not hold yet; an answer is verified and stored soon after it ends.

    number: of the round; the later ones go to RUN/rollout-1, RUN/rollout-2, ...
    """
    if recipe.rollout.source is not None and not number:
        adopt(run, recipe, inputs)
        return
    folder = run / (f"rollout-{number}" if number else "rollout")
    work = rollout_jobs(recipe, inputs, number)
    prompts = hashlib.sha256(repr([(job.problem.id, job.prompt_ids) for job in work]).encode()).hexdigest()
    model, tokenizer = inputs.teacher
    metadata = {
        "kind": "rollout",
        "model_fingerprint": model_fingerprint(model),
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "prompts_sha256": prompts,
        "recipe": _settings(recipe, folder) | ({"round": number} if number else {}),
        "versions": versions(),
    }
    if recipe.rollout.quantized:
        del model
        inputs.release()
        model, _ = inputs.load(quantize=recipe.model.quantize)
    with (
        closing(make_engine(model, tokenizer, **vars(recipe.engine))) as engine,
        TrajectoryWriter(folder, metadata, shard_size=recipe.rollout.save_every) as writer,
    ):
        decoding = recipe.rollout.decoding(recipe.seed)
        _decode(engine, work, decoding, inputs, writer, recipe.rollout.save_every)
        if recipe.rollout.retries:
            writer.flush()
            hard = unsolved(TrajectoryDataset(folder), decoding.n)
            log.info("rollout: %d prompts without a correct answer are asked again", len(hard))
            work = rollout_jobs(recipe, inputs, number, hard)
            decoding = replace(decoding, temperature=recipe.rollout.retry_temperature)
            _decode(engine, work, decoding, inputs, writer, recipe.rollout.save_every)
    _say(TrajectoryDataset(folder), inputs.dropped["training"])


def unsolved(found: TrajectoryDataset, n: int) -> set[str]:
    """Ids of the prompts whose first `n` samples were all verified and none was correct."""
    verdicts: dict[str, list[bool | None]] = {}
    for (prompt_id, sample), correct in zip(found.keys(), found.column("correct"), strict=True):
        if sample < n:
            verdicts.setdefault(prompt_id, []).append(correct)
    return {prompt_id for prompt_id, values in verdicts.items() if all(value is False for value in values)}


def _decode(engine, jobs: list[Job], decoding: DecodingConfig, inputs: Inputs, writer: TrajectoryWriter, every: int):
    """Write the answers that the writer does not have."""
    counts = store_answers(writer, engine, jobs, decoding, inputs.task, together=min(JUDGED_TOGETHER, every))
    with Bar(total=len(jobs), initial=next(counts), desc="rollout", unit="seq", disable=None) as bar:
        for count in counts:
            bar.at(count, engine.stats)


def adopted(recipe: Recipe, inputs: Inputs) -> TrajectoryDataset:
    """The trajectories of `rollout.source`; T3DError if there are none, or they are not the teacher's to learn from."""
    model, tokenizer = inputs.teacher
    found, size = TrajectoryDataset(recipe.rollout.source), model.config.block_size
    if found[0].block_size != size and not geometry(model.config)["full"]:
        raise T3DError(
            f"rollout.source: {recipe.rollout.source} has blocks of {found[0].block_size} tokens, the model of {size}"
        )
    check_tokenizer(found.metadata, tokenizer)
    return found


def adopt(run: RunFolder, recipe: Recipe, inputs: Inputs) -> None:
    """Copy the trajectories of another folder to RUN/rollout."""
    found = adopted(recipe, inputs)
    metadata = {"kind": "rollout", "source": found.metadata, "recipe": _settings(recipe, run / "rollout")}
    metadata["tokenizer_fingerprint"] = tokenizer_fingerprint(inputs.teacher[1])
    with TrajectoryWriter(run / "rollout", metadata | {"versions": versions()}) as writer:
        for trajectory in found:
            writer.write(trajectory)
    _say(TrajectoryDataset(run / "rollout"))


def _settings(recipe: Recipe, folder: Path) -> dict:
    """What the trajectories depend on; of a folder that is there, as the version that began it knew it."""
    now = settings(recipe, "rollout")
    return as_begun(folder, "recipe", now, {key for key, *_ in differences({}, now)})


def _say(dataset: TrajectoryDataset, dropped: int = 0) -> None:
    verdicts = [verdict for verdict in dataset.column("correct") if verdict is not None]
    lengths, reasons = dataset.column("length"), dataset.column("finish_reason")
    correct = f", {sum(verdicts) / len(verdicts):.1%} of {len(verdicts)} correct" if verdicts else ""
    without = f", {dropped} prompts dropped" if dropped else ""
    log.info(
        "rollout: %d trajectories, %.1f tokens on average, %d cut at max_tokens%s%s",
        len(dataset), sum(lengths) / len(lengths), reasons.count("length"), correct, without,
    )  # fmt: skip
