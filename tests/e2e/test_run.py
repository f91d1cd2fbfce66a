"""A run from beginning to end, its stages alone, and runs that were stopped."""

import json
import shutil
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from t3d.models import load_model
from t3d.trajectories import TrajectoryDataset
from t3d.trajectories.schema import shards
from tests.e2e.program import assert_same_trajectories


def trajectories(run: Path) -> list:
    return list(TrajectoryDataset(run / "rollout"))


def weights(run: Path) -> bytes:
    return (run / "student" / "model.safetensors").read_bytes()


def rows(run: Path) -> list[dict]:
    """The rows of a summary without what a clock gave."""
    found = json.loads((run / "summary.json").read_text())["rows"]
    return [{k: v for k, v in row.items() if k not in ("tps", "wall_seconds")} for row in found]


def same(run: Path, other: Path) -> None:
    assert_same_trajectories(run, other)
    assert weights(run) == weights(other)
    assert rows(run) == rows(other)


def test_a_run_leaves_everything(finished, tiny):
    run, done = finished
    for name in ("recipe.yaml", "versions.json", "log.txt", "summary.json", "report.html", "student/config.json"):
        assert (run / name).is_file(), name
    assert "student" in done.stdout
    assert "report.html" in done.stdout
    assert "\r" not in done.stderr  # no progress bars where nobody looks
    assert yaml.safe_load((run / "recipe.yaml").read_text())["train"]["objective"] == "t3d"
    versions = json.loads((run / "versions.json").read_text())
    assert {"t3d", "torch", "transformers", "python", "platform", "commit"} <= versions.keys()
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["task"], summary["num_problems"], summary["seed"]) == ("word_problems", 6, 3)
    assert [(row["model"], row["steps"]) for row in summary["rows"]] == [
        (model, steps) for model in ("teacher", "student") for steps in (4, 1)
    ]
    seconds = summary["wall_seconds"]
    assert min(seconds.values()) > 0
    assert seconds["total"] == pytest.approx(seconds["rollout"] + seconds["train"] + seconds["eval"], abs=0.01)
    found = trajectories(run)
    assert len(found) == 40
    assert len({t.seed for t in found}) == 40
    assert all(t.correct is not None and t.question for t in found)
    student, tokenizer = load_model(run / "student", device="cpu")
    assert tokenizer is not None
    teacher, _ = load_model(tiny, device="cpu")
    changed = [not a.equal(b) for a, b in zip(student.parameters(), teacher.parameters(), strict=True)]
    assert all(changed)


def test_a_complete_run_is_skipped_and_single_stages_know_what_they_need(t3d, write_recipe, finished):
    recipe = write_recipe(t3d.folder)
    run = t3d.folder / "runs" / "recipe"
    for stage, missing in (("train", "rollout"), ("report", "eval")):
        done = t3d(stage, recipe)
        assert done.code == 2
        assert f"run `t3d {missing}`" in done.stderr
        assert not run.exists()
    for stage in ("rollout", "train", "eval", "report"):
        done = t3d(stage, recipe)
        assert done.code == 0, done.stderr
    same(run, finished[0])
    times = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.suffix in (".parquet", ".safetensors")}
    done = t3d("run", recipe)
    assert done.code == 0
    assert done.stderr.count("complete, skipped") == 3
    assert times == {path: path.stat().st_mtime_ns for path in times}


@pytest.mark.parametrize("stopped_by", [signal.SIGKILL, signal.SIGINT])
def test_killed_in_every_stage_it_ends_as_if_it_had_not_been(t3d, write_recipe, finished, stopped_by):
    recipe = write_recipe(t3d.folder)
    run = t3d.folder / "runs" / "recipe"
    moments = {
        "rollout": "rollout/shard-*.parquet",
        "train": "train/checkpoint-4/whole",
        "eval": "eval/teacher/*/shard-*.parquet",
    }
    for stage, moment in moments.items():
        done = t3d.stop(f"runs/recipe/{moment}", "run", recipe, by=stopped_by)
        assert done.code == (-signal.SIGKILL if stopped_by == signal.SIGKILL else 130)
        assert not json.loads((run / stage / "stage.json").read_text())["complete"]
        if stopped_by == signal.SIGINT:
            assert done.stderr.strip().endswith("the same command continues")
            assert "Traceback" not in done.stderr
    done = t3d("run", recipe)
    assert done.code == 0, done.stderr
    assert "rollout: complete, skipped" in done.stderr
    same(run, finished[0])


