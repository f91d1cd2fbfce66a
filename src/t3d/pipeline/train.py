"""Stage 2: the student learns from the trajectories, in one round or in several with new rollouts between them."""

import shutil
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.integrations import get_available_reporting_integrations

from t3d.config import Recipe
from t3d.decoding import DecodingConfig
from t3d.distill import T3DConfig, T3DTrainer
from t3d.distill.answer_prompts import AnswerPrompts
from t3d.distill.held_out import HeldOut
from t3d.distill.lora import quantisation
from t3d.distill.rewards import UNVERIFIED, Judge
from t3d.embedded import checkpoint as checkpoint_of
from t3d.engine.progress import Bar
from t3d.errors import T3DError
from t3d.log import log
from t3d.models import load_model, load_tokenizer
from t3d.models.files import check_weights, local_folder, read_config
from t3d.models.load import plain_config
from t3d.pipeline.folder import RunFolder
from t3d.pipeline.inputs import Inputs, check_prompts
from t3d.pipeline.processes import Processes
from t3d.pipeline.rollout import adopted, rollout
from t3d.pipeline.sources import source
from t3d.tasks import get_task
from t3d.trajectories.fingerprint import tokenizer_fingerprint

WHOLE = "whole"  # the file that says a checkpoint was saved to its end


def train(run: RunFolder, recipe: Recipe, inputs: Inputs, processes: Processes) -> None:
    """Train from the teacher's weights, or from the last whole checkpoint in RUN/train; save RUN/student.

    Every process of the launch calls it. Weights and optimizer are float32 (`train.bf16=true` computes in bfloat16);
    the student is saved in the dtype that the teacher has.
    """
    inputs.release()
    rounds = recipe.training_arguments(run / "train").rollout_rounds
    for number in range(rounds):
        step = checkpoint_step(last_checkpoint(run / "train", processes))
        if number and step == 0:
            raise T3DError("train.save_strategy: rounds of rollouts continue from checkpoints, which are not saved")
        round_ = _Round(run, recipe, inputs, processes, number)
        if step < round_.end or not round_.output.exists():
            round_.train()
        inputs.release()


class _Round:
    """The steps up to `end`, on the rollouts of the teacher (round 0) or of the student after the round before."""

    def __init__(self, run: RunFolder, recipe: Recipe, inputs: Inputs, processes: Processes, number: int):
        self.run, self.recipe, self.inputs, self.processes, self.number = run, recipe, inputs, processes, number
        self.arguments = recipe.training_arguments(run / "train")
        self.dtype = getattr(torch, recipe.model.dtype or inputs.saved_dtype)
        self.last = number == self.arguments.rollout_rounds - 1
        self.output = run / "student" if self.last else student_of_round(run, number)
        steps = self.arguments.max_steps
        self.end = round(steps * (number + 1) / self.arguments.rollout_rounds) if steps > 0 else float("inf")

    def train(self) -> None:
        if self.number:
            self._rollout()
        model, tokenizer = load_student(self.recipe, self.inputs, self.arguments, self.processes.several)
        folder = self.run / (f"rollout-{self.number}" if self.number else "rollout")
        data = source(self.recipe).data(folder, self.recipe, self.inputs, model, tokenizer)
        trainer = T3DTrainer(
            model,
            self.arguments,
            data,
            reference=load_reference(self.recipe, self.arguments, self.processes.several),
            processing_class=tokenizer,
            held_out=self._held_out(tokenizer),
            judge=self._judge(),
            engine=self._engine(),
            answer_prompts=self._answer_prompts(tokenizer),
        )
        for callback in (PrinterCallback, ProgressCallback):  # they write to stdout, which belongs to results
            trainer.remove_callback(callback)
        for callback in (_Progress(self.processes.main), _KeepStudent(trainer, self), _MarkWhole()):
            trainer.add_callback(callback)
        if self.processes.main and trainer.train_dataset.dropped:
            _say_dropped(trainer.train_dataset)
        checkpoint = last_checkpoint(self.run / "train", self.processes)
        if checkpoint is not None and self.processes.main:
            log.info("train: continuing from %s", checkpoint)
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        self.processes.wait()  # until the student is written
        if self.processes.main:
            state = trainer.state
            best = f", the best of step {state.best_global_step}" if self.keeps_best else ""
            name = "" if self.last else f" after round {self.number + 1} of {self.arguments.rollout_rounds}"
            log.info(
                "train: %d steps of %s; the student%s is %s%s",
                state.global_step, self.arguments.objective, name, self.output, best if self.last else "",
            )  # fmt: skip

    @property
    def keeps_best(self) -> bool:
        return bool(self.arguments.eval_every) and self.arguments.keep_best

    def _rollout(self) -> None:
        """RUN/rollout-K: the student of the round before answers the training prompts."""
        if self.processes.main:
            student = student_of_round(self.run, self.number - 1)
            recipe = replace(self.recipe, model=replace(self.recipe.model, path=str(student), architecture=None))
            rollout(self.run, recipe, Inputs(recipe), self.number)
        self.processes.wait()

    def _held_out(self, tokenizer) -> HeldOut | None:
        return held_out(self.recipe, self.inputs, self.arguments, tokenizer) if self.arguments.eval_every else None

    def _judge(self) -> Judge | None:
        return Judge(self.inputs.task, self.inputs.train_problems) if self.arguments.method.rl_updates else None

    def _answer_prompts(self, tokenizer) -> AnswerPrompts | None:
        sees = self.arguments.method.reference_sees == "answer"
        return AnswerPrompts(self.inputs.task, self.inputs.train_problems, tokenizer) if sees else None

    def _engine(self) -> dict:
        """What decodes the student's answers: workers take whole weights from one process, and no adapter."""
        engine = self.recipe.engine
        return engine.local if self.processes.several or self.arguments.lora_rank else vars(engine)


