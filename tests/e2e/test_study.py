"""A study from beginning to end on a tiny model: one command, resumable, with a table that adds up."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import yaml

from t3d.evaluation.metrics import wilson
from t3d.study import load_study
from t3d.trajectories import TrajectoryDataset

STUDY = {
    "recipe": "recipe.yaml",
    "folder": "runs/study",
    "seeds": [0, 1],
    "set": ["train.path_lambda=1", "eval.grid=[{steps: [4, 1]}, {strategy: low_confidence_dynamic}]"],
    "against": ["t3d"],
    "variants": {
        "t3d": [],
        "mean-field": ["train.objective=mean_field", "train.max_steps=4", "train.round_interval=0"],
        "path": {"set": ["train.objective=path"], "seeds": [1]},
    },
    "results": "results.md",
}


def write_study(folder, write_recipe, **changes) -> str:
    write_recipe(folder)
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY | changes, sort_keys=False))
    (folder / "results.md").write_text("before\n<!-- study: begin -->\nold\n<!-- study: end -->\nafter\n")
    return "study.yaml"


@pytest.fixture(scope="module")
def studied(tmp_path_factory, forkserver, write_recipe):
    """A folder with a complete study; not to be written to."""
    from tests.e2e.program import Program

    folder = tmp_path_factory.mktemp("study")
    done = Program(folder, forkserver)("study", write_study(folder, write_recipe))
    assert done.code == 0, done.stderr
    return folder


def results(folder) -> dict:
    return json.loads((folder / "runs/study/results.json").read_text())


def test_every_variant_is_a_run_and_all_share_a_rollout_of_their_seed(studied):
    runs = studied / "runs" / "study"
    names = {path.name for path in runs.iterdir() if path.is_dir()}
    assert names == {"rollouts", "t3d-seed0", "t3d-seed1", "mean-field-seed0", "mean-field-seed1", "path-seed1"}
    assert len(list((runs / "rollouts").iterdir())) == 2
    teachers = [(run.name, (run / "eval" / "teacher").is_dir()) for run in sorted(runs.glob("*-seed*"))]
    assert [name for name, there in teachers if there] == ["t3d-seed0", "t3d-seed1"]


def test_rollouts_of_a_version_that_knew_fewer_settings_are_found(tmp_path, studied, monkeypatch):
    shutil.copytree(studied, tmp_path / "older")
    monkeypatch.chdir(tmp_path / "older")
    rollouts = Path("runs/study/rollouts")
    for folder in list(rollouts.iterdir()):
        path = folder / "rollout" / "stage.json"
        record = json.loads(path.read_text())
        del record["settings"]["rollout.schedule"]
        path.write_text(json.dumps(record))
        folder.rename(rollouts / f"{folder.name.partition('-')[0]}-older")
    found = {(job.seed, Path(job.rollout.run_dir).name) for job in load_study("study.yaml").jobs}
    assert found == {(0, "seed0-older"), (1, "seed1-older")}
    others = load_study("study.yaml", ["rollout.temperature=.5"]).jobs
    assert not any(Path(job.rollout.run_dir).exists() for job in others)


def test_the_cost_counts_every_forward(studied):
    costs = results(studied)["costs"]
    assert {name: cost[0]["steps"] for name, cost in costs.items()} == {"t3d": 8, "mean-field": 4, "path": 8}
    per_step = {name: cost[-1]["flops"] / cost[-1]["steps"] for name, cost in costs.items()}  # of seed 1
    assert per_step["t3d"] == pytest.approx(per_step["path"] * 4 / 3)  # the same states; a reference forward more
    assert per_step["mean-field"] > per_step["t3d"]  # that forward has a copy for every masked position


def test_the_table_pools_the_verdicts_of_all_seeds(studied):
    found = results(studied)["rows"]
    assert {row["variant"] for row in found} == {"teacher", "t3d", "mean-field", "path"}
    assert {row["setting"] for row in found} == {"4 steps", "1 step", "dynamic 0.9"}
    for row in found:
        runs = [f"{row['variant']}-seed{seed}" for seed in row["seeds"]]
        name = {"4 steps": "static-s4", "1 step": "static-s1"}.get(row["setting"])
        if row["variant"] == "teacher" or name is None:
            continue
        verdicts = []
        for run in runs:
            rows = json.loads((studied / "runs/study" / run / "summary.json").read_text())["rows"]
            [mine] = [r for r in rows if r["model"] == "student" and r["steps"] == int(name[-1]) and not r["knobs"]]
            verdicts += TrajectoryDataset(studied / "runs/study" / run / "eval" / mine["results"]).column("correct")
        assert row["n"] == len(verdicts) == 6 * len(runs)
        assert row["accuracy"] == pytest.approx(sum(verdicts) / len(verdicts))
        assert row["ci95"] == pytest.approx(list(wilson(sum(verdicts), len(verdicts))))
    pairs = {(c["variant"], c["setting"]): c for c in results(studied)["comparisons"]}
    assert pairs["path", "1 step"]["seeds"] == [1]
    assert pairs["mean-field", "1 step"]["n"] == 12


def test_several_teachers_are_told_apart(t3d, write_recipe):
    """Of a second one the row was left out, as if its students were the first one's."""
    changes = {
        "seeds": [0],
        "set": ["train.objective=mean_field", "train.max_steps=1", "eval.grid=[{steps: [4]}]"],
        "against": [],
        "variants": {
            "first": [],
            "more": ["task.num_train=4"],  # the same teacher, on other problems to learn from
            "second": ["model.path=runs/study/first-seed0/student"],
            "other": ["task.data_seed=7"],
        },
    }
    done = t3d("study", write_study(t3d.folder, write_recipe, **changes))
    assert done.code == 0, done.stderr
    names = [row["variant"] for row in results(t3d.folder)["rows"]]
    teachers = ["teacher of first", "teacher of second", "teacher of other"]
    assert names == [teachers[0], "first", "more", teachers[1], "second", teachers[2], "other"]
    text = (t3d.folder / "results.md").read_text()
    assert all(f"\n| {name} | " in text for name in teachers)
    by_name = {row["variant"]: row for row in results(t3d.folder)["rows"]}
    assert by_name["teacher of second"]["by_seed"] == by_name["first"]["by_seed"]


