"""A model at many decode settings on the same problems: decode, verify, keep every answer, and give one row each."""

import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, fields, replace
from hashlib import sha256
from pathlib import Path

import torch

from t3d.answers import Answer, Job, store_answers
from t3d.decoding.config import DecodingConfig
from t3d.decoding.sampling import derive_seed
from t3d.engine import Engine
from t3d.engine.progress import Bar
from t3d.errors import T3DError
from t3d.evaluation.rows import EXTRACTED, REASON, SECONDS, EvalRow, summarise
from t3d.tasks import Problem, Task
from t3d.trajectories import Trajectory, TrajectoryDataset, TrajectoryWriter, as_begun
from t3d.trajectories.fingerprint import model_fingerprint, tokenizer_fingerprint
from t3d.trajectories.pieces import PIECES, Pieces

SAVE_SECONDS = 10.0  # a finished response waits about as long for the disk; a kill loses that, and what is in flight


def evaluate(
    model,
    tokenizer,
    task: Task,
    problems: list[Problem],
    settings: list[DecodingConfig],
    *,
    engine: Engine | None = None,
    output: Path | str | None = None,
    name: str = "model",
    objective: str | None = None,
    versions: dict | None = None,
    progress: bool = False,
) -> list[EvalRow]:
    """Decode `problems` at each of `settings` (`n` responses per problem each) and verify the answers.

    Every response goes, with its verdict, to OUTPUT/name/SETTING/*.parquet as it ends. Responses already there are not
    decoded again, so a killed evaluation continues and a finished one only gives its rows; `wall_seconds` adds up
    the decoding of all attempts. A response depends on its problem, its setting and the weights alone.

    Args:
        engine: made with its defaults if not given.
        output: folder for the responses; without one they are not kept.
        name: of the model, in the rows and in the folders.
        objective: how it was trained, for the rows.
        versions: kept in the files' metadata.

    Raises:
        T3DError: no problems, two with one id, no tokenizer, or an output folder of another model, task or setting.
    """
    if not problems:
        raise T3DError("nothing to evaluate: the list of problems is empty")
    if tokenizer is None:
        raise T3DError("evaluation needs the model's tokenizer: its folder has none")
    repeated = len(problems) - len({p.id for p in problems})
    if repeated:
        raise T3DError(
            f"{repeated} problems share an id with another; ids must differ, because results are stored by id"
        )
    engine = engine or Engine(model, tokenizer)
    prompts = {p.id: task.prompt(p, tokenizer) for p in problems}
    metadata = {
        "kind": "evaluation",
        "model": name,
        "model_fingerprint": model_fingerprint(model),
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "task": task.name,
        "versions": {**(versions or {}), "hardware": hardware(model), "batch_size": engine.max_batch_size},
    }
    rows = []
    with ExitStack() as stack:
        root = Path(output) if output is not None else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for config in settings:
            config = config.at(model.config.window).canonical()
            folder = root / name / setting_name(config)
            _decode(engine, task, problems, prompts, config, folder, metadata, progress)
            dataset = TrajectoryDataset(folder)
            keys = dataset.keys()
            wanted = [key in prompts and sample < config.n for key, sample in keys]
            made_with = dataset.metadata["versions"]
            rows.append(
                summarise(
                    _checked(dataset.select(wanted), prompts, folder),
                    config,
                    name,
                    model.config.window,
                    objective=objective,
                    hardware=made_with["hardware"],
                    batch_size=made_with["batch_size"],
                    results=str(folder.relative_to(root)) if output is not None else "",
                )
            )
    return rows


def _decode(engine, task, problems, prompts, config, folder, metadata, progress) -> None:
    """Decode and verify what `folder` does not hold yet."""
    settings = {k: v for k, v in asdict(config).items() if k != "n"}  # more samples may be added later
    settings = as_begun(folder, "decoding", settings, config.differing(settings))
    jobs = [
        Job(p, prompts[p.id], sample, derive_seed(config.seed, _number(p.id), sample))
        for p in problems
        for sample in range(config.n)
    ]
    pieces = Pieces(engine.tokenizer)

    def row(answer: Answer) -> Trajectory:
        t, verdict = answer.trajectory, answer.verdict
        extra = {EXTRACTED: verdict.extracted, REASON: verdict.reason, PIECES: pieces.of(t), SECONDS: answer.seconds}
        return replace(t, extra=t.extra | extra)

    with TrajectoryWriter(folder, metadata | {"decoding": settings}, flush_seconds=SAVE_SECONDS) as writer:
        counts = store_answers(writer, engine, jobs, config, task, row=row)
        about = {"desc": f"{metadata['model']}, {folder.name}", "unit": "seq", "disable": not progress}
        with Bar(total=len(jobs), initial=next(counts), **about) as bar:
            for count in counts:
                bar.at(count, engine.stats)


def _checked(dataset: TrajectoryDataset, prompts: dict[str, list[int]], folder: Path) -> Iterator[Trajectory]:
    for trajectory in dataset:
        if trajectory.prompt_ids != prompts[trajectory.prompt_id]:
            raise T3DError(
                f"{folder} answers another prompt for problem {trajectory.prompt_id!r} than the task gives now; "
                "use another folder, or remove it to start again"
            )
        yield trajectory


def setting_name(config: DecodingConfig) -> str:
    """Folder of a canonical setting: what distinguishes the points of a grid."""
    policy, flight, speed = config.policy, config.flying, config.policy.speed()
    parts = [f"block{config.block_size}", config.strategy]
    if policy.uses_steps:
        parts.append(f"steps{config.steps}")
    if speed is not None:
        parts.append(f"{speed.name}{getattr(policy, speed.name):g}")
    own = [f.name for f in fields(policy) if f != speed]
    parts += [f"{name}{_text(value)}" for name, value in config.differing(own).items()]
    if flight.label:
        parts += [config.flight, *(f"{f.name}{_text(getattr(flight, f.name))}" for f in fields(flight))]
    parts += [f"{name}{_text(value)}" for name, value in config.differing(config.others()).items()]
    if config.temperature > 0:
        parts.append(f"temperature{config.temperature:g}")
    parts.append(f"seed{config.seed}")
    return "-".join(parts)


def _text(value) -> str:
    """Short, and fit for the name of a folder."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if text.isalnum() or isinstance(value, float) else sha256(text.encode()).hexdigest()[:8]


def hardware(model) -> str:
    """The device that decodes: a GPU's name, or the processor's architecture and threads in use."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} of {os.cpu_count()} threads"


def _number(problem_id: str) -> int:
    """An integer that stands for the id in a seed, whatever else is evaluated beside it."""
    return int.from_bytes(sha256(problem_id.encode()).digest()[:8], "big")
