"""`t3d eval`: any checkpoint, a grid that grows, and what it leaves."""

import csv
import json
import os
import shutil

import pytest
import torch

from t3d.models import load_model
from t3d.trajectories import TrajectoryDataset


def rows(folder) -> list[dict]:
    return json.loads((folder / "runs" / "recipe" / "summary.json").read_text())["rows"]


def facts(row: dict) -> dict:
    return {key: value for key, value in row.items() if key not in ("tps", "wall_seconds")}


def shards(folder) -> dict:
    return {path: os.stat(path).st_mtime_ns for path in (folder / "runs" / "recipe" / "eval").rglob("*.parquet")}


def test_a_checkpoint_alone_then_more_settings_then_a_student(t3d, write_recipe, finished):
    """Nothing that was answered is answered again, and what the results had they still have."""
    recipe = write_recipe(t3d.folder)
    first = t3d("eval", recipe)
    assert first.code == 0, first.stderr
    assert "has no student" in first.stderr
    alone, kept = rows(t3d.folder), shards(t3d.folder)
    assert [(row["model"], row["steps"]) for row in alone] == [("teacher", 4), ("teacher", 1)]
    assert t3d("report", recipe).code == 0

    assert "complete, skipped" in t3d("eval", recipe).stderr
    more = t3d("eval", recipe, "eval.grid=[{strategy: low_confidence_dynamic, threshold: [.1, .9]}]")
    assert more.code == 0, more.stderr
    assert more.stderr.count("eval: teacher, dynamic") == 2
    grown = rows(t3d.folder)
    assert grown[:2] == alone
    assert [row["knobs"] for row in grown[2:]] == [{"threshold": t, "floor": "one"} for t in (0.1, 0.9)]
    assert shards(t3d.folder).items() > kept.items()

    kept = shards(t3d.folder)
    assert t3d("run", recipe).code == 0
    whole = rows(t3d.folder)
    assert whole[:4] == grown
    assert [(row["model"], row["steps"]) for row in whole[4:]] == [("student", 4), ("student", 1)]
    expected = json.loads((finished[0] / "summary.json").read_text())["rows"]
    assert [facts(row) for row in whole if not row["knobs"]] == [facts(row) for row in expected]
    assert shards(t3d.folder).items() > kept.items()

    fewer = t3d("eval", recipe, "task.num_eval=3", "eval.grid=[{steps: 4}]")
    assert fewer.code == 0, fewer.stderr
    assert fewer.stderr.count("no longer among the results") == 4  # said, not silent
    assert {row["num_problems"] for row in rows(t3d.folder)} == {3}
    assert t3d("eval", recipe).code == 0
    assert [facts(row) for row in rows(t3d.folder)] == [facts(row) for row in expected]


def test_weights_of_few_bits_are_models_of_their_own(t3d, write_recipe, finished):
    run = t3d.folder / "runs" / "recipe"
    shutil.copytree(finished[0], run)
    write_recipe(t3d.folder)
    whole = rows(t3d.folder)
    done = t3d("eval", "recipe.yaml", "model.quantize=int8")
    assert done.code == 0, done.stderr
    grown = rows(t3d.folder)
    models = {row["model"] for row in grown}
    assert models == {"teacher", "student", "teacher-int8", "student-int8"}
    assert [row for row in grown if not row["model"].endswith("-int8")] == whole
    assert t3d("eval", "recipe.yaml", "model.quantize=int3").code == 2

    said = t3d("rollout", "recipe.yaml", "model.quantize=int4", "run_dir=runs/few")
    assert (said.code, said.stderr.count("\n")) == (2, 1)
    assert "rollout.quantized=true" in said.stderr
    assert not (t3d.folder / "runs" / "few").exists()
    few = ["model.quantize=int4", "rollout.quantized=true", "run_dir=runs/few", "train.max_steps=1"]
    done = t3d("run", "recipe.yaml", *few)
    assert done.code == 0, done.stderr
    student, _ = load_model(t3d.folder / "runs/few/student")  # it was trained with all bits
    assert type(student.lm_head) is torch.nn.Linear

    answer = t3d("generate", str(run / "student"), "How many?", "--quantize", "int4", "--max-tokens", "8")
    assert answer.code == 0, answer.stderr


