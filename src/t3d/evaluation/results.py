"""The rows of an evaluation as results.json, results.csv and results.md (docs/evaluation.md gives the schema)."""

import csv
import io
import json
from collections.abc import Iterable
from dataclasses import asdict
from itertools import combinations
from pathlib import Path

from t3d.disk import write_whole
from t3d.evaluation.compare import compare, reference_row
from t3d.evaluation.rows import EvalRow, columns, row_name
from t3d.evaluation.summary import aup_by_model
from t3d.trajectories import TrajectoryDataset

FORMAT, VERSION = "t3d-results", 1


def write_results(folder: Path | str, rows: list[EvalRow], **about) -> dict:
    """Write results.json, results.csv and results.md to `folder`, where `evaluate` put the answers; return the first.

    Problem by problem, every row is compared with the teacher at the most steps (else with the best row), and with the
    rows of other models at the same setting.
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
    write_whole(folder / "results.md", markdown(values) + _paired(results["comparisons"]))
    return results


def _comparisons(folder: Path, rows: list[dict]) -> list[dict]:
    verified = [row for row in rows if row["num_verified"] and row["results"]]
    base = reference_row(verified)
    pairs = [(row, base) for row in verified if row is not base]
    for b, a in combinations(verified, 2):
        alike = row_name(a | {"model": ""}) == row_name(b | {"model": ""})
        if alike and a["model"] != b["model"] and base is not b:
            pairs.append((a, b))
    found = []
    for a, b in pairs:
        result = compare(*(TrajectoryDataset(folder / row["results"]) for row in (a, b)))
        found.append({"a": row_name(a), "b": row_name(b), "n": result.n, **asdict(result)})
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
    shown = columns(rows)
    head = [(name, side) for name, side, _ in shown]
    return _table(head, ([text(row) for _, _, text in shown] for row in rows))


def _paired(comparisons: list[dict]) -> str:
    """Another one, of the comparisons; empty if there are none."""
    if not comparisons:
        return ""
    head = [("a", "left"), ("b", "left"), ("n", "right"), ("only a", "right"), ("only b", "right")]
    head += [("a − b %", "right"), ("95%", "left"), ("p", "right")]
    lines = (
        [
            c["a"], c["b"], str(c["n"]), str(c["only_a"]), str(c["only_b"]), f"{100 * c['difference']:+.1f}",
            f"{100 * c['ci95'][0]:+.1f} to {100 * c['ci95'][1]:+.1f}", f"{c['p_value']:.2g}",
        ]
        for c in comparisons
    )  # fmt: skip
    return "\n" + _table(head, lines)


def _table(head: list[tuple[str, str]], lines: Iterable[list[str]]) -> str:
    def line(cells) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"

    rule = line("---:" if side == "right" else "---" for _, side in head)
    return line(name for name, _ in head) + rule + "".join(map(line, lines))
