import csv
import json

import pytest

from t3d.evaluation import EvalRow, read_summary, write_results
from t3d.evaluation.results import markdown
from t3d.trajectories import read_trajectories
from tests.example_run import example_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = example_run(tmp_path_factory.mktemp("results") / "run", count=30)
    rows = [EvalRow(**row) for row in read_summary(run / "summary.json")["rows"]]
    write_results(run / "eval", rows, task="word_problems", seed=0)
    return run


def test_results_json_compares_every_row_with_the_full_teacher(run):
    results = json.loads((run / "eval" / "results.json").read_text())
    assert (results["format"], results["version"], results["task"]) == ("t3d-results", 1, "word_problems")
    assert [c["a"] for c in results["comparisons"][:5]] == [
        "teacher, 2 steps",
        "teacher, 1 step",
        "student, 4 steps",
        "student, 2 steps",
        "student, 1 step",
    ]
    assert {c["b"] for c in results["comparisons"][:5]} == {"teacher, 4 steps"}
    alike = [(c["a"], c["b"]) for c in results["comparisons"][5:]]  # the same setting of both models
    assert alike == [(f"student, {n}", f"teacher, {n}") for n in ("2 steps", "1 step")]
    full = {t.prompt_id: t.correct for t in read_trajectories(run / "eval/teacher/steps4")}
    student = {t.prompt_id: t.correct for t in read_trajectories(run / "eval/student/steps1")}
    last = results["comparisons"][4]
    assert last["only_b"] == sum(full[k] and not student[k] for k in full)
    assert last["n"] == 30
    assert last["difference"] == pytest.approx((sum(student.values()) - sum(full.values())) / 30)


def test_results_csv_has_a_line_per_row(run):
    rows = json.loads((run / "eval" / "results.json").read_text())["rows"]
    with open(run / "eval" / "results.csv", newline="") as lines:
        table = list(csv.DictReader(lines))
    assert len(table) == len(rows) == 6
    for line, row in zip(table, rows, strict=True):
        assert line["model"] == row["model"]
        assert float(line["accuracy"]) == row["accuracy"]
        assert float(line["ci95_low"]) == row["ci95"][0]


def test_results_md_is_a_table(run):
    rows, pairs = (table.splitlines() for table in (run / "eval" / "results.md").read_text().split("\n\n"))
    assert (len(rows), len(pairs)) == (2 + 6, 2 + 7)
    for lines in (rows, pairs):
        assert {line.count("|") for line in lines} == {lines[0].count("|")}
    rows = json.loads((run / "eval" / "results.json").read_text())["rows"]
    assert "a\\|b" in markdown([rows[0] | {"model": "a|b"}])


def test_without_verdicts_there_is_nothing_to_compare(run, tmp_path):
    rows = [EvalRow(**row) for row in read_summary(run / "summary.json")["rows"]]
    unverified = [EvalRow(**vars(row) | {"accuracy": None, "ci95": None, "num_verified": 0}) for row in rows]
    assert write_results(tmp_path, unverified)["comparisons"] == []
    assert "–" in (tmp_path / "results.md").read_text()
