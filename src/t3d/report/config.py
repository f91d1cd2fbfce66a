"""The `report` section of a recipe."""

from dataclasses import dataclass, field

from t3d.errors import T3DError


@dataclass(frozen=True)
class ReportConfig:
    """What the report shows besides the numbers."""

    title: str = field(default="", metadata={"help": "heading of the report; default: the names of the runs"})
    problems: int = field(default=24, metadata={"help": "problems in the trajectory viewer"})

    def __post_init__(self):
        if self.problems < 0:
            raise T3DError(f"problems must not be negative, got {self.problems}")
