"""Stage 2: the student learns from the trajectories."""

import shutil
from pathlib import Path
from random import Random

import torch
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from t3d.config import Recipe
from t3d.distill import T3DTrainer
from t3d.distill.solutions import SolutionDataset
from t3d.errors import T3DError
from t3d.log import log
from t3d.models import save_model, stop_ids
from t3d.pipeline.folder import RunFolder
from t3d.pipeline.inputs import Inputs
from t3d.trajectories import TrajectoryDataset

WHOLE = "whole"  # the file that says a checkpoint was saved to its end


def train(run: RunFolder, recipe: Recipe, inputs: Inputs) -> None:
    """Train from the teacher's weights, or from the last whole checkpoint in RUN/train; save RUN/student.

    Weights and optimizer are float32 (`train.bf16=true` computes in bfloat16); the student is saved in the dtype that
    the teacher has.
    """
    inputs.release()
    dtype = recipe.model.dtype or inputs.saved_dtype
    model, tokenizer = inputs.load(dtype="float32")
    arguments = recipe.training_arguments(run / "train")
    trainer = T3DTrainer(
        model, arguments, _data(run, recipe, inputs, model, tokenizer), processing_class=tokenizer,
        callbacks=[_Progress(), _MarkWhole()],
    )  # fmt: skip
    for callback in (PrinterCallback, ProgressCallback):  # they write to stdout, which belongs to results
        trainer.remove_callback(callback)
    checkpoint = last_checkpoint(run / "train")
    if checkpoint is not None:
        log.info("train: continuing from %s", checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    trainer.save_state()  # with all that was logged
    save_model(trainer.model.to(getattr(torch, dtype)), run / "student", tokenizer)
    log.info(
        "train: %d steps of %s; the student is %s", trainer.state.global_step, arguments.objective, run / "student"
    )


def check_training(recipe: Recipe, inputs: Inputs) -> None:
    """Raises T3DError for settings or data that cannot be trained with."""
    recipe.training_arguments(recipe.run_dir)
    if recipe.objective != "sft" and recipe.rollout.source:
        TrajectoryDataset(source(recipe))
    if recipe.objective == "sft":
        inputs.task.solution(inputs.train_problems[0], Random(0))


def _data(run: RunFolder, recipe: Recipe, inputs: Inputs, model, tokenizer):
    """The trajectories; for `sft` the task's ground-truth responses in their form."""
    if recipe.objective != "sft":
        return TrajectoryDataset(source(recipe) or run / "rollout")
    stops = stop_ids(model)
    if not stops:
        raise T3DError("model: neither generation_config.json nor config.json gives an eos_token_id to end responses")
    return SolutionDataset(
        inputs.task, tokenizer, recipe.task.num_train, model.config.block_size, stops[0], recipe.seed
    )


def source(recipe: Recipe) -> Path | None:
    """The folder of trajectories that `rollout.source` names: it, or the rollout of the run that it is."""
    if recipe.rollout.source is None:
        return None
    path = Path(recipe.rollout.source)
    return path / "rollout" if (path / "rollout").is_dir() else path


def last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that was saved to its end; what a kill left of others is removed."""
    found = {}
    for path in folder.glob("checkpoint-*"):
        if (path / WHOLE).exists():
            found[int(path.name.rpartition("-")[2])] = path
        else:
            shutil.rmtree(path)
    return found[max(found)] if found else None


class _MarkWhole(TrainerCallback):
    """Called when a checkpoint is saved, as the last of all that write into it."""

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / WHOLE).touch()


class _Progress(TrainerCallback):
    """A bar on the terminal, and every logged value in the log file."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="train", unit="step",
            disable=True if args.disable_tqdm else None,
        )  # fmt: skip

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        values = {k: round(v, 5) if isinstance(v, float) else v for k, v in (logs or {}).items()}
        log.debug("train: step %d %s", state.global_step, values)
        if "loss" in values:
            self.bar.set_postfix(loss=values["loss"], refresh=False)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()
