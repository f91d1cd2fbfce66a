"""RUN/summary.json: the rows of a run and what they were made with."""

import json
from collections.abc import Iterable
from pathlib import Path

from t3d.disk import write_whole
from t3d.errors import T3DError
from t3d.evaluation.metrics import aup
from t3d.evaluation.rows import EvalRow

STAGES = ("rollout", "train", "eval", "total")


def write_summary(
    path: Path | str,
    *,
    task: str,
    seed: int,
    versions: dict,
    wall_seconds: dict[str, float],
    rows: Iterable[EvalRow],
    dropped_prompts: int = 0,
) -> dict:
    """Write `path` whole or not at all, and return what was written; docs/evaluation.md gives the schema.

    dropped_prompts: how many problems `task.bad_prompts=drop` left out, beside those that are counted in the rows.
    wall_seconds: of the stages "rollout", "train", "eval" and of all ("total"); 0 for one that did not run.
    """
    rows = [row.to_dict() for row in rows]
    summary = {
        "task": task,
        "num_problems": max((row["num_problems"] for row in rows), default=0),
        "dropped_prompts": dropped_prompts,
        "seed": seed,
        "versions": versions,
        "wall_seconds": {stage: wall_seconds.get(stage, 0.0) for stage in STAGES},
        "rows": rows,
        "aup": aup_by_model(rows),
    }
    write_whole(Path(path), json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    return summary


def read_summary(path: Path | str) -> dict:
    """The contents of a summary.json; T3DError if it is missing or not one."""
    try:
        summary = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise T3DError(f"cannot read {path}: {error.strerror}; run `t3d eval` first") from error
    except ValueError as error:
        raise T3DError(f"{path} is not JSON: {error}; run `t3d eval --force` again") from error
    if not isinstance(summary, dict) or not isinstance(summary.get("rows"), list):
        raise T3DError(f"{path} is not the summary of a run: it has no rows")
    return summary


def series(row: dict) -> str:
    """The curve that a row is a point of: one model, unmasking strategy and, where it samples, temperature and seed."""
    parts = [row["model"]]
    if row["strategy"] != "low_confidence_static":
        parts.append(row["strategy"].removeprefix("low_confidence_"))
    if row["temperature"]:
        parts += [f"T={row['temperature']:g}", f"seed {row['seed']}"]
    return ", ".join(parts)


def aup_by_model(rows: list[dict]) -> dict[str, float]:
    """AUP of every curve of `rows`, all against the best accuracy among them; curves without verdicts are left out."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["accuracy"] is not None:
            curves.setdefault(series(row), []).append((row["tpf"], 100 * row["accuracy"]))
    return aup_by_curve(curves)


def aup_by_curve(curves: dict[str, list[tuple[float, float]]]) -> dict[str, float]:
    """AUP of each curve of (TPF, accuracy in percent), all against the best accuracy among them."""
    best = max((y for points in curves.values() for _, y in points), default=0.0)
    return {name: aup(points, best) for name, points in curves.items()}
