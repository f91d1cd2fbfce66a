"""`prompts`: the user's own questions and chats, from a file or a dataset."""

from dataclasses import replace
from random import Random

from t3d.tasks.base import Problem, register
from t3d.tasks.chat import read_chat
from t3d.tasks.math import last_boxed, reference_answer
from t3d.tasks.math_task import MathTask


@register("prompts")
class Prompts(MathTask):
    """A `question` for the template, or what is asked as it is: `messages`, `conversations`, or `prompt`.

    `answer` (or Gen-Verse's `ground_truth_answer`) is what responses are verified with. A reply, which is the chat's
    last message or `completion`, is a ground-truth response, and verifies others only if it marks its answer.
    """

    boxed_only = False
    question_fields = ("question", "prompt", "messages", "conversations")

    def problem(self, record: dict, id: str, where: str) -> Problem:
        chosen, asked = self.config.question_field, record.get("question")
        record, messages, reply = read_chat(record, chosen, where)
        problem = super().problem(record, id, where)
        if chosen is None and asked is None and messages is None:
            messages = [{"role": "user", "content": problem.question}]  # of a `prompt`, which needs no template
        if reply is None:
            return replace(problem, messages=messages)
        answer = reference_answer(reply) if problem.answer is None and _marks_answer(reply) else problem.answer
        return replace(problem, answer=answer, extra={"reply": reply}, messages=messages)

    def solution(self, problem: Problem, rng: Random) -> str:
        return problem.extra["reply"] if "reply" in problem.extra else super().solution(problem, rng)


def _marks_answer(reply: str) -> bool:
    """In a box, or in the last line behind `####`, which elsewhere is a heading."""
    return last_boxed(reply) is not None or reply.strip().rpartition("\n")[2].startswith("#### ")