def student_of_round(run: RunFolder, number: int) -> Path:
    """Where the student after an earlier round than the last is."""
    return run / "train" / f"round-{number + 1}"


def load_student(recipe: Recipe, inputs: Inputs, arguments, several: bool = False):
    """(model, tokenizer) to train: float32, but what an adapter leaves as it is in the dtype of the computation."""
    if arguments.lora_4bit:
        return inputs.load(quantisation=quantisation(arguments))
    frozen = arguments.lora_rank and (arguments.bf16 or arguments.fp16)
    # Several processes: on the CPU, from where accelerate takes each one's shard.
    return inputs.load(dtype=None if frozen else "float32", device="cpu" if several else None)


def other_reference(arguments: T3DConfig) -> str | Path | None:
    """Where the reference is, if the objective has one and it is another model than the student at first."""
    named = arguments.method.needs_reference and arguments.reference_path is not None
    return checkpoint_of(arguments.reference_path) if named else None


def load_reference(recipe: Recipe, arguments: T3DConfig, several: bool = False):
    """The model of `train.reference_path`, in float32; None where the student's own copy is the reference."""
    path = other_reference(arguments)
    if path is None:
        return None
    return load_model(path, dtype="float32", device="cpu" if several else recipe.model.device)[0]


def check_reference(path: str | Path, model, tokenizer) -> None:
    """Raises T3DError, by its small files alone, if a checkpoint cannot be the reference of this student."""
    try:
        folder = local_folder(path)
        kind, found = read_config(folder).get("model_type"), plain_config(folder)
        check_weights(folder)
    except T3DError as error:
        raise T3DError(f"train.reference_path: {error}") from error
    for name in ("model_type", "block_size", "vocab_size"):
        mine, other = getattr(model.config, name), kind if name == "model_type" else getattr(found, name)
        if mine != other:
            raise T3DError(f"train.reference_path: {path} has {name} {other}, the student {mine}")
    if tokenizer_fingerprint(load_tokenizer(folder)) not in (None, tokenizer_fingerprint(tokenizer)):
        raise T3DError(f"train.reference_path: {path} has a different tokenizer from the student's")


def held_out(recipe: Recipe, inputs: Inputs, arguments, tokenizer) -> HeldOut:
    """The problems that `train.eval_every` evaluates on."""
    task = get_task(recipe.task, evaluation=arguments.eval_split != "train")
    decoding = DecodingConfig(max_tokens=recipe.eval.max_tokens)
    problems = task.problems(arguments.eval_split, arguments.eval_problems)
    problems = inputs.usable(problems, task, [decoding], "held-out")
    steps, most = arguments.eval_block_steps, recipe.eval.max_tokens
    return HeldOut(task, problems, tokenizer, steps, most, recipe.engine.local)


def check_reporting(recipe: Recipe) -> None:
    """Raises T3DError if what `train.report_to` names is not there to report to."""
    reported = recipe.training_arguments(recipe.run_dir).report_to
    for name in sorted(set(reported) - set(get_available_reporting_integrations())):
        raise T3DError(f"train.report_to: {name} is not installed, or unknown; pip install it, or leave it out")


