"""`primeintellect`: programming problems judged by input and output, or by calls (Gen-Verse/PrimeIntellect)."""

from t3d.tasks.base import register
from t3d.tasks.code import CodeTask


@register("primeintellect")
class PrimeIntellect(CodeTask):
    hub = {"train": ("Gen-Verse/PrimeIntellect", None, "train")}  # noqa: RUF012
