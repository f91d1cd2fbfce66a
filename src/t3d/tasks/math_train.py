"""`math_train`: 8,523 MATH problems of level 3 to 5, none of them in MATH-500 (Gen-Verse/MATH_train). For training.

2,934 of them come from the official test split: a model trained here is measured on `math500`, not on the others.
"""

from t3d.tasks.base import register
from t3d.tasks.math_task import MathTask


@register("math_train")
class MathTrain(MathTask):
    hub = {"train": ("Gen-Verse/MATH_train", None, "train")}  # noqa: RUF012
    question_fields = ("question", "problem")

    def belongs(self, record: dict, split: str) -> bool:
        return record.get("ground_truth_answer") != "None"  # two records whose \\boxed 9 was not understood
