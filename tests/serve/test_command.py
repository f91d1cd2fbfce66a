"""`t3d serve` and what a user can get wrong: one line, exit code 2, nothing started."""

import shutil
import socket
import sys

import httpx2
import pytest

from t3d.cli import main
from t3d.errors import T3DError
from t3d.models.recommended import recommend
from t3d.serve.config import ServeConfig, read_key
from tests.e2e.program import Program


@pytest.fixture
def refuse(start, tmp_path):
    program = Program(tmp_path, start.context)

    def refuse(*arguments: str, said: str) -> None:
        done = program("serve", *arguments, "--device", "cpu")
        assert (done.code, done.stdout) == (2, ""), done
        assert done.stderr.startswith("error: ")
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert said in done.stderr

    return refuse


def test_bad_input(refuse, tiny, tmp_path):
    refuse("nowhere/at/all", said="nowhere/at/all")
    refuse(str(tiny), "--steps", "9", said="steps = 9 is more than block_size = 4")
    refuse(str(tiny), "--port", "70000", said="port must lie in 0..65535, got 70000")
    refuse(str(tiny), "--api-key-file", str(tmp_path / "none"), said="cannot read the API key")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refuse(str(tiny), "--port", str(taken.getsockname()[1]), said="cannot listen at 127.0.0.1")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"port": 70000}, "port must lie in 0..65535"),
        ({"timeout": 0}, "timeout must be above 0"),
        ({"max_queue": -1}, "max_queue must not be negative"),
        ({"decoding": {"strategy": "low_confidence"}}, "unknown strategy 'low_confidence'"),
        ({"api_key": "two\nlines"}, "one line of printable ASCII"),
        ({"api_key": ""}, "not empty"),
    ],
)
def test_bad_settings(settings, said):
    with pytest.raises(T3DError, match=said):
        ServeConfig(**settings)


def test_the_key_may_come_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("T3D_API_KEY", "from-environment")
    assert read_key(None) == "from-environment"
    (tmp_path / "key").write_text("from-file\n")
    assert read_key(tmp_path / "key") == "from-file"
    monkeypatch.setenv("T3D_API_KEY", "")
    assert read_key(None) is None


def test_without_the_extra(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("t3d.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(SystemExit) as done:
        main(["serve", "embedded"])
    assert done.value.code == 2
    assert capsys.readouterr().err == "error: t3d serve needs uvicorn; install it with: pip install 't3d[serve]'\n"


def test_a_checkpoint_says_how_it_is_decoded(start, tiny, tmp_path_factory, refuse):
    """As in `t3d generate`: what is given goes first, then generation_config.json."""
    folder = tmp_path_factory.mktemp("model") / "student"
    shutil.copytree(tiny, folder)
    recommend(folder, {"steps": 2, "strategy": "sequential"})
    server = start(str(folder), "--temperature", "0.5")
    (card,) = httpx2.get(f"{server.url}/v1/models").json()["data"]
    assert card["id"] == "student"
    ours = card["t3d"]
    assert (ours["steps"], ours["strategy"], ours["temperature"]) == (2, "sequential", 0.5)
    body = {"prompt": "abc", "max_tokens": 21, "ignore_eos": True, "return_details": True}
    (choice,) = httpx2.post(f"{server.url}/v1/completions", json=body).json()["choices"]
    assert choice["t3d"]["steps"] == 2
    assert choice["t3d"]["step_map"][1:9] == [0, 0, 1, 1] * 2  # "abc" leaves one place in its block
    recommend(folder, {"stepps": 2})
    refuse(str(folder), said="stepps")
