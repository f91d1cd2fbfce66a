"""Runs with rounds of rollouts, with adapters, with evaluation on the way, and of several processes."""

import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from t3d.models import load_model
from t3d.pipeline.processes import should_be_several
from t3d.trajectories import TrajectoryDataset
from tests.e2e.program import Program, assert_same_trajectories
from tests.e2e.test_run import same, trajectories, weights

ROUNDS = {"rollout_rounds": 3, "max_steps": 6, "round_interval": 2, "reference_ema": 0.5}


def history(run: Path) -> list[dict]:
    last = max(run.glob("train/checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return json.loads((last / "trainer_state.json").read_text())["log_history"]


@pytest.fixture(scope="module")
def rounds(tmp_path_factory, forkserver, write_recipe):
    """An uninterrupted run of three rounds."""
    folder = tmp_path_factory.mktemp("rounds")
    done = Program(folder, forkserver)("run", write_recipe(folder, train=ROUNDS))
    assert done.code == 0, done.stderr
    return folder / "runs" / "recipe", done


def test_every_round_learns_from_new_rollouts_of_the_student(rounds):
    run, done = rounds
    found = [list(TrajectoryDataset(run / name)) for name in ("rollout", "rollout-1", "rollout-2")]
    assert [len(part) for part in found] == [40] * 3
    for before, after in pairwise(found):
        assert {t.prompt_id for t in before} == {t.prompt_id for t in after}
        assert [t.seed for t in before] != [t.seed for t in after]
        assert [t.response_ids for t in before] != [t.response_ids for t in after]
    models = [load_model(run / name, device="cpu")[0] for name in ("train/round-1", "train/round-2", "student")]
    for one, other in pairwise(models):
        assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert done.stderr.count("trajectories,") == 3
    assert [entry["step"] for entry in history(run) if "loss" in entry] == list(range(1, 7))


def test_rounds_survive_a_kill_at_any_moment(t3d, write_recipe, rounds):
    recipe = write_recipe(t3d.folder, train=ROUNDS)
    run = t3d.folder / "runs" / "recipe"
    for moment in ("train/checkpoint-2", "rollout-1/shard-*", "train/checkpoint-4/whole", "rollout-2", "student"):
        done = t3d.stop(f"runs/recipe/{moment}", "run", recipe)
        assert done.code == -signal.SIGKILL
    done = t3d("run", recipe)
    assert done.code == 0, done.stderr
    same(run, rounds[0])
    for name in ("rollout-1", "rollout-2"):
        assert_same_trajectories(run, rounds[0], name)
    assert t3d("train", recipe, "--force").code == 0
    assert weights(run) == weights(rounds[0])


def test_an_adapter_is_merged_into_the_student_and_kept_beside_it(t3d, write_recipe, tiny):
    pytest.importorskip("peft", reason="needs t3d[lora]")
    recipe = write_recipe(t3d.folder, train={"lora_rank": 2, "max_steps": 4})
    run = t3d.folder / "runs" / "recipe"
    t3d.stop("runs/recipe/train/checkpoint-2/whole", "run", recipe)
    done = t3d("run", recipe)
    assert done.code == 0, done.stderr
    assert (run / "train" / "adapter" / "adapter_config.json").exists()
    student, _ = load_model(run / "student", device="cpu")
    teacher, _ = load_model(tiny, device="cpu")
    changed = {n for (n, a), b in zip(student.named_parameters(), teacher.parameters(), strict=True) if not a.equal(b)}
    assert changed
    assert all("proj" in name for name in changed)


def test_the_best_checkpoint_on_held_out_problems_is_the_student(t3d, write_recipe):
    train = {"eval_every": 2, "eval_problems": 5, "eval_block_steps": [2], "max_steps": 5, "learning_rate": 3e-2}
    recipe = write_recipe(t3d.folder, train=train, eval={"max_tokens": 8})
    done = t3d("train", recipe)  # the rollout is missing
    assert done.code == 2
    assert t3d("rollout", recipe).code == 0
    done = t3d("train", recipe)
    assert done.code == 0, done.stderr
    run = t3d.folder / "runs" / "recipe"
    evaluated = [entry for entry in history(run) if "eval_accuracy" in entry]
    assert [entry["step"] for entry in evaluated] == [2, 4, 5]
    assert all(0 <= entry["eval_accuracy/steps_2"] <= 1 and entry["eval_tpf/steps_2"] > 0 for entry in evaluated)
    best = max(evaluated, key=lambda entry: (entry["eval_accuracy"], -entry["step"]))["step"]
    student, _ = load_model(run / "student", device="cpu")
    kept, _ = load_model(run / "train" / f"checkpoint-{best}", device="cpu")
    for a, b in zip(student.parameters(), kept.parameters(), strict=True):
        assert torch.equal(a, b)
    assert f"the best of step {best}" in done.stderr


def test_what_is_dropped_is_said_in_one_line(t3d, write_recipe):
    recipe = write_recipe(t3d.folder, train={"max_steps": 1, "drop_truncated": True})
    assert t3d("rollout", recipe).code == 0
    cut = sum(t.finish_reason == "length" for t in trajectories(t3d.folder / "runs" / "recipe"))
    done = t3d("train", recipe)
    if cut == 40:
        assert done.code == 2
        assert "no trajectory is left to train on: 40 cut at max_tokens" in done.stderr
    else:
        assert done.code == 0, done.stderr
        assert f"train: {cut} of 40 trajectories dropped" in done.stderr


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"rollout_rounds": 9}, "train.rollout_rounds needs train.max_steps"),
        ({"rollout_rounds": 0}, "rollout_rounds must be at least 1"),
        ({"reference_ema": 0.9, "round_interval": 0}, "reference_ema needs rounds"),
        ({"lora_4bit": True}, "lora_4bit needs lora_rank"),
        ({"eval_every": 2, "eval_split": "held"}, "eval_split is 'dev'"),
    ],
)
def test_settings_that_make_no_sense(t3d, write_recipe, train, said):
    done = t3d("run", write_recipe(t3d.folder, train=train))
    assert done.code == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (t3d.folder / "runs" / "recipe").exists()


