"""`gsm8k`: 7,473 + 1,319 grade-school word problems (openai/gsm8k; Gen-Verse/GSM8K has the same questions)."""

from t3d.tasks.base import register
from t3d.tasks.math_task import MathTask


@register("gsm8k")
class GSM8K(MathTask):
    hub = {"train": ("openai/gsm8k", "main", "train"), "test": ("openai/gsm8k", "main", "test")}  # noqa: RUF012
    boxed_only = False
