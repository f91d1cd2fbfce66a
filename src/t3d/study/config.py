"""The study's YAML file: a base recipe, and variants of it as overrides in the recipe's own language."""

import hashlib
import json
import re
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError

from t3d.config import Recipe, load_recipe, read_yaml
from t3d.distill.objective import OBJECTIVES, Privileged
from t3d.errors import T3DError, nearest
from t3d.pipeline.folder import RunFolder
from t3d.pipeline.settings import differences, settings
from t3d.pipeline.sources import source

VERIFIED, LABEL_FREE, SOLUTIONS = "verified trajectories", "no labels", "ground truth"
ANSWERS = "reference answers"


@dataclass(frozen=True)
class Variant:
    """What one variant changes (`set`), and its seeds where they are not the study's."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    set: tuple[str, ...] = ()
    seeds: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Job:
    """One variant at one seed, as a recipe with a run folder of its own, and the rollout that it shares, if any.

    train: whether there is a student to make; without, the recipe's model is evaluated as it is.
    """

    variant: str
    seed: int
    recipe: Recipe
    rollout: Recipe | None
    train: bool = True

    @property
    def stages(self) -> tuple[str, ...]:
        return ("train", "eval") if self.train else ("eval",)


@dataclass(frozen=True)
class Study:
    """Settings of a study; docs/recipes.md describes the file."""

    path: Path
    recipe: str  # the base, a path relative to the study's file
    folder: str  # where the runs go: FOLDER/NAME-seedN, rollouts to FOLDER/rollouts
    variants: dict[str, Variant]  # the order in which they run
    seeds: tuple[int, ...] = (0,)
    set: tuple[str, ...] = ()  # overrides for all variants
    against: tuple[str, ...] = ()  # variants that the others are compared with, one for each source of labels
    plot: tuple[str, ...] = ()  # variants in the plots; default: all
    train: bool = True  # false: a study of decoding, which evaluates each variant's model at every setting of the grid
    results: str | None = None  # a Markdown file, relative to the study's, that gets the results between its marks
    overrides: tuple[str, ...] = ()  # the command line's

    def __post_init__(self):
        for name in self.variants:
            if not re.fullmatch(r"[\w.+-]+", name) or name in ("rollouts", "teacher"):
                raise T3DError(f"{self.path}: {name!r} cannot be a variant's name: use letters, digits, . _ + -")
        for name in (*self.against, *self.plot):
            if name not in self.variants:
                raise T3DError(f"{self.path}: there is no variant {name!r}{nearest(name, self.variants)}")
        if not self.jobs:
            raise T3DError(f"{self.path}: there is nothing to run: no variant has a seed")

    @cached_property
    def jobs(self) -> list[Job]:
        """Every run, in order. Of those that share rollout and decode settings the first also evaluates the teacher."""
        jobs, seen = [], set()
        for name, variant in self.variants.items():
            for seed in self.seeds if variant.seeds is None else variant.seeds:
                job = self._job(name, variant, seed)
                if not self.train:
                    jobs.append(job)
                    continue
                key = json.dumps([job.rollout and job.rollout.run_dir, job.recipe.to_dict()["eval"]])
                if key in seen or job.rollout is None:
                    evaluation = replace(job.recipe.eval, teacher=False)
                    job = replace(job, recipe=replace(job.recipe, eval=evaluation))
                seen.add(key)
                jobs.append(job)
        return jobs

    @cached_property
    def teachers(self) -> dict[str, str]:
        """What each variant's teacher is called: "teacher" if all have one, else by the first variant that has it.

        Two variants have the same teacher if it is the same model and has the same problems to solve.
        """
        known: dict[str, dict] = {}  # what the evaluation of each one depends on
        found = {}
        for name, variant in self.variants.items():
            mine = settings(self._job(name, variant, 0).recipe, "eval", student=False)
            found[name] = next((first for first, its in known.items() if not any(differences(its, mine))), name)
            known.setdefault(found[name], mine)
        several = len(known) > 1
        return {name: f"teacher of {first}" if several else "teacher" for name, first in found.items()}

    def _job(self, name: str, variant: Variant, seed: int) -> Job:
        overrides = (*self.set, *variant.set, *self.overrides, f"seed={seed}")
        try:
            overrides += (f"run_dir={Path(self.folder) / f'{name}-seed{seed}'}",)
            recipe = load_recipe(self.path.parent / self.recipe, overrides)
            recipe.training_arguments(recipe.run_dir)  # checks
        except T3DError as error:
            raise T3DError(f"{self.path}: variant {name!r}: {error}") from error
        if not self.train:
            return Job(name, seed, recipe, None, train=False)
        if not source(recipe).rolls_out or recipe.rollout.source:
            return Job(name, seed, recipe, None)
        folder = Path(self.folder) / "rollouts" / self._rollout(seed, settings(recipe, "rollout"))
        shared = replace(recipe.rollout, source=f"{folder}/rollout")
        return Job(name, seed, replace(recipe, rollout=shared), replace(recipe, run_dir=str(folder)))

    def _rollout(self, seed: int, made_with: dict) -> str:
        """The folder of rollouts with these settings: one that is there, whichever version made it, else a new one."""
        for folder in sorted(Path(self.folder).glob(f"rollouts/seed{seed}-*")):
            record = RunFolder(folder).record("rollout")
            if record is not None and not any(differences(record["settings"], made_with)):
                return folder.name
        digest = hashlib.sha256(json.dumps(made_with, sort_keys=True).encode()).hexdigest()
        return f"seed{seed}-{digest[:8]}"


def labels(recipe: Recipe) -> str:
    """What a student of this recipe knows beside the teacher."""
    if not source(recipe).rolls_out:
        return SOLUTIONS
    if issubclass(OBJECTIVES[recipe.objective], Privileged) and recipe.train["reference_sees"] == "answer":
        return ANSWERS
    return VERIFIED if recipe.train["verified_only"] else LABEL_FREE


def load_study(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Study:
    """The study in the YAML file `path`, every variant's recipe checked; `overrides` go to all of them.

    Raises:
        T3DError: one line: a missing or malformed file, an unknown key, or a recipe that is not one.
    """
    path = Path(path)
    values = read_yaml(path)
    known = {field.name: field.type for field in fields(Study) if field.name not in ("path", "overrides")}
    for name in values:
        if name not in known:
            raise T3DError(f"{path}: unknown key {name!r}{nearest(str(name), known)}; keys are {', '.join(known)}")
    for name in ("recipe", "folder", "variants"):
        if not values.get(name):
            raise T3DError(f"{path}: a study needs `{name}`; keys are {', '.join(known)}")
    if isinstance(values["variants"], dict):
        values["variants"] = {
            name: {"set": value or []} if value is None or isinstance(value, list) else value
            for name, value in values["variants"].items()
        }
    checked = {}
    for name, value in values.items():
        try:
            checked[name] = TypeAdapter(known[name]).validate_json(json.dumps(value), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join([name, *(str(part) for part in first["loc"])])
            raise T3DError(f"{path}: {where}: {first['msg']}, got {first['input']!r}") from error
    return Study(path=path, overrides=tuple(overrides), **checked)
