"""What the trainer does between steps: rounds of the reference, the last log, evaluation while training."""

from pathlib import Path

from transformers import TrainerCallback


class Rounds(TrainerCallback):
    """A round ends every `round_interval` optimizer steps: the reference becomes the student, or moves towards it."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if self.trainer.resumed:
            self.trainer.reference.load(Path(self.trainer.resumed))

    def on_step_end(self, args, state, control, **kwargs):
        objective = self.trainer.objective
        if objective.round_interval and state.global_step % objective.round_interval == 0:
            self.trainer.reference.refresh(self.trainer.model_wrapped, objective.reference_ema)


class LogLast(TrainerCallback):
    """Logs the last steps too, however few: else a short run would say nothing of its loss and its speed."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= args.logging_strategy == "steps" and state.global_step >= state.max_steps


class Evaluate(TrainerCallback):
    """Evaluates every `eval_every` optimizer steps, and saves what was evaluated, so that the best one is there."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_evaluate = state.global_step % args.eval_every == 0 or state.global_step >= state.max_steps

    def on_evaluate(self, args, state, control, **kwargs):
        control.should_save = True
