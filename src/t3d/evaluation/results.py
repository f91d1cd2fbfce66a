"""The rows of an evaluation as results.json, results.csv and results.md (docs/evaluation.md gives the schema)."""

import csv
import io
import json
from dataclasses import asdict
from pathlib import Path

from t3d.evaluation.compare import compare, reference_row
from t3d.evaluation.rows import EvalRow, columns, row_name
from t3d.evaluation.summary import aup_by_model, write_whole
from t3d.trajectories import TrajectoryDataset

FORMAT, VERSION = "t3d-results", 1


def write_results(folder: Path | str, rows: list[EvalRow], **about) -> dict:
    """Write results.json, results.csv and results.md to `folder`, where `evaluate` put the answers; return the first.

    Every row is compared with the teacher at the most steps (else with the best row), problem by problem.
    about: what else results.json should say (task, seed, versions, ...).
    """
    folder = Path(folder)
    values = [row.to_dict() for row in rows]
    results = {
        "format": FORMAT,
        "version": VERSION,
        **about,
        "rows": values,
        "aup": aup_by_model(values),
        "comparisons": _comparisons(folder, values),
    }
    write_whole(folder / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    write_whole(folder / "results.csv", _csv(values))
    write_whole(folder / "results.md", markdown(values))
    return results


def _comparisons(folder: Path, rows: list[dict]) -> list[dict]:
    base = reference_row(rows)
    if base is None or not base["results"]:
        return []
    found = []
    for row in rows:
        if row is not base and row["num_verified"] and row["results"]:
            result = compare(TrajectoryDataset(folder / row["results"]), TrajectoryDataset(folder / base["results"]))
            found.append({"a": row_name(row), "b": row_name(base), "n": result.n, **asdict(result)})
    return found


def _csv(rows: list[dict]) -> str:
    """One line per row; what a row holds as a list or mapping gets a column for each part."""
    flat = []
    for row in rows:
        low, high = row["ci95"] or (None, None)
        plain = {key: value for key, value in row.items() if not isinstance(value, dict | list)}
        plain |= {"ci95_low": low, "ci95_high": high} | {f"pass@{k}": v for k, v in row["pass_at"].items()}
        flat.append(plain | row["knobs"] | {k: v for k, v in row["extra"].items() if isinstance(v, int | float)})
    names = list(dict.fromkeys(name for row in flat for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def markdown(rows: list[dict]) -> str:
    """A table that can be pasted into a README."""

    def line(cells) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"

    shown = columns(rows)
    head = line(name for name, _, _ in shown)
    rule = line("---:" if side == "right" else "---" for _, side, _ in shown)
    return head + rule + "".join(line(text(row) for _, _, text in shown) for row in rows)
