"""Ground-truth responses in the form of trajectories, for `sft`."""

from collections.abc import Sequence
from random import Random

from t3d.blocks import origin
from t3d.trajectories import NFE, Trajectory


class SolutionDataset(Sequence):
    """A task's training problems with their ground-truth responses, tokenised when asked for.

    A response ends with the stop token, repeated to the end of its block: the student learns what follows a stop too.
    block_size, anchored, full: the model's, see `t3d.blocks.geometry`; block_size None: all of a response is one.
    """

    def __init__(
        self,
        task,
        tokenizer,
        num: int | None,
        block_size: int | None,
        stop_id: int,
        seed: int = 0,
        anchored: bool = False,
        full: bool = False,
    ):
        self.problems = task.problems("train", num)
        self.task, self.tokenizer = task, tokenizer
        self.block_size, self.stop_id, self.seed = block_size, stop_id, seed
        self.anchored, self.full = anchored, full

    def __len__(self) -> int:
        return len(self.problems)

    def __getitem__(self, item: int) -> Trajectory:
        problem = self.problems[item]
        text = self.task.solution(problem, Random(f"{self.seed}/{problem.id}"))
        prompt = self.task.prompt(problem, self.tokenizer)
        response = [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.stop_id]
        size = self.block_size or len(response)
        begin = origin(len(prompt), size, self.anchored) + len(prompt)
        response += [self.stop_id] * (-(begin + len(response)) % size)
        return Trajectory(
            prompt_ids=prompt,
            response_ids=response,
            step_map=[0] * len(response),
            confidence=[1.0] * len(response),
            length=len(response),
            finish_reason="stop",
            nfe=NFE(),
            block_size=size,
            anchored=self.anchored,
            canvas=len(response) if self.full else 0,
            text=text,
            prompt_id=problem.id,
            question=problem.question,
            answer=problem.answer,
            correct=True,
        )
