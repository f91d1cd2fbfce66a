"""`mbpp`: 974 short Python tasks (google-research-datasets/mbpp, its sanitized form, or Gen-Verse/MBPP)."""

import re

from t3d.tasks.base import Problem, register
from t3d.tasks.code import CodeTask, called
from t3d.tasks.files import pick

_HUB = "google-research-datasets/mbpp"
_DEFINED = re.compile(r"^(?:def|class)\s+(\w+)", re.MULTILINE)


@register("mbpp")
class MBPP(CodeTask):
    """The original files hold all splits: tasks 11-510 are test, 511-600 dev, all others train."""

    hub = {  # noqa: RUF012
        "train": (_HUB, "full", "train"),
        "dev": (_HUB, "full", "validation"),
        "test": (_HUB, "full", "test"),
    }
    id_fields = ("task_id", "id")

    def belongs(self, record: dict, split: str) -> bool:
        number = record.get("task_id")
        if not isinstance(number, int) or "test_method" in record:  # Gen-Verse's files hold one split each
            return True
        return split == ("test" if 11 <= number <= 510 else "dev" if 511 <= number <= 600 else "train")

    def problem(self, record: dict, id: str, where: str) -> Problem:
        if "test_method" in record:
            return super().problem(record, id, where)
        text = pick(record, self.config.question_field, ("text", "prompt"), where)
        asserts = [*pick(record, None, ("test_list",), where), *(record.get("challenge_test_list") or [])]
        setup = "\n".join([*(record.get("test_imports") or []), record.get("test_setup_code") or ""])
        code = (record.get("code") or "").replace("\r\n", "\n")
        extra = {
            "method": "function",
            "seconds": 5.0,
            "prefix": "",
            "tests": ["\n".join(asserts)],
            "setup": setup,
            "entry": sorted(set(_DEFINED.findall(code)) & set(re.findall(r"\w+", " ".join(asserts))))
            or called(asserts),
        }
        if code:
            extra["solution"] = code
        return Problem(id, f"{text}\nYour code should pass the test:\n{asserts[0]}\n", None, extra)
