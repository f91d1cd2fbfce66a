"""The `report` section of a recipe."""

from dataclasses import dataclass

from t3d.components import check_values, setting


@dataclass(frozen=True)
class ReportConfig:
    """What the report shows besides the numbers."""

    title: str = setting("", "heading of the report; default: the names of the runs")
    problems: int = setting(24, "problems in the trajectory viewer", low=0)

    def __post_init__(self):
        check_values(self)
