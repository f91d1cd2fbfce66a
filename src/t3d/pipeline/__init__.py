"""The stages in order: rollout, train, eval, report. Each continues what a kill cut short and skips what is done."""

from transformers import set_seed

from t3d.components import check_name
from t3d.config import Recipe
from t3d.distill.objective import OBJECTIVES
from t3d.errors import T3DError
from t3d.log import log, to_terminal
from t3d.pipeline.card import describe_student
from t3d.pipeline.evaluation import check_evaluation, evaluation
from t3d.pipeline.folder import STAGES, RunFolder, writing
from t3d.pipeline.inputs import Inputs
from t3d.pipeline.processes import Processes, count, rank, warn_of_one_process
from t3d.pipeline.rollout import check_rollout, rollout
from t3d.pipeline.sources import source
from t3d.pipeline.train import check_reporting, check_training, train
from t3d.report import write_report

__all__ = ["STAGES", "RunFolder", "check_stages", "run_stages", "to_terminal"]


def stages_of(recipe: Recipe) -> tuple[str, ...]:
    """The stages that a recipe has; what learns from ground truth needs no rollout."""
    return STAGES if source(recipe).rolls_out else STAGES[1:]


def run_stages(recipe: Recipe, wanted: tuple[str, ...] = STAGES, force: bool = False) -> RunFolder:
    """Run the `wanted` stages in the recipe's run folder; `force` does them, and those after them, again.

    Raises:
        T3DError: before anything is written, where a look at the recipe, the data, the models and the folder tells.
    """
    check_name("train.objective", recipe.objective, OBJECTIVES)
    stages = stages_of(recipe)
    if "train" in wanted and recipe.rollout.source:
        wanted = ("rollout", *wanted)  # only a copy: nobody has to ask for it
    wanted = tuple(stage for stage in stages if stage in wanted)
    if not wanted:
        raise T3DError(f"objective {recipe.objective!r} has no rollout: it learns from the task's own solutions")
    if "train" in wanted:
        recipe.training_arguments(recipe.run_dir)  # what is wrong with it is said before anything else
        warn_of_one_process()
    if count() > 1:
        recipe.training_arguments(recipe.run_dir).device  # noqa: B018  starts the process group
    processes = Processes()
    if not processes.main:
        return follow(recipe, processes)
    try:
        run = lead(recipe, processes, stages, wanted, force)
    except BaseException:
        if not processes.together:  # else the others are amid the training; the launcher ends them
            processes.tell(False)
        raise
    processes.tell(False)
    return run


def check_stages(recipe: Recipe, stages: tuple[str, ...]) -> None:
    """What `run_stages` looks at before it writes anything, of these stages; raises T3DError."""
    inputs = Inputs(recipe)
    for stage in stages:
        CHECKS[stage](recipe, inputs)


def follow(recipe: Recipe, processes: Processes) -> RunFolder:
    """What all but the first of several processes do: train when told."""
    run = RunFolder(recipe.run_dir)
    while processes.told():
        set_seed(recipe.seed)
        try:
            train(run, recipe, Inputs(recipe), processes)
        except T3DError as error:
            log.error("error in process %d: %s", rank(), error)
            raise
    return run


def lead(
    recipe: Recipe, processes: Processes, stages: tuple[str, ...], wanted: tuple[str, ...], force: bool
) -> RunFolder:
    """What the first process does: everything, and training together with the others."""
    with RunFolder(recipe.run_dir) as run, writing(run.path):
        first = stages.index(wanted[0])
        for stage in stages[: first if force else stages.index(wanted[-1]) + 1]:
            run.check(stage, recipe)
        todo = [stage for stage in wanted if force or not run.complete(stage) or run.changed(stage, recipe)]
        if "train" in todo:
            check_reporting(recipe)  # before anyone rolls out for hours
        for stage in needed(stages, wanted[0], run, recipe):
            if not run.complete(stage):
                raise T3DError(f"{run.path} has no complete {stage}; run `t3d {stage}` with this recipe first")
        inputs = Inputs(recipe)
        if "train" in todo and "eval" in wanted:  # it may have been complete without the student
            todo = [stage for stage in wanted if stage in (*todo, "eval")]
        for stage in CHECKS.keys() & todo:
            CHECKS[stage](recipe, inputs)
        if force:
            run.clear(stages[first:])
        run.describe(recipe)
        for stage in wanted:
            if stage not in todo:
                log.info("%s: complete, skipped", stage)
                continue
            set_seed(recipe.seed)
            if stage == "report":  # takes a moment, so it is made anew every time
                write_report([run.path], run / "report.html", recipe.report)
                continue
            with run.stage(stage, recipe):
                if stage == "train":
                    with processes.joined():
                        train(run, recipe, inputs, processes)
                else:
                    WORK[stage](run, recipe, inputs)
                if stage in ("train", "eval") and (run / "student").exists():
                    describe_student(run, recipe)
    return run


def needed(stages: tuple[str, ...], stage: str, run: RunFolder, recipe: Recipe) -> tuple[str, ...]:
    """The stages that must be complete before `stage`: all before it. But a checkpoint can be evaluated, and that
    reported, where nothing was distilled."""
    before = stages[: stages.index(stage)]
    distilled = any(run.record(name) for name in before if name != "eval")
    models = recipe.model.architecture is None or recipe.eval.checkpoints
    if stage == "train" or distilled or not models:
        return before
    return tuple(name for name in before if name == "eval")


WORK = {"rollout": rollout, "eval": evaluation}
CHECKS = {"rollout": check_rollout, "train": check_training, "eval": check_evaluation}
