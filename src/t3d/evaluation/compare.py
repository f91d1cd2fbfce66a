"""Two models, or two settings, on the same problems: what only one of them solves, and whether that is chance."""

from collections.abc import Iterable
from dataclasses import dataclass

from t3d.errors import T3DError
from t3d.evaluation.metrics import bootstrap, mcnemar
from t3d.trajectories import Trajectory, TrajectoryDataset


@dataclass(frozen=True)
class Comparison:
    """Counts over the answers (problem and sample) that both have a verdict for."""

    both: int
    only_a: int
    only_b: int
    neither: int
    difference: float  # accuracy of a minus accuracy of b
    ci95: tuple[float, float]  # of the difference, bootstrap over problems
    p_value: float  # McNemar's exact two-sided test

    @property
    def n(self) -> int:
        return self.both + self.only_a + self.only_b + self.neither


def reference_row(rows: list[dict]) -> dict | None:
    """The row that others are compared with: the teacher's with the most steps, else the one of highest accuracy."""
    verified = [row for row in rows if row["accuracy"] is not None]
    teachers = [row for row in verified if row["model"] == "teacher" and not row["knobs"]]
    if teachers:
        return max(teachers, key=lambda row: row["steps"])
    return max(verified, key=lambda row: row["accuracy"], default=None)


def compare(a: Iterable[Trajectory], b: Iterable[Trajectory]) -> Comparison:
    """Paired comparison on the problems that `a` and `b` share (e.g. two `TrajectoryDataset`s of evaluations).

    With several samples per problem, sample i is paired with sample i; the test then treats answers as independent,
    the interval does not.

    Raises:
        T3DError: if no problem has a verdict in both.
    """
    verdicts = [_verdicts(side) for side in (a, b)]
    shared = sorted(verdicts[0].keys() & verdicts[1].keys())
    if not shared:
        raise T3DError("nothing to compare: the two evaluations share no verified problem")
    pairs = [(verdicts[0][key], verdicts[1][key]) for key in shared]
    differences: dict[str, list[int]] = {}
    for (problem, _), (x, y) in zip(shared, pairs, strict=True):
        differences.setdefault(problem, []).append(int(x) - int(y))
    only_a, only_b = pairs.count((True, False)), pairs.count((False, True))
    return Comparison(
        both=pairs.count((True, True)),
        only_a=only_a,
        only_b=only_b,
        neither=pairs.count((False, False)),
        difference=(only_a - only_b) / len(pairs),
        ci95=bootstrap([sum(d) / len(d) for d in differences.values()]),
        p_value=mcnemar(only_a, only_b),
    )


def _verdicts(side: Iterable[Trajectory]) -> dict[tuple[str, int], bool]:
    if isinstance(side, TrajectoryDataset):  # reads no more of it than this
        found: Iterable = zip(side.keys(), side.column("correct"), strict=True)
    else:
        found = (((t.prompt_id, t.sample), t.correct) for t in side)
    return {key: correct for key, correct in found if correct is not None}
