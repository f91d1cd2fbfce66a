"""Components in packages of their own: installed beside t3d, they are there wherever such components are."""

import json
import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
import yaml

from t3d import DecodingConfig, Engine, load_model
from t3d.embedded import checkpoint
from t3d.trajectories import TrajectoryDataset
from tests.e2e.program import Done

POLICY = '''
from dataclasses import dataclass

from t3d.decoding.policy import Policy, register
from t3d.components import setting


@register("mine")
@dataclass(frozen=True)
class Mine(Policy):
    """All of which the model doubts less than it may."""

    slack: float = setting(0.25, "doubt that a committed token may have", low=0, high=1, slow=0.0, fast=1.0)

    def decide(self, view, knobs, memory):
        return view.confidence > 1 - knobs.slack
'''
SAME = {"strategy": "low_confidence_dynamic", "threshold": 0.5}  # as `mine` with a slack of 0.5
QUESTION = "Sam had 37 apples and Leo had 25. How many apples did they have in all?"


# A package is found when t3d is imported, so one process imports it and forks one for each command.
FORKS = """
import json, os, sys
import t3d.generate, t3d.pipeline
from tests.e2e.program import _command
for line in sys.stdin:
    if (child := os.fork()) == 0:
        _command(*json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Installed:
    """`t3d` where a package is installed that brings one component."""

    def __init__(self, folder: Path, environment: dict[str, str], process: subprocess.Popen):
        self.folder, self.environment, self.process, self.calls = folder, environment, process, 0

    def __call__(self, *arguments: str, cwd: Path) -> Done:
        self.calls += 1
        output = self.folder / f"call{self.calls}"
        output.mkdir()
        self.process.stdin.write(json.dumps([arguments, str(cwd), str(output)]) + "\n")
        self.process.stdin.flush()
        return Done(int(self.process.stdout.readline()), *((output / n).read_text() for n in ("stdout", "stderr")))


@contextmanager
def installed(folder: Path, kind: str, name: str, code: str):
    (folder / "mine").mkdir()
    (folder / "mine" / f"{name}.py").write_text(code)
    about = folder / "mine-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[t3d.{kind}]\n{name} = mine.{name}\n")
    root = Path(__file__).parents[2]
    paths = [str(folder), str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", FORKS], env=environment, **pipe) as process:
        yield Installed(folder, environment, process)
        process.stdin.close()


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    with installed(tmp_path_factory.mktemp("site"), "policies", "mine", POLICY) as found:
        yield found


@pytest.fixture(scope="module")
def teacher() -> Engine:
    return Engine(*load_model(checkpoint("embedded"), device="cpu"))


def test_in_a_recipe(policy, tmp_path, teacher):
    recipe = {
        "model": {"path": "embedded", "device": "cpu"},
        "task": {"name": "word_problems", "num_train": 4, "num_eval": 2},
        "rollout": {"max_tokens": 48, "temperature": 0.0, "strategy": "mine"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = policy("rollout", "recipe.yaml", "rollout.slack=0.5", cwd=tmp_path)
    assert done.code == 0, done.stderr
    found = list(TrajectoryDataset(tmp_path / "runs" / "recipe" / "rollout"))
    assert len(found) == 4
    expected = teacher.generate([t.prompt_ids for t in found], DecodingConfig(max_tokens=48, **SAME))
    assert [t.response_ids for t in found] == [t.response_ids for t in expected]
    assert [t.step_map for t in found] == [t.step_map for t in expected]
    for wrong, said in (
        ("rollout.slak=1", "did you mean 'rollout.slack'"),
        ("rollout.strategy=mime", "did you mean 'mine'"),
    ):
        refused = policy("rollout", "recipe.yaml", wrong, cwd=tmp_path)
        assert refused.code == 2
        assert said in refused.stderr
        assert len(refused.stderr.splitlines()) == 1


def test_on_the_command_line(policy, t3d, teacher):
    common = ("generate", "embedded", QUESTION, "--raw", "--device", "cpu", "--max-tokens", "48")
    mine = policy(*common, "--strategy", "mine", "--slack", "0.5", cwd=t3d.folder)
    assert mine.code == 0, mine.stderr
    (want,) = teacher.generate([QUESTION], DecodingConfig(max_tokens=48, **SAME))
    assert mine.stdout == want.text + "\n"
    assert f"{want.length} tokens in {want.nfe.denoise} forwards" in mine.stderr
    refused = policy("generate", "embedded", QUESTION, "--slak", "0.5", cwd=t3d.folder)
    assert refused.code == 2
    assert "--slack" in refused.stderr
    without = t3d(*common, "--strategy", "mine")
    assert without.code == 2
    assert "unknown strategy 'mine'" in without.stderr


def test_in_the_server(policy, tmp_path, teacher):
    command = [sys.executable, "-m", "t3d", "serve", "embedded", "--port", "0", "--device", "cpu", "--slack", "0.75"]
    log = tmp_path / "log"
    with log.open("w") as stderr, subprocess.Popen(command, env=policy.environment, stderr=stderr) as process:
        try:
            end = time.monotonic() + 120
            while not (found := re.search(r" at (http://\S+) ", log.read_text())):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < end
                time.sleep(0.05)
            with httpx2.Client(base_url=found[1], timeout=60) as http:
                check_server(http, teacher)
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def objective(tmp_path_factory):
    """The guide's."""
    guide = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    code = next(c for c in guide.split("```")[1::2] if c.startswith("python\n# my_package/focal.py"))
    code = code.removeprefix("python\n")
    with installed(tmp_path_factory.mktemp("site"), "objectives", "focal", code) as found:
        yield found


