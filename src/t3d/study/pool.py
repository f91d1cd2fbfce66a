"""What a study's complete runs found, pooled over seeds."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from t3d.errors import T3DError
from t3d.evaluation.compare import Comparison, compare
from t3d.evaluation.metrics import wilson
from t3d.evaluation.oracle import TPF
from t3d.evaluation.rows import setting
from t3d.evaluation.summary import read_summary
from t3d.pipeline import RunFolder
from t3d.pipeline.train import last_checkpoint
from t3d.report.charts import Point
from t3d.study.config import Job, Study, labels
from t3d.trajectories import Trajectory, TrajectoryDataset


@dataclass(frozen=True)
class Pool:
    """One model at one decode setting over all of its seeds; the problems of different seeds are different ones."""

    variant: str
    labels: str
    setting: str
    rows: dict[int, dict]  # by seed, as in summary.json
    answers: dict[int, Path]  # by seed, folder of the trajectories

    def _sum(self, value) -> float:
        return sum(value(row) for row in self.rows.values())

    @property
    def knobs(self) -> dict:
        """What the strategy was set to beside the number of steps; empty for a fixed number."""
        return self.row["knobs"]

    @property
    def n(self) -> int:
        return int(self._sum(lambda row: row["num_verified"]))

    @property
    def accuracy(self) -> float:
        return self._sum(lambda row: row["accuracy"] * row["num_verified"]) / self.n

    @property
    def ci95(self) -> tuple[float, float]:
        return wilson(self.accuracy * self.n, self.n)

    @property
    def tokens(self) -> float:
        return self._sum(lambda row: row["mean_length"] * row["num_problems"])

    @property
    def predicting(self) -> float:
        """Forwards that denoise or verify, over all sequences."""
        return self._sum(lambda row: (row["nfe_denoise"] + row.get("nfe_verify", 0.0)) * row["num_problems"])

    @property
    def tpf(self) -> float:
        """Tokens per forward that predicts."""
        return self.tokens / max(1.0, self.predicting)

    @property
    def oracle_tpf(self) -> float | None:
        """Mean over seeds of the oracle's tokens per forward; None where a seed has none."""
        found = [row["extra"].get(TPF) for row in self.rows.values()]
        return None if None in found else sum(found) / len(found)

    @property
    def tpf_all(self) -> float:
        """Tokens per forward, prefill and commit included."""
        return self.tokens / max(1.0, self._sum(lambda row: row["nfe"] * row["num_problems"]))

    @property
    def point(self) -> Point:
        """Of a plot of accuracy against tokens per forward."""
        return Point(self.tpf, 100 * self.accuracy, 100 * self.ci95[0], 100 * self.ci95[1], self.setting, self.setting)

    @property
    def row(self) -> dict:
        """Of one seed; the decode setting is that of all."""
        return next(iter(self.rows.values()))

    @property
    def mean_length(self) -> float:
        return self._sum(lambda row: row["mean_length"]) / len(self.rows)

    def trajectories(self, seeds) -> Iterator[Trajectory]:
        for seed in seeds:
            for t in TrajectoryDataset(self.answers[seed]):
                yield replace(t, prompt_id=f"{seed}/{t.prompt_id}")

    def against(self, other: "Pool") -> tuple[list[int], Comparison] | None:
        """The seeds that both have, and the paired comparison on their problems; None if there are none."""
        seeds = sorted(self.rows.keys() & other.rows.keys())
        if not seeds:
            return None
        try:
            return seeds, compare(self.trajectories(seeds), other.trajectories(seeds))
        except T3DError:  # no problem in common: another task or evaluation set
            return None


@dataclass(frozen=True)
class Cost:
    """What training one job took."""

    steps: int
    flops: float  # see T3DTrainer.floating_point_ops
    seconds: float


def pools(study: Study) -> list[Pool]:
    """Every variant, after its teacher, at every decode setting; only what was run."""
    found: dict[tuple[str, str, str, int], tuple[dict, dict]] = {}
    for job in study.jobs:
        run = RunFolder(job.recipe.run_dir)
        if not run.complete("eval"):
            continue
        for row in read_summary(run / "summary.json")["rows"]:
            teacher, student = (name + job.recipe.model.suffix for name in ("teacher", "student"))
            if row["model"] not in (teacher, student) or row["accuracy"] is None:
                continue
            mine = row["model"] == student or not job.train
            known = labels(job.recipe) if mine and job.train else ""
            key = (job.variant if mine else study.teachers[job.variant], known, setting(row))
            key += (row["block_size"],)
            rows, answers = found.setdefault(key, ({}, {}))
            rows.setdefault(job.seed, row)
            answers.setdefault(job.seed, run / "eval" / row["results"])
    names = dict.fromkeys(name for variant in study.variants for name in (study.teachers[variant], variant))
    order = {name: place for place, name in enumerate(names)}
    sizes = {size for *_, size in found}  # models of several; a setting that changes a model's own says so itself
    made = []
    for (name, known, where, size), (rows, answers) in sorted(found.items(), key=lambda item: order[item[0][0]]):
        own = all("block_size" not in row.get("other", {}) for row in rows.values())
        where += f", block {size}" if len(sizes) > 1 and own else ""
        made.append(Pool(name, known, where, rows, answers))
    return made


def costs(study: Study) -> dict[str, list[Cost]]:
    """What training took, of every complete run, by variant."""
    found: dict[str, list[Cost]] = {}
    for job in study.jobs:
        run = RunFolder(job.recipe.run_dir)
        if run.complete("train"):
            found.setdefault(job.variant, []).append(_cost(run, job))
    return found


def _cost(run: RunFolder, job: Job) -> Cost:
    checkpoint = last_checkpoint(run / "train")
    path = (checkpoint or run / "train") / "trainer_state.json"
    try:
        state = json.loads(path.read_text())
        return Cost(state["global_step"], state["total_flos"], run.record("train")["seconds"])
    except (OSError, ValueError, LookupError) as error:
        raise T3DError(f"cannot read what {job.variant}, seed {job.seed} cost: {path}: {error}") from error