def test_samples_seeds_and_checkpoints(t3d, write_recipe, tiny, finished):
    recipe = write_recipe(t3d.folder)
    shutil.copytree(finished[0] / "student", t3d.folder / "a" / "student")
    shutil.copytree(finished[0] / "student", t3d.folder / "b" / "student")
    grid = ["eval.temperature=[1.0]", "eval.grid=[{steps: 2}]", "eval.samples=2", "eval.seeds=[0,1]"]
    done = t3d("eval", recipe, *grid, "eval.checkpoints=[a/student,b/student/]")
    assert done.code == 0, done.stderr
    found = rows(t3d.folder)
    names = ["teacher", "a-student", "b-student"]
    assert [(row["model"], row["seed"], row["samples"]) for row in found] == [(n, s, 2) for n in names for s in (0, 1)]
    assert all(set(row["pass_at"]) == {"1", "2"} and row["majority"] is not None for row in found)
    assert [facts(row) | {"model": ""} for row in found[2:4]] != [facts(row) | {"model": ""} for row in found[:2]]
    same = [
        [{k: v for k, v in facts(r).items() if k not in ("model", "results")} for r in found[i : i + 2]] for i in (2, 4)
    ]
    assert same[0] == same[1]  # the same weights

    folder = t3d.folder / "runs" / "recipe" / "eval"
    results = json.loads((folder / "results.json").read_text())
    assert (results["format"], results["version"]) == ("t3d-results", 1)
    assert results["rows"] == found
    pairs = [(c["a"].split(",")[0], c["b"].split(",")[0], c["n"]) for c in results["comparisons"]]
    assert pairs.count(("b-student", "a-student", 12)) == 2  # each seed
    assert {c["b"] for c in results["comparisons"][:5]} == {"teacher, 2 steps, T=1, seed 0"}
    with open(folder / "results.csv", newline="") as lines:
        assert [line["model"] for line in csv.DictReader(lines)] == [row["model"] for row in found]
    assert (folder / "results.md").read_text().split("\n\n")[0].count("\n") == 1 + len(found)
    for row in found:
        answers = list(TrajectoryDataset(folder / row["results"]))
        assert len(answers) == 12
        for t in answers:
            assert {"extracted", "reason"} <= t.extra.keys()
            assert t.question
            assert t.prompt_ids
            assert t.step_map
            assert isinstance(t.correct, bool)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("eval.checkpoints=[nowhere]", "no such checkpoint folder: nowhere"),
        ("eval.checkpoints=[papers]", "papers is not a checkpoint folder: it has no config.json"),
        ("eval.checkpoints=[broken]", "cannot load the weights of broken"),
        ("eval.scorer=./nowhere", "cannot load the scorer ./nowhere"),
        ("eval.max_tokens=16", "eval.max_tokens"),
        ("task.template='Now: {question}'", "task.template"),
        ("task.name=prompts", "task.name"),
        ("eval.grid=[{steps: 5}]", "steps = 5 is more than block_size"),
    ],
)
def test_what_is_there_is_never_overwritten(t3d, write_recipe, tiny, evaluated, change, said):
    recipe = write_recipe(t3d.folder)
    shutil.copytree(evaluated, t3d.folder / "runs")
    (t3d.folder / "papers").mkdir()
    shutil.copytree(tiny, t3d.folder / "broken")
    (t3d.folder / "broken" / "model.safetensors").write_bytes(b"half")
    run = t3d.folder / "runs" / "recipe"
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != "log.txt"}
    done = t3d("eval", recipe, change, "eval.text=true") if "scorer" in change else t3d("eval", recipe, change)
    assert (done.code, done.stdout) == (2, ""), done
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert said in done.stderr
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != "log.txt"}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, forkserver, write_recipe):
    from tests.e2e.program import Program

    program = Program(tmp_path_factory.mktemp("evaluated"), forkserver)
    assert program("eval", write_recipe(program.folder)).code == 0
    return program.folder / "runs"


def test_free_text_is_scored(t3d, write_recipe):
    """Paragraphs of a plain text file; BLEU and the like, and perplexity under the embedded teacher."""
    pytest.importorskip("sacrebleu", reason="needs t3d[text]")
    words = "Mia had 4 apples and then Tom gave away 3 books"
    (t3d.folder / "plain.txt").write_text("\n\n".join(f"{words} {i} " * 8 for i in range(3)))
    task = {"name": "continuation", "path": "plain.txt", "num_eval": None}
    recipe = write_recipe(t3d.folder, task=task, eval={"text": True, "scorer": "embedded", "max_tokens": 16})
    done = t3d("eval", recipe)
    assert done.code == 0, done.stderr
    assert "rouge l" in done.stdout
    for row in rows(t3d.folder):
        assert row["accuracy"] is None
        assert row["num_problems"] == 3
        assert row["extra"]["perplexity"] > 1
        assert {"bleu", "rouge_l", "distinct_1", "distinct_2", "reference_perplexity"} <= row["extra"].keys()
    assert rows(t3d.folder)[0]["extra"]["teacher_same"] == 1


def test_results_of_another_origin_are_refused(t3d, write_recipe, evaluated):
    """A folder whose record is gone, and another model behind the same path."""
    recipe = write_recipe(t3d.folder)
    shutil.copytree(evaluated, t3d.folder / "runs")
    run = t3d.folder / "runs" / "recipe"
    (run / "eval" / "stage.json").unlink()
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != "log.txt"}
    done = t3d("eval", recipe, "seed=4")
    assert done.code == 2
    assert "stage.json" in done.stderr
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != "log.txt"}
    assert t3d("eval", recipe, "--force").code == 0