def check_training(recipe: Recipe, inputs: Inputs) -> None:
    """Raises T3DError for settings or data that cannot be trained with."""
    check_reporting(recipe)
    arguments = recipe.training_arguments(recipe.run_dir)
    source(recipe).check(arguments, inputs)
    if (path := other_reference(arguments)) is not None:
        check_reference(path, *inputs.teacher)
    judged = arguments.method.rl_updates and arguments.method.rl_reward == "accuracy"
    if judged and inputs.task.verify("", inputs.train_problems[0]) is None:
        raise T3DError(f"train.rl_reward: task {inputs.task.name!r} cannot verify answers; {UNVERIFIED}")
    if arguments.method.reference_sees == "answer":
        check_answers(recipe, inputs)
    if arguments.eval_every:
        held_out(recipe, inputs, arguments, inputs.teacher[1])


def check_answers(recipe: Recipe, inputs: Inputs) -> None:
    """Raises T3DError if a prompt has no reference answer to be shown, or does not fit the model with it."""
    tokenizer, longest = inputs.teacher[1], recipe.rollout.max_tokens
    if recipe.rollout.source is None:
        prompts = {problem.id: inputs.task.answered_prompt(problem, tokenizer) for problem in inputs.train_problems}
    else:
        found, shown = adopted(recipe, inputs), AnswerPrompts(inputs.task, inputs.train_problems, tokenizer)
        prompts = {trajectory.prompt_id: shown(trajectory) for trajectory in found}
        longest = max(len(trajectory.response_ids) for trajectory in found)
    names = [f"{name} with its reference answer" for name in prompts]
    decoding = DecodingConfig(max_tokens=longest)
    check_prompts(recipe, *inputs.teacher, list(prompts.values()), names, [decoding])


def last_checkpoint(folder: Path, processes: Processes | None = None) -> Path | None:
    """The last checkpoint that was saved to its end; what a kill left of others is removed."""
    if processes is not None:
        processes.wait()  # none looks while the first one removes
    found = {}
    for path in folder.glob("checkpoint-*"):
        if (path / WHOLE).exists():
            found[checkpoint_step(path)] = path
        elif processes is None or processes.main:
            shutil.rmtree(path)
    if processes is not None:
        processes.wait()
    return found[max(found)] if found else None


def checkpoint_step(path: Path | None) -> int:
    return int(path.name.rpartition("-")[2]) if path is not None else 0


def _say_dropped(states) -> None:
    reasons = ", ".join(f"{number} {why}" for why, number in states.dropped.items() if number)
    total = len(states) + sum(states.dropped.values())
    log.info("train: %d of %d trajectories dropped%s", total - len(states), total, f" ({reasons})" if reasons else "")


class _KeepStudent(TrainerCallback):
    """Writes the student where it belongs: at the end of a round, or whenever it is the most accurate so far.

    It does so while a checkpoint is saved and before that one counts as whole, so a kill leaves both or none.
    """

    def __init__(self, trainer: T3DTrainer, round_: _Round):
        self.trainer, self.round = trainer, round_

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= min(self.round.end, state.max_steps):
            control.should_save = control.should_training_stop = True
            control.should_log |= args.logging_strategy == "steps"  # what is not logged now never is

    def on_save(self, args, state, control, **kwargs):
        over = state.global_step >= min(self.round.end, state.max_steps)
        best = self.round.keeps_best and state.best_global_step == state.global_step
        if best:
            self._write(self.round.run / "student")
        if over and not (self.round.last and self.round.keeps_best):
            self._write(self.round.output)

    def _write(self, folder: Path) -> None:
        inputs = self.round.inputs
        self.trainer.save_student(folder, self.round.dtype, lambda: inputs.load(dtype="float32", device="cpu")[0])


class _MarkWhole(TrainerCallback):
    """Called when a checkpoint is saved, as the last of all that write into it."""

    def on_save(self, args, state, control, **kwargs):
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # every process has written its part
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / WHOLE).touch()


class _Progress(TrainerCallback):
    """A bar on the terminal, and every logged value in the log file."""

    def __init__(self, shown: bool):
        self.shown = shown

    def on_train_begin(self, args, state, control, **kwargs):
        hidden = True if args.disable_tqdm or not self.shown else None
        self.bar = Bar(total=state.max_steps, initial=state.global_step, desc="train", unit="step", disable=hidden)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.at(state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not self.shown:
            return
        values = {k: round(v, 5) if isinstance(v, float) else v for k, v in (logs or {}).items()}
        log.debug("train: step %d %s", state.global_step, values)
        if "eval_accuracy" in values:
            log.info(
                "train: step %d, %.1f%% correct on held-out problems", state.global_step, 100 * values["eval_accuracy"]
            )
        if "loss" in values:
            self.bar.set_postfix(loss=values["loss"], refresh=False)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()