def test_the_document_gets_the_table_between_its_marks(studied):
    text = (studied / "results.md").read_text()
    assert text.startswith("before\n<!-- study: begin -->")
    assert text.endswith("<!-- study: end -->\nafter\n")
    assert "old" not in text
    assert "| `mean-field` |" in text
    assert (studied / "results-study-no-labels.svg").is_file()


def test_a_killed_study_continues_and_a_finished_one_does_nothing(t3d, write_recipe, studied):
    study = write_study(t3d.folder, write_recipe)
    shutil.copytree(studied / "runs", t3d.folder / "runs")
    runs = t3d.folder / "runs" / "study"
    assert t3d("study", study, "--plan").stdout.count("complete") == 5
    assert "study: run" not in t3d("study", study).stderr
    shutil.rmtree(runs / "path-seed1")
    assert t3d("study", study, "--results").code == 0
    assert "Not run yet: `path` (seed 1)." in (t3d.folder / "results.md").read_text()
    assert t3d("study", study, "--plan").stdout.count("to do") == 1
    killed = t3d.stop("runs/study/path-seed1/train/checkpoint-*", "study", study)
    assert killed.code == -signal.SIGKILL
    done = t3d("study", study)
    assert done.code == 0, done.stderr
    assert "run 5 of 5, path, seed 1, is complete" in done.stderr
    assert results(t3d.folder)["rows"] == results(studied)["rows"]


