"""Prompts that show the reference answer, for a reference that sees more than the student."""

from t3d.errors import T3DError
from t3d.tasks import Problem, Task
from t3d.trajectories import Trajectory


class AnswerPrompts:
    """Of a task's trajectories; one to a problem that is not among `problems` brings its own question and answer."""

    def __init__(self, task: Task, problems: list[Problem], tokenizer):
        self.task, self.tokenizer = task, tokenizer
        self.problems = {problem.id: problem for problem in problems}

    def __call__(self, trajectory: Trajectory) -> list[int]:
        """The ids of the trajectory's prompt with the reference answer in it.

        Raises:
            T3DError: if there is no answer, or the task would ask the question in another way than the trajectory's.
        """
        name = trajectory.prompt_id
        problem = self.problems.get(name) or Problem(name, trajectory.question or "", trajectory.answer)
        found = self.task.answered_prompt(problem, self.tokenizer)
        if self.task.prompt(problem, self.tokenizer) != list(trajectory.prompt_ids):
            raise T3DError(
                f"train.reference_sees: the prompt of trajectory {name!r} is not what task {self.task.name!r} asks; "
                "roll out again, set task.template to what it was, or set reference_sees=prompt"
            )
        return found
