"""`option`: multiple choice (by default cais/mmlu). The answer is a letter in \\boxed{}."""

import re
import string

from t3d.errors import T3DError
from t3d.tasks.base import Problem, Verdict, register
from t3d.tasks.files import FileTask, pick
from t3d.tasks.math import last_boxed

_LETTER = re.compile(r"(?:\\(?:text|textbf|mathrm|mathbf)\{)?\s*\(?([A-Za-z])\)?(?![A-Za-z0-9]).*", re.DOTALL)


@register("option")
class Option(FileTask):
    """`question` with the options in it, or beside it as a list `choices` or `options`; the answer is a letter, or a
    number that counts from 0."""

    template = (
        "This is the problem:\n{question}\n"
        "You need to think step by step and put the letter of the right option, and nothing else, in \\boxed{}."
    )
    answer_fields = ("answer", "ground_truth_answer")
    hub = {"dev": ("cais/mmlu", "all", "validation"), "test": ("cais/mmlu", "all", "test")}  # noqa: RUF012

    def problem(self, record: dict, id: str, where: str) -> Problem:
        question, answer = self.question(record, where), self.answer(record, where)
        choices = pick(record, None, ("choices", "options"), where, optional=True) or []
        if choices:
            question += "".join(
                f"\n{letter}. {text}" for letter, text in zip(string.ascii_uppercase, choices, strict=False)
            )
        if answer is not None and answer.isdigit() and int(answer) < len(choices):
            answer = string.ascii_uppercase[int(answer)]
        letter = None if answer is None else _letter(answer)
        if answer is not None and letter is None:
            raise T3DError(f"{where}: the answer {answer!r} is not the letter of an option, nor its number from 0")
        return Problem(id, question, letter)

    def judge(self, text: str, problem: Problem) -> Verdict:
        if problem.answer is None:
            return Verdict(None)
        boxed = last_boxed(text)
        letter = None if boxed is None else _letter(boxed)
        if letter is None:
            return Verdict(False, boxed, "no letter in \\boxed{}")
        correct = letter == problem.answer
        return Verdict(correct, letter, "" if correct else f"expected {problem.answer}")


def _letter(text: str) -> str | None:
    match = _LETTER.fullmatch(text.strip())
    return match[1].upper() if match else None
