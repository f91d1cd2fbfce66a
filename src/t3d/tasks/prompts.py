"""`prompts`: the user's own questions, from any JSONL, JSON or Parquet file."""

from t3d.tasks.base import Problem, Verdict, register
from t3d.tasks.files import FileTask
from t3d.tasks.math import equal, extract_answer, reference_answer

STEP_BY_STEP = "{question}\nPlease reason step by step, and put your final answer within \\boxed{}."


class MathTask(FileTask):
    """Questions with a mathematical answer."""

    template = STEP_BY_STEP
    boxed_only = True  # an answer outside of \boxed{} does not count

    def judge(self, text: str, problem: Problem) -> Verdict:
        if problem.answer is None:
            return Verdict(None)
        extracted = extract_answer(text, self.boxed_only)
        if extracted is None:
            return Verdict(False, None, "no answer found")
        correct = equal(extracted, problem.answer)
        return Verdict(correct, extracted, "" if correct else f"expected {problem.answer}")

    def answer(self, record: dict, where: str) -> str | None:
        answer = super().answer(record, where)
        return None if answer is None else reference_answer(answer)


@register("prompts")
class Prompts(MathTask):
    """A field `question` and, to be verified, `answer` (or Gen-Verse's `ground_truth_answer`)."""

    answer_fields = ("answer", "ground_truth_answer")
    boxed_only = False
