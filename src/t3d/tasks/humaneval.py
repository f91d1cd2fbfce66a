"""`humaneval`: 164 functions to complete (openai/openai_humaneval, or Gen-Verse/HumanEval). For evaluation only."""

from t3d.tasks.base import Problem, register
from t3d.tasks.code import CodeTask, helpers
from t3d.tasks.files import pick


@register("humaneval")
class HumanEval(CodeTask):
    """The original records become Gen-Verse's: the answer starts with the code to complete, in a code block."""

    hub = {"test": ("openai/openai_humaneval", None, "test")}  # noqa: RUF012
    id_fields = ("task_id", "id")

    def problem(self, record: dict, id: str, where: str) -> Problem:
        if "test_list" in record:
            return super().problem(record, id, where)
        prompt, test, entry = (pick(record, None, (field,), where) for field in ("prompt", "test", "entry_point"))
        prefix = f"Here is the completed code:\n```python\n{prompt}\n"
        extra = {
            "method": "function",
            "seconds": 5.0,
            "prefix": prefix,
            "tests": [f"{test}\ncheck({entry})"],
            "setup": helpers(prefix),
            "entry": [entry],
        }
        if "canonical_solution" in record:
            extra["completion"] = record["canonical_solution"]
            extra["solution"] = prompt + record["canonical_solution"]
        return Problem(id, f"You need to complete this code:\n{prompt}\n", None, extra)
