"""What a report is made of: the rows, the training curves and a choice of answers of some runs."""

import json
import math
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path

from t3d.errors import T3DError
from t3d.evaluation.compare import reference_row
from t3d.evaluation.rows import EXTRACTED, REASON, setting
from t3d.evaluation.summary import read_summary, series
from t3d.report.tokens import token_texts
from t3d.trajectories import CONTEXT, Trajectory, TrajectoryDataset

# what the Trainer logs besides the curves
_NO_CURVES = {"epoch", "step", "total_flos", "train_loss"}


@dataclass
class Row:
    """A row of a summary, with what the report calls it and where its answers are."""

    values: dict  # as in summary.json
    label: str  # the model
    setting: str  # "2 steps"
    series: str  # the curve it is a point of
    answers: TrajectoryDataset | None  # None where the folder was removed
    verdicts: dict[tuple[str, int], bool | None] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.label}, {self.setting}"


@dataclass
class Run:
    path: Path
    summary: dict
    curves: dict[str, list[tuple[float, float]]]  # metric -> (optimizer step, value)


def load_runs(folders: list[Path]) -> tuple[list[Run], list[Row]]:
    """The runs, and their rows without those that another run has just the same (the teacher's).

    Raises:
        T3DError: if there is no run, or one has no readable summary.json.
    """
    if not folders:
        raise T3DError("nothing to report: give at least one run folder")
    runs = [Run(Path(f), read_summary(Path(f) / "summary.json"), _curves(Path(f))) for f in folders]
    rows, seen = [], set()
    for run in runs:
        for values in run.summary["rows"]:
            facts = [
                values[k] for k in ("model", "strategy", "steps", "accuracy", "tpf", "mean_length", "num_problems")
            ]
            if (key := json.dumps(facts)) in seen:
                continue
            seen.add(key)
            several = len(runs) > 1 and values["model"] != "teacher"
            suffix = f" ({run.path.resolve().name})" if several else ""
            rows.append(_row(run, values, suffix))
    return runs, rows


def _row(run: Run, values: dict, suffix: str) -> Row:
    folder = run.path / "eval" / values["results"] if values.get("results") else None
    answers = TrajectoryDataset(folder) if folder is not None and folder.is_dir() else None
    verdicts = {}
    if answers is not None:
        verdicts = dict(zip(answers.keys(), answers.column("correct"), strict=True))
    return Row(values, values["model"] + suffix, setting(values), series(values) + suffix, answers, verdicts)


def _curves(run: Path) -> dict[str, list[tuple[float, float]]]:
    """Every metric with at least two values in the newest trainer_state.json under RUN/train."""
    states = [run / "train" / "trainer_state.json"]
    states += sorted(
        (run / "train").glob("checkpoint-*/trainer_state.json"),
        key=lambda p: int(p.parent.name.rpartition("-")[2]) if p.parent.name.rpartition("-")[2].isdigit() else -1,
        reverse=True,
    )
    path = next((p for p in states if p.is_file()), None)
    if path is None:
        return {}
    try:
        history = json.loads(path.read_text())["log_history"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise T3DError(f"{path} is not a trainer state: {error}") from error
    curves = defaultdict(list)
    for entry in history:
        for name, value in entry.items():
            wanted = name not in _NO_CURVES and not name.startswith(("train_run", "train_samples", "train_steps"))
            if wanted and isinstance(value, (int, float)) and math.isfinite(value):
                curves[name].append((entry["step"], value))
    return {name: points for name, points in curves.items() if len(points) > 1}


def reference(rows: list[Row]) -> Row | None:
    """The row that others are compared with."""
    base = reference_row([row.values for row in rows])
    return next((row for row in rows if row.values is base), None)


def choose_problems(rows: list[Row], count: int) -> list[tuple[str, int]]:
    """Up to `count` problems that every row has answered, telling ones first: solved by some rows, not by others.

    Taken in turn from problems on which the rows disagree, that none solves and that all solve. The same for the
    same results, whatever the order in which they were decoded.
    """
    rows = [row for row in rows if row.verdicts]
    if not rows:
        return []
    groups: dict[str, list[tuple[str, int]]] = {"differ": [], "none": [], "all": [], "unknown": []}
    for key in rows[0].verdicts:
        if all(key in row.verdicts for row in rows):
            verdicts = {row.verdicts[key] for row in rows}
            kind = {frozenset({True}): "all", frozenset({False}): "none"}.get(frozenset(verdicts), "differ")
            groups["unknown" if None in verdicts else kind].append(key)
    half = groups["differ"][::2], groups["differ"][1::2]  # two of three, while there are any
    turns = zip_longest(half[0], half[1], groups["none"], groups["all"], groups["unknown"])
    chosen = [key for key in chain.from_iterable(turns) if key is not None][:count]
    order = {key: place for place, key in enumerate(rows[0].verdicts)}
    return sorted(chosen, key=order.__getitem__)


def viewer_data(rows: list[Row], problems: list[tuple[str, int]]) -> dict:
    """What the trajectory viewer plays, as JSON-able values."""
    shown = [row for row in rows if row.answers is not None]
    data = {"rows": [{"label": row.label, "setting": row.setting} for row in shown], "problems": []}
    places = [{key: place for place, key in enumerate(row.verdicts)} for row in shown]
    for key in problems:
        found = [row.answers[place[key]] for row, place in zip(shown, places, strict=True)]
        data["problems"].append(
            {
                "id": key[0] + (f" #{key[1]}" if key[1] else ""),
                "question": found[0].question or "",
                "context": found[0].extra.get(CONTEXT, []),
                "answer": found[0].answer,
                "answers": [_answer(t) for t in found],
            }
        )
    return data


def _answer(t: Trajectory) -> dict:
    return {
        "correct": t.correct,
        "extracted": t.extra.get(EXTRACTED),
        "reason": t.extra.get(REASON) or "",
        "block": t.block_size,
        "tail": t.tail,  # the first texts are the prompt's
        "texts": token_texts(t),
        "steps": t.step_map,
        "confidence": [None if math.isnan(c) else round(c, 3) for c in t.confidence],
        "length": t.length,
        "stopped": t.finish_reason == "stop",
    }
