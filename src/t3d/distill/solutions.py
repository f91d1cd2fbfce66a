"""Ground-truth responses in the form of trajectories, for `sft`."""

from collections.abc import Sequence
from random import Random

from t3d.trajectories import NFE, Trajectory


class SolutionDataset(Sequence):
    """A task's training problems with their ground-truth responses, tokenised when asked for.

    A response ends with the stop token, repeated to the end of its block: the student learns what follows a stop too.
    """

    def __init__(self, task, tokenizer, num: int | None, block_size: int, stop_id: int, seed: int = 0):
        self.problems = task.problems("train", num)
        self.task, self.tokenizer = task, tokenizer
        self.block_size, self.stop_id, self.seed = block_size, stop_id, seed

    def __len__(self) -> int:
        return len(self.problems)

    def __getitem__(self, item: int) -> Trajectory:
        problem = self.problems[item]
        text = self.task.solution(problem, Random(f"{self.seed}/{problem.id}"))
        prompt = self.task.prompt(problem, self.tokenizer)
        response = [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.stop_id]
        response += [self.stop_id] * (-(len(prompt) + len(response)) % self.block_size)
        return Trajectory(
            prompt_ids=prompt,
            response_ids=response,
            step_map=[0] * len(response),
            confidence=[1.0] * len(response),
            length=len(response),
            finish_reason="stop",
            nfe=NFE(),
            block_size=self.block_size,
            text=text,
            prompt_id=problem.id,
            question=problem.question,
            answer=problem.answer,
            correct=True,
        )