def test_no_checkpoint_is_the_best_where_nothing_is_verified(t3d, write_recipe):
    (t3d.folder / "data.jsonl").write_text('{"question": "How many?"}\n')
    task = {"name": "prompts", "path": "data.jsonl", "eval_path": "data.jsonl", "num_train": None, "num_eval": None}
    done = t3d("run", write_recipe(t3d.folder, task=task, train={"eval_every": 2}))
    assert done.code == 2
    assert "train.eval_every: task 'prompts' cannot verify answers" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (t3d.folder / "runs" / "recipe").exists()


def test_two_processes_do_a_whole_run(t3d, write_recipe, finished):
    """One writes, both train, and they lose as much as one process."""
    recipe = write_recipe(t3d.folder, train={"per_device_train_batch_size": 2})
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch += ["-m", "t3d", "run", recipe]
    done = subprocess.run(
        launch, cwd=t3d.folder, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    run = t3d.folder / "runs" / "recipe"
    assert_same_trajectories(run, finished[0])
    assert done.stderr.count("rollout: 40 trajectories") == 1
    assert done.stdout.count("report.html") == 1
    losses = [[entry["loss"] for entry in history(folder) if "loss" in entry] for folder in (run, finished[0])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert (run / "student" / "model.safetensors").exists()


def test_a_launch_that_starts_one_process_of_several_says_so(t3d, write_recipe):
    """The real launcher, in case it changes; the rollout is missing, so nothing is run."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "t3d", "train"]
    done = subprocess.run([*launch, write_recipe(t3d.folder)], cwd=t3d.folder, capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if "torchrun" in line]
    assert len(said) == 1, done.stderr
    assert said[0].startswith("accelerate launch started one process where several were asked for")
    assert "has no complete rollout" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "more", "alone"),
    [
        (("--cpu", "--num_processes", "2"), {}, True),
        (("--num_processes", "2"), {}, True),
        (("--cpu", "--num_processes", "1"), {}, False),
        (("--cpu",), {}, False),
        (("--cpu", "--num_processes", "2"), {"OMPI_COMM_WORLD_SIZE": "2"}, False),
    ],
)
def test_what_a_launch_says_of_itself(monkeypatch, arguments, more, alone):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    for name in ("MASTER_PORT", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    given, *_ = _validate_launch_command(launch_command_parser().parse_args([*arguments, "script.py"]))
    assert should_be_several(prepare_simple_launcher_cmd_env(given)[1] | more) == alone


def test_launches_of_another_kind_are_left_alone():
    assert not should_be_several({})
    torchrun = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    assert not should_be_several(torchrun)
    assert not should_be_several(torchrun | {"ACCELERATE_USE_CPU": "true"})


def test_every_round_logs_its_last_steps(t3d, write_recipe):
    """Rounds of two steps, far shorter than what is between two logs."""
    train = {"objective": "path", "rollout_rounds": 2, "max_steps": 4, "logging_steps": 100, "round_interval": 0}
    recipe = write_recipe(t3d.folder, train=train, task={"num_train": 8})
    assert t3d("rollout", recipe).code == 0
    done = t3d("train", recipe)
    assert done.code == 0, done.stderr
    logged = [entry for entry in history(t3d.folder / "runs" / "recipe") if "loss" in entry]
    assert [entry["step"] for entry in logged] == [2, 4]
    assert all(entry["tokens_per_second"] > 0 for entry in logged)