def test_results_of_nothing_are_refused(t3d, write_recipe):
    done = t3d("study", write_study(t3d.folder, write_recipe), "--results")
    assert done.code == 2
    assert "no run is complete yet" in done.stderr
    assert not (t3d.folder / "runs").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("eval.grid=[{steps: 5}]", "steps = 5 is more than block_size = 4"),
        ("train.report_to=nowhere", "train.report_to: nowhere is not installed"),
    ],
)
def test_what_cannot_work_is_refused_before_any_rollout(t3d, write_recipe, change, said):
    done = t3d("study", write_study(t3d.folder, write_recipe), change)
    assert done.code == 2
    assert said in done.stderr
    assert "5 of 5 runs failed" in done.stderr.splitlines()[-1]
    assert not (t3d.folder / "runs").exists()


def test_two_processes_share_a_study(t3d, write_recipe, studied):
    study = write_study(t3d.folder, write_recipe)
    first = t3d.start("study", study)
    second = t3d("study", study)
    assert second.code == 0, second.stderr
    assert t3d.finish(first).code == 0
    assert "is complete" in second.stderr  # it did a share of them
    assert results(t3d.folder)["rows"] == results(studied)["rows"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"against": [], "variants": {"a": ["train.objectiv=t3d"]}},
            "variant 'a': override 'train.objectiv=t3d': unknown key",
        ),
        ({"variants": {"a": {"sets": []}}}, "variants.a.sets"),
        ({"variants": {"../a": []}}, "cannot be a variant's name"),
        ({"variants": {"a": {"seeds": ["one"]}}}, "variants.a.seeds.0"),
        ({"against": [], "variants": {"a": {"seeds": []}}}, "nothing to run"),
        ({"variants": None}, "a study needs `variants`"),
        ({"against": ["t3f"]}, "no variant 't3f' (did you mean 't3d'?)"),
        ({"recipes": "x"}, "unknown key 'recipes' (did you mean 'recipe'?)"),
        ({"recipe": "missing.yaml"}, "cannot read the recipe"),
        ({"set": ["train.mf_copies=-1"]}, "mf_copies must not be negative"),
    ],
)
def test_mistakes_are_one_line_before_anything_runs(t3d, write_recipe, changes, message):
    done = t3d("study", write_study(t3d.folder, write_recipe, **changes))
    assert done.code == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (t3d.folder / "runs").exists()


def test_a_study_of_decoding_trains_nothing(t3d, write_recipe):
    """Each variant's model at every setting, a line per setting; look-ahead has the ordinary accuracy."""
    grid = "eval.grid=[{steps: 2}, {steps: 2, flight: look_ahead}, {blocks_in_flight: 2}]"
    variants = {"a": [], "b": [], "few-bits": ["model.quantize=int8"]}
    study = write_study(t3d.folder, write_recipe, train=False, against=[], set=[grid], variants=variants)
    done = t3d("study", study)
    assert done.code == 0, done.stderr
    assert not list((t3d.folder / "runs/study").glob("*/student"))
    text = (t3d.folder / "results.md").read_text()
    for name in variants:
        assert f"### `{name}`" in text
        assert (t3d.folder / f"results-study-{name}.svg").exists()
    tables, _, ahead = text.partition("### Exact look-ahead")
    assert ahead.count("| 12 of 12 |") >= 2  # six problems for each of two seeds; few bits may round differently
    lines = [line.split(" | ") for line in tables.splitlines() if line.startswith("| ") and "steps" in line]
    rows = {(number // 3, cells[0].strip("| ")): cells for number, cells in enumerate(lines)}
    assert {setting for _, setting in rows} == {"2 steps", "2 steps, look-ahead 1", "4 steps, 2 blocks"}
    for model in (0, 1):
        plain, ahead = rows[model, "2 steps"], rows[model, "2 steps, look-ahead 1"]
        assert plain[1] == ahead[1]
        assert float(plain[2]) <= float(ahead[2])
    assert "is complete" not in t3d("study", study).stderr
