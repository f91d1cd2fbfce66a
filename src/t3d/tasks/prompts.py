"""`prompts`: the user's own questions, from any JSONL, JSON or Parquet file."""

from t3d.tasks.base import register
from t3d.tasks.math_task import MathTask


@register("prompts")
class Prompts(MathTask):
    """A field `question` and, to be verified, `answer` (or Gen-Verse's `ground_truth_answer`)."""

    boxed_only = False
