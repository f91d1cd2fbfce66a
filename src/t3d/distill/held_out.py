"""Few-step evaluation on held-out problems while training: what the loss does not show."""

from dataclasses import dataclass

from torch import nn

from t3d.answers import Job, answers
from t3d.decoding import DecodingConfig
from t3d.decoding.sampling import derive_seed
from t3d.engine import Engine
from t3d.errors import T3DError
from t3d.tasks import Problem, Task


@dataclass
class HeldOut:
    """Problems that are decoded greedily by the student as it is, and verified.

    steps: denoising steps per block of each evaluation; problems: all with a verdict; engine: of `t3d.Engine`.
    """

    task: Task
    problems: list[Problem]
    tokenizer: object
    steps: list[int]
    max_tokens: int
    engine: dict

    def __post_init__(self):
        if not self.problems:
            raise T3DError("train.eval_every: there are no problems to evaluate on")
        if self.task.verify("", self.problems[0]) is None:
            raise T3DError(
                f"train.eval_every: task {self.task.name!r} cannot verify answers, so no checkpoint is the best; "
                "set it to 0"
            )

    def __call__(self, model: nn.Module, part: int = 0, parts: int = 1) -> dict[str, tuple[float, float]]:
        """(sum, count) of each metric over every `parts`-th problem from `part` on."""
        jobs = [
            Job(problem, self.task.prompt(problem, self.tokenizer), 0, derive_seed(0, i, 0))
            for i, problem in list(enumerate(self.problems))[part::parts]
        ]
        found: dict[str, tuple[float, float]] = {}
        engine = Engine(model, self.tokenizer, **self.engine)
        for steps in self.steps if jobs else ():
            decoding = DecodingConfig(steps=min(steps, model.config.window or steps), max_tokens=self.max_tokens)
            ended = [answer.trajectory for group in answers(engine, jobs, decoding, self.task) for answer in group]
            right, count = float(sum(bool(t.correct) for t in ended)), float(len(ended))
            tokens, forwards = sum(t.length for t in ended), sum(t.nfe.predicting for t in ended)
            found[f"accuracy/steps_{steps}"] = (right, count)
            found[f"tpf/steps_{steps}"] = (float(tokens), float(forwards))
            before = found.get("accuracy", (0.0, 0.0))
            found["accuracy"] = (before[0] + right, before[1] + count)
        return found
