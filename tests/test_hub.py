"""Pushing to a stand-in for the hub, through `huggingface_hub`."""

import json
import os
import subprocess
import sys

import huggingface_hub
import pytest
import yaml

from t3d.errors import T3DError
from t3d.hub import push_checkpoint, push_trajectories
from t3d.models import load_model, save_model
from t3d.trajectories import TrajectoryDataset, TrajectoryWriter
from tests.conftest import make_model
from tests.hub_server import TOKEN, hub_server
from tests.trajectory_examples import make_trajectory


@pytest.fixture
def hub(monkeypatch, tmp_path):
    constants = huggingface_hub.constants
    with hub_server() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder: a student in shards with its card, and a rollout in two shards."""
    run = tmp_path_factory.mktemp("runs") / "mine"
    save_model(make_model(), run / "student", max_shard_size="20KB")
    (run / "student" / "README.md").write_text("---\ntags:\n- t3d\n---\n# mine\n")
    (run / "student" / "optimizer.pt").write_text("not for others")
    with TrajectoryWriter(run / "rollout", {"kind": "rollout", "recipe": {"seed": 3}}, shard_size=3) as writer:
        for number in range(5):
            writer.write(make_trajectory(f"p{number}", correct=number != 2, length=4))
    return run


def test_a_student(hub, run, tmp_path):
    assert push_checkpoint(run / "student", "me/student") == f"{hub.url}/me/student"
    repository = hub.repositories["model", "me/student"]
    expected = {p.name: p.read_bytes() for p in (run / "student").iterdir() if p.name != "optimizer.pt"}
    assert repository.files == expected
    assert sum(name.endswith(".safetensors") for name in expected) > 1
    assert not repository.private
    assert [message.startswith("Upload with t3d ") for message in repository.commits] == [True]
    for name, data in repository.files.items():
        (tmp_path / name).write_bytes(data)
    load_model(tmp_path)


def test_trajectories(hub, run, tmp_path):
    before = sorted(run.rglob("*"))
    assert push_trajectories(run / "rollout", "me/rollout", private=True) == f"{hub.url}/datasets/me/rollout"
    assert sorted(run.rglob("*")) == before
    repository = hub.repositories["dataset", "me/rollout"]
    assert repository.private
    card = repository.files.pop("README.md").decode()
    assert sorted(repository.files) == ["data/shard-00000.parquet", "data/shard-00001.parquet"]
    for name, data in repository.files.items():
        (tmp_path / name.removeprefix("data/")).write_bytes(data)
    assert list(TrajectoryDataset(tmp_path)) == list(TrajectoryDataset(run / "rollout"))
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front)["configs"] == [{"config_name": "default", "data_files": "data/*.parquet"}]
    for line in (
        "# rollout",
        "| trajectories | 5 |",
        "| correct | 80.0% of 5 verified |",
        "| tokens on average | 4.0 |",
    ):
        assert line in text.splitlines()
    assert json.loads(text.partition("```json\n")[2].partition("\n```")[0])["recipe"] == {"seed": 3}


def test_a_repository_that_is_there_is_updated(hub, run, tmp_path):
    push_checkpoint(run / "student", "me/student")
    repository = hub.repositories["model", "me/student"]
    repository.files["notes.md"] = b"mine"
    whole = tmp_path / "whole"
    save_model(make_model(seed=1), whole)
    push_checkpoint(whole, "me/student")
    assert len(repository.commits) == 2
    assert sorted(name for name in repository.files if "safetensors" in name) == ["model.safetensors"]
    assert repository.files["model.safetensors"] == (whole / "model.safetensors").read_bytes()
    assert repository.files["notes.md"] == b"mine"
    with pytest.raises(T3DError, match="me/student is there already, and public; make it private first"):
        push_checkpoint(whole, "me/student", private=True)
    assert len(repository.commits) == 2


def test_what_the_hub_refuses(hub, run, monkeypatch):
    def refused(message: str, repo_id: str = "me/student"):
        with pytest.raises(T3DError, match=message) as caught:
            push_checkpoint(run / "student", repo_id)
        assert "\n" not in str(caught.value)

    refused("'student' is no repository: write OWNER/NAME", "student")
    refused("cannot push to me/a b: ", "me/a b")
    hub.readonly = True
    refused("the hub refuses to take me/student: the token may not write there")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused("the hub refuses to take me/student: it does not know the token")
    monkeypatch.delenv("HF_TOKEN")
    refused("there is no token for the hub; set HF_TOKEN, or log in with `hf auth login`")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    refused("cannot push to me/student: .*[Cc]onnect")
    assert not hub.repositories


def test_what_is_not_whole_is_not_pushed(hub, run, tmp_path):
    with pytest.raises(T3DError, match=r"it has no config\.json"):
        push_checkpoint(run, "me/student")
    with pytest.raises(T3DError, match="no trajectories in"):
        push_trajectories(run / "student", "me/rollout")
    save_model(make_model(), tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"half")
    with pytest.raises(T3DError, match="cut short or damaged"):
        push_checkpoint(tmp_path / "cut", "me/student")
    assert not hub.repositories


COMMANDS = """
import os, sys
from t3d.cli import main
for line in sys.argv[1:]:
    if line == "no token":
        del os.environ["HF_TOKEN"]
        continue
    try:
        main(["push", *line.split()])
    except SystemExit as done:
        print(done.code)
"""


def test_the_command(run, tmp_path):
    """In one process, since starting one takes seconds."""
    with hub_server() as hub:
        (tmp_path / "begun").mkdir()
        (tmp_path / "begun" / "recipe.yaml").write_text("seed: 1")
        rollout = run / "rollout"
        lines = (f"{run} me/all", f"{run} me/all --trajectories --private", f"{rollout} me/rollout", f"{run} me/all")
        lines += ("nowhere me/all", f"{tmp_path}/begun me/all", "no token", f"{run} me/all")
        settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
        env = os.environ | settings | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-c", COMMANDS, *lines], env=env, capture_output=True, text=True, timeout=300
        )
        pushed = [hub.url + path for path in ("/me/all", "/datasets/me/all", "/datasets/me/rollout", "/me/all")]
        assert done.stdout.splitlines() == [line for url in pushed for line in (url, "0")] + ["2"] * 3, done.stderr
        assert [line for line in done.stderr.splitlines() if line.startswith(("error", "me/"))] == [
            "me/all is there already and is updated",
            "error: nowhere is not a folder",
            f"error: {tmp_path}/begun has no student yet; `t3d train` makes it, and --trajectories pushes the rollout",
            "error: there is no token for the hub; set HF_TOKEN, or log in with `hf auth login`",
        ]
        assert {key: repository.private for key, repository in hub.repositories.items()} == {
            ("model", "me/all"): False,
            ("dataset", "me/all"): True,
            ("dataset", "me/rollout"): False,
        }