def test_a_checkpoint_that_was_half_written_is_not_continued_from(t3d, write_recipe, finished):
    recipe = write_recipe(t3d.folder)
    run = t3d.folder / "runs" / "recipe"
    t3d.stop("runs/recipe/train/checkpoint-4/whole", "run", recipe)
    last = max(run.glob("train/checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for name in ("whole", "trainer_state.json"):
        (last / name).unlink(missing_ok=True)
    (last / "model.safetensors").write_bytes(b"half")
    assert t3d("run", recipe).code == 0
    same(run, finished[0])


def test_trajectories_do_not_depend_on_how_they_were_batched(t3d, write_recipe, finished):
    recipe = write_recipe(t3d.folder)
    assert t3d("rollout", recipe, "rollout.save_every=40", "engine.max_batch_size=3").code == 0
    assert_same_trajectories(t3d.folder / "runs" / "recipe", finished[0])


def test_a_changed_recipe_is_refused_until_forced(t3d, write_recipe, finished):
    recipe = write_recipe(t3d.folder)
    run = t3d.folder / "runs" / "recipe"
    shutil.copytree(finished[0], run)
    for change, stage in {
        "rollout.temperature=0.5": "rollout",
        "train.beta=0.3": "train",
        "eval.max_tokens=16": "eval",
    }.items():
        done = t3d("run", recipe, change)
        assert done.code == 2
        assert change.split("=")[0] in done.stderr
        assert f"the {stage} stage" in done.stderr
        assert "--force" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    same(run, finished[0])
    before = trajectories(run)
    neutral = ("train.logging_steps=2", "train.tad_near=2", "engine.max_batch_size=5", "report.title=Other")
    assert "train: complete, skipped" in t3d("run", recipe, *neutral).stderr
    done = t3d("train", recipe, "train.learning_rate=2e-3", "--force")
    assert done.code == 0, done.stderr
    assert not (run / "summary.json").exists()  # of another student
    assert not (run / "eval").exists()
    assert trajectories(run) == before
    assert weights(run) != weights(finished[0])
    assert t3d("run", recipe, "train.learning_rate=2e-3").code == 0
    assert (run / "summary.json").exists()
    assert not list(run.glob(".removed-*"))


def test_a_rollout_that_a_version_with_fewer_settings_began_continues(t3d, write_recipe, finished):
    recipe = write_recipe(t3d.folder)
    run = t3d.folder / "runs" / "recipe"
    shutil.copytree(finished[0], run)
    first, *others = shards(run / "rollout")
    for other in [*others, run / "rollout" / "stage.json"]:  # as if killed
        other.unlink()
    table = pq.read_table(first)
    metadata = json.loads(table.schema.metadata[b"t3d"])
    for later in ("rollout.recheck", "rollout.window"):
        del metadata["recipe"][later]
    packed = table.schema.metadata | {b"t3d": json.dumps(metadata).encode()}
    pq.write_table(table.slice(0, table.num_rows - 1).replace_schema_metadata(packed), first)
    done = t3d("rollout", recipe)
    assert done.code == 0, done.stderr
    assert_same_trajectories(run, finished[0])
    done = t3d("rollout", recipe, "rollout.window=2")
    assert done.code == 2
    assert "rollout.window" in done.stderr


def test_a_reference_that_sees_the_answer(t3d, write_recipe, finished):
    """A run of a version that knew no such setting, whose reference did not, continues, and is another one."""
    train = {"objective": "tad", "max_steps": 2, "round_interval": 0}
    recipe = write_recipe(t3d.folder, rollout={"source": str(finished[0] / "rollout")}, train=train)
    for sees in ("prompt", "answer"):
        done = t3d("rollout", recipe, f"run_dir={sees}")
        assert done.code == 0, done.stderr
        done = t3d("train", recipe, f"run_dir={sees}", f"train.reference_sees={sees}")
        assert done.code == 0, done.stderr
    assert weights(t3d.folder / "prompt") != weights(t3d.folder / "answer")
    path = t3d.folder / "prompt" / "train" / "stage.json"
    record = json.loads(path.read_text())
    assert record["settings"].pop("train.reference_sees") == "prompt"
    path.write_text(json.dumps(record))
    done = t3d("train", recipe, "run_dir=prompt", "train.reference_sees=answer")
    assert done.code == 2
    assert "train.reference_sees = 'prompt', not 'answer'" in done.stderr
    assert t3d("train", recipe, "run_dir=prompt").code == 0


def test_time_adds_up_over_attempts(t3d, write_recipe):
    recipe = write_recipe(t3d.folder)
    run = t3d.folder / "runs" / "recipe"
    t3d.stop("runs/recipe/rollout/shard-*.parquet", "rollout", recipe)
    record = run / "rollout" / "stage.json"
    content = json.loads(record.read_text())
    record.write_text(json.dumps(content | {"seconds": 1000.0}))
    assert t3d("rollout", recipe).code == 0
    assert 1000 < json.loads(record.read_text())["seconds"] < 1100


def test_two_at_once_in_one_folder(t3d, write_recipe):
    recipe = write_recipe(t3d.folder)
    begun = "runs/recipe/rollout"
    first = t3d.start("rollout", recipe, moment=begun)
    t3d.until(begun, first)
    second = t3d("rollout", recipe)
    assert second.code == 2
    assert "in use by another run" in second.stderr
    assert t3d.finish(first).code == 0


def test_several_samples_of_every_prompt(t3d, write_recipe):
    recipe = write_recipe(t3d.folder, task={"num_train": 3}, rollout={"n": 3, "temperature": 1.0})
    assert t3d("rollout", recipe).code == 0
    found = trajectories(t3d.folder / "runs" / "recipe")
    assert [(t.prompt_id, t.sample) for t in found] == [(t.prompt_id, i % 3) for i, t in enumerate(found)]
    assert len({tuple(t.response_ids) for t in found}) == 9


def test_only_prompts_without_a_correct_answer_are_asked_again(t3d, write_recipe):
    recipe = write_recipe(
        t3d.folder,
        model={"path": None},
        task={"num_train": 24},
        rollout={"n": 2, "steps": 1, "temperature": 0.5, "retries": 3, "max_tokens": 96},
    )
    done = t3d("rollout", recipe)
    assert done.code == 0, done.stderr
    of = {}
    for t in trajectories(t3d.folder / "runs" / "recipe"):
        of.setdefault(t.prompt_id, []).append(t)
    again = {prompt_id for prompt_id, found in of.items() if not any(t.correct for t in found[:2])}
    assert 0 < len(again) < 24 == len(of)
    assert f"{len(again)} prompts without a correct answer are asked again" in done.stderr
    for prompt_id, found in of.items():
        assert [t.sample for t in found] == list(range(5 if prompt_id in again else 2))
        assert len({t.seed for t in found}) == len(found)


def test_retries_continue_after_a_kill(t3d, write_recipe):
    recipe = write_recipe(t3d.folder, rollout={"retries": 2})
    assert t3d("rollout", recipe, "run_dir=whole").code == 0
    found = trajectories(t3d.folder / "whole")
    assert len(found) == 3 * 40  # nothing that random weights say is correct
    assert len({tuple(t.response_ids) for t in found}) > 40
    t3d.stop("runs/recipe/rollout/shard-00007.parquet", "rollout", recipe)
    assert t3d("rollout", recipe).code == 0
    assert_same_trajectories(t3d.folder / "runs" / "recipe", t3d.folder / "whole")


def test_a_teacher_from_random_weights_and_ground_truth(t3d, write_recipe):
    architecture = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 32,
        "max_position_embeddings": 256,
        "block_size": 4,
    }
    recipe = write_recipe(
        t3d.folder, model={"path": None, "architecture": architecture}, train={"objective": "sft", "max_steps": 2}
    )
    done = t3d("run", recipe)
    assert done.code == 0, done.stderr
    run = t3d.folder / "runs" / "recipe"
    assert not (run / "rollout").exists()
    assert {row["model"] for row in rows(run)} == {"student"}
    assert t3d("generate", "runs/recipe/student", "How many?", "--max-tokens", "8").code == 0
    done = t3d("rollout", recipe)
    assert done.code == 2
    assert "no rollout" in done.stderr
