"""Which keys of a recipe the result of a stage depends on."""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from t3d.config import SECTIONS, Recipe, keys, plain
from t3d.distill.config import OWNED
from t3d.distill.objective import OBJECTIVES, Objective
from t3d.pipeline.sources import source

# Keys that change neither the trajectories nor the student nor the rows: prefixes of dotted names.
NEUTRAL = (
    "run_dir",
    "engine.",
    "report.",
    "model.device",
    "task.allow_unsandboxed",
    "task.bad_prompts",  # it stops before there is anything, or drops nothing else than it dropped before
    "rollout.save_every",
    "train.logging_",
    "train.log_",
    "train.save_",
    "train.hub_",
    "train.push_to_hub",
    "train.report_to",
    "train.run_name",
    "train.disable_tqdm",
    "train.reference_cache",
    "train.dataloader_num_workers",
    "train.dataloader_pin_memory",
    "train.dataloader_prefetch_factor",
    "train.dataloader_persistent_workers",
)
# What versions before `eval.grid` had in its place
OLD_GRID = ("steps", "strategy", "threshold", "floor", "entropy_bound", "factor", "risk", "block_size")
# Keys of the evaluation that only say how much of it there is: other values add settings, problems or samples to those
# that RUN/eval has, each in a place of its own.
GROWING = {
    "task.num_eval",
    "eval.grid",
    *(f"eval.{name}" for name in OLD_GRID),
    "eval.decoding",
    "eval.temperature",
    "eval.samples",
    "eval.seeds",
    "eval.teacher",
    "eval.checkpoints",
    "eval.text",
    "eval.scorer",
    "eval.oracle",
    "model.quantize",
}
LATER = {  # sections and keys that only later stages read
    "rollout": ("train.", "eval.", "task.num_eval", "task.eval_", "task.dataset_test_split"),
    "train": ("eval.", "task.num_eval", "task.eval_", "task.dataset_test_split"),
    "eval": (),
}


def settings(recipe: Recipe, stage: str, student: bool = True) -> dict:
    """The dotted keys of a recipe, with their values, on which the result of a stage depends.

    student: whether there is one; an evaluation without it does not depend on how it would be made.
    """
    ignored = NEUTRAL + LATER[stage]
    if not student and stage == "eval":
        ignored += ("rollout.", "train.", "task.num_train")
    if not source(recipe).rolls_out:
        ignored += ("rollout.",)
    if stage == "train" or (stage == "rollout" and not recipe.rollout.quantized):
        ignored += ("model.quantize",)
    if not recipe.rollout.retries:
        ignored += ("rollout.retr",)  # the runs of versions that knew none keep their names in a study
    if recipe.task.dataset is None:
        ignored += ("task.dataset_",)  # likewise
    if recipe.task.retrieve is None:
        ignored += ("task.retrieve",)
    if recipe.task.kind is None:
        ignored += ("task.kind", "task.size")
    flat = {}
    for name, value in recipe.to_dict().items():
        flat |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    others = _of_others(OBJECTIVES[recipe.objective])
    return {key: value for key, value in flat.items() if not key.startswith(ignored) and key not in others}


def _of_others(objective: type[Objective]) -> set[str]:
    """The dotted keys that other objectives have and this one does not."""
    return {f"train.{name}" for name in OWNED.keys() - {f.name for f in fields(objective)}}


def differences(old: dict, new: dict) -> Iterator[tuple[str, Any, Any]]:
    """(key, before, now) of what differs between a record's settings and a recipe's, but for what may grow.

    A key that the record lacks is one of a later version, and means what versions without it did; what a recipe lacks
    is at its default.
    """
    objective = OBJECTIVES.get(new.get("train.objective"), Objective)
    own = {f"train.{f.name}": f for f in fields(objective)}
    for dotted in sorted((old.keys() | new.keys()) - GROWING - _of_others(objective)):
        section, _, name = dotted.rpartition(".")
        key = keys(section).get(name) if section in ("", *SECTIONS) else None
        before, now = old.get(dotted, key and key.before), new.get(dotted, key and key.default)
        if dotted in own:  # none is the objective's own default
            default = plain(own[dotted].default)
            before = old.get(dotted, own[dotted].metadata.get("before", default))
            before, now = (default if value is None else value for value in (before, now))
        if before != now:
            yield dotted, before, now
