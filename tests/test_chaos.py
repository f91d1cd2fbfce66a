"""benchmarks/chaos.py: a command that it disturbs ends as if it had not been, and what differs does not go unseen."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from t3d.errors import T3DError
from t3d.pipeline.folder import RunFolder, writing
from t3d.trajectories import TrajectoryWriter
from tests.trajectory_examples import make_trajectory

FOLDER = Path(__file__).parents[1] / "benchmarks"
spec = importlib.util.spec_from_file_location("chaos", FOLDER / "chaos.py")
chaos = importlib.util.module_from_spec(spec)
sys.modules["chaos"] = chaos  # its dataclasses look themselves up
spec.loader.exec_module(chaos)

# Commands instead of t3d's, and what is said of them.
COMMANDS = {
    "Path('x/student').mkdir(parents=True, exist_ok=True)\n"
    "Path('x/student/model.safetensors').write_bytes(os.urandom(8))": (
        "1 of 1 results differ: student/model.safetensors"
    ),
    "assert Path.cwd().name != 'disturbed', 'half a file'": "AssertionError: half a file",
    "sys.exit(print('error: cannot go on', file=sys.stderr) or 2 * (Path.cwd().name == 'disturbed'))": (
        "exit code 2 after no disturbance:\nerror: cannot go on"
    ),
}


def python(*arguments) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=FOLDER, capture_output=True, text=True)


@pytest.mark.skipif(sys.platform != "linux", reason="kills and permissions as Linux has them")
def test_killed_while_it_saves_it_leaves_the_same_student(tmp_path):
    """The seed's first disturbance is a kill when some files are there: no clock decides whether it happens."""
    small = ("task.num_train=16", "task.num_eval=4", "train.per_device_train_batch_size=2")
    options = ("--stages", "save", "--minutes", 0, "--disturb", 2, "--seed", 293, "--json", tmp_path / "found.json")
    done = python("chaos.py", *options, "--set", *small)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["failures"] == []
    save = found["stages"]["save"]
    assert save["rounds"] == 1
    assert save["disturbances"]["group"] >= 1
    assert save["disturbed"]["processor"] > 0


@pytest.mark.parametrize(("command", "said"), COMMANDS.items(), ids=["other bytes", "a traceback", "a refusal"])
def test_what_must_not_happen_is_reported(tmp_path, command, said):
    program = f"""
import json, os, random, sys
from pathlib import Path
import chaos
random.seed(0)
chaos.t3d = lambda _: exec({command!r}, {{"os": os, "sys": sys, "Path": Path}})
stages = {{"x": chaos.Stage("x", ())}}
folder, report = Path({str(tmp_path)!r}), chaos.Report(0, {{}})
for _ in chaos.chaos(stages, folder, folder / "streams", ["group"], 1, 0.0, report):
    report.write(folder / "found.json")
"""
    done = python("-c", program)
    assert done.returncode == 0, done.stderr
    [failure] = json.loads((tmp_path / "found.json").read_text())["failures"]
    assert said in failure


def test_permissions_that_go_while_a_library_writes_are_one_line(tmp_path, monkeypatch):
    """Found by this script: they may be gone where the reason is looked for, too."""
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may do everything
    with pytest.raises(T3DError, match="Permission denied; choose another run_dir, or fix"), writing(tmp_path / "a"):
        raise RuntimeError("file cannot be opened")  # as torch says it


def test_a_folder_that_may_no_longer_be_looked_into_hides_no_error(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    def run():
        with RunFolder(tmp_path / "run"):
            monkeypatch.setattr(Path, "stat", refused)
            raise T3DError("what ended the run")

    with pytest.raises(T3DError, match="what ended the run"):
        run()


def test_a_byte_of_a_student_and_a_token_or_a_verdict_of_an_answer_are_compared(tmp_path):
    def outcome(name: str, weights: bytes, **fields) -> dict:
        with TrajectoryWriter(tmp_path / name / "eval" / "s4", {}) as writer:
            writer.write(make_trajectory(**{"correct": True} | fields))
        (tmp_path / name / "student").mkdir()
        (tmp_path / name / "student" / "model.safetensors").write_bytes(weights)
        return chaos.outcome(tmp_path / name)

    expected = outcome("whole", b"12")
    tokens = [1 + token for token in make_trajectory().response_ids]
    chaos.compare(expected, outcome("other clock", b"12", confidence=[0.5] * len(tokens)))
    for name, found, what in (
        ("student", {"weights": b"13"}, "student/model.safetensors"),
        ("tokens", {"weights": b"12", "response_ids": tokens}, "eval/s4 p0/0 tokens"),
        ("verdict", {"weights": b"12", "correct": False}, "eval/s4 p0/0 correct"),
    ):
        with pytest.raises(chaos.Failure, match=f"1 of 4 results differ: {what}"):
            chaos.compare(expected, outcome(name, **found))
    with pytest.raises(chaos.Failure, match="4 of 4"):
        chaos.compare(expected, {})