def test_an_objective_with_a_key_of_its_own(objective, tmp_path):
    recipe = {
        "model": {"path": "embedded", "device": "cpu"},
        "task": {"name": "word_problems", "num_train": 8},
        "rollout": {"max_tokens": 48},
        "train": {"objective": "focal", "max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    def run(*arguments):
        return objective(*arguments, cwd=tmp_path)

    for stage in ("rollout", "train"):
        done = run(stage, "recipe.yaml", "train.focal_gamma=1.5")
        assert done.code == 0, done.stderr
    state = json.loads((tmp_path / "runs" / "recipe" / "train" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["log_history"][0]["loss/focal"] > 0
    for argument, said in (
        ("train.focal_gamma=-1", "train.focal_gamma must not be negative, got -1"),
        ("train.focal_gamma=1", "with train.focal_gamma = 1.5, not 1.0"),
    ):
        refused = run("train", "recipe.yaml", argument)
        assert refused.code == 2, argument
        assert said in refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1
    unchanged = run("train", "recipe.yaml", "train.focal_gamma=1.5", "train.beta=0.7")  # another objective's
    assert unchanged.code == 0, unchanged.stderr
    assert "complete, skipped" in unchanged.stderr
    assert "focal: how little a likely token counts" in run("config").stdout


def check_server(http, teacher) -> None:
    [mine] = [s for s in http.get("/v1/strategies").json()["data"] if s["id"] == "mine"]
    assert mine == {
        "id": "mine",
        "description": "All of which the model doubts less than it may.",
        "knob": {"name": "slack", "slow": 0.0, "fast": 1.0},
        "settings": [
            {
                "name": "slack",
                "type": "float",
                "default": 0.25,
                "help": "doubt that a committed token may have",
                "low": 0,
                "high": 1,
            }
        ],
    }
    assert http.get("/v1/models").json()["data"][0]["t3d"]["slack"] == 0.75

    prompt = teacher.tokenizer.encode(QUESTION, add_special_tokens=False)

    def ask(**settings):
        body = {"prompt": prompt, "max_tokens": 32, "return_details": True, "strategy": "mine"}
        return http.post("/v1/completions", json=body | settings)

    for settings, threshold in (({"slack": 0.5}, 0.5), ({}, 0.25)):
        (want,) = teacher.generate([prompt], DecodingConfig(max_tokens=32, **SAME | {"threshold": threshold}))
        got = ask(**settings).json()["choices"][0]["t3d"]
        assert got["token_ids"] == want.response_ids[: want.length]
        assert got["nfe"]["denoise"] == want.nfe.denoise
    for wrong, said in (({"slak": 0.5}, "did you mean 'slack'"), ({"slack": 2}, "slack"), ({"slack": "1"}, "slack")):
        refused = ask(**wrong)
        assert refused.status_code == 400
        assert said in refused.json()["error"]["message"]
