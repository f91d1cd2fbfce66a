"""Questions with a mathematical answer: what `prompts`, `gsm8k`, `math500` and `math_train` share."""

import re
from random import Random

from t3d.tasks.base import Problem, Verdict
from t3d.tasks.files import FileTask
from t3d.tasks.math import equal, extract_answer, last_boxed, reference_answer


class MathTask(FileTask):
    template = "{question}\nPlease reason step by step, and put your final answer within \\boxed{}."
    answer_fields = ("answer", "ground_truth_answer")
    boxed_only = True  # an answer outside of \boxed{} does not count

    def problem(self, record: dict, id: str, where: str) -> Problem:
        reference = self.answer(record, where)
        worked = next((t for t in (record.get("solution"), reference) if isinstance(t, str) and _is_worked(t)), None)
        answer = None if reference is None else reference_answer(reference)
        return Problem(id, self.question(record, where), answer, {} if worked is None else {"solution": worked})

    def judge(self, text: str, problem: Problem) -> Verdict:
        if problem.answer is None:
            return Verdict(None)
        extracted = extract_answer(text, self.boxed_only)
        if extracted is None:
            return Verdict(False, None, "no answer found")
        correct = equal(extracted, problem.answer)
        return Verdict(correct, extracted, "" if correct else f"expected {problem.answer}")

    def solution(self, problem: Problem, rng: Random) -> str:
        """The data's worked solution; GSM8K's without its calculator notes, and with a boxed answer."""
        if "solution" not in problem.extra:
            return super().solution(problem, rng)
        text = problem.extra["solution"]
        if last_boxed(text) is None:
            steps = re.sub(r"<<.*?>>", "", text.rpartition("####")[0]).strip()
            text = f"{steps}\nThe answer is \\boxed{{{problem.answer}}}."
        return text


def _is_worked(text: str) -> bool:
    return "####" in text or last_boxed(text) is not None
