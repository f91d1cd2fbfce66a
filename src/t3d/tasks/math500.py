"""`math500`: 500 competition problems (HuggingFaceH4/MATH-500, or Gen-Verse/MATH500). For evaluation only."""

from t3d.tasks.base import register
from t3d.tasks.math_task import MathTask


@register("math500")
class Math500(MathTask):
    hub = {"test": ("HuggingFaceH4/MATH-500", None, "test")}  # noqa: RUF012
    question_fields = ("problem", "question")
    id_fields = ("unique_id", "id")
