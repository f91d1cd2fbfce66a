"""Every line of benchmarks/gpu runs at tiny shapes on a CPU, and is killed on the way."""

import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / "gpu"
PHASES = ("correct", "decode", "train")


def begin(folder, *arguments):
    command = [sys.executable, FOLDER / "run.py", *arguments, "--rehearse", "--json", folder]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(list(map(str, command)), env=environment, start_new_session=True, **pipe)


def read(folder):
    """The results so far, which are whole at any moment."""
    return {p: json.loads((folder / f"{p}.json").read_text()) for p in PHASES if (folder / f"{p}.json").exists()}


def results(folder):
    return {
        (p, name) for p, found in read(folder).items() for name, cell in found["cells"].items() if "error" not in cell
    }


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """The results of calls of which each phase's first is killed at a random moment after its first result."""
    folder = tmp_path_factory.mktemp("gpu")
    rng = random.Random()
    for phase in PHASES:
        process = begin(folder, phase)
        end = time.monotonic() + 300
        while not any(p == phase for p, _ in results(folder)) and time.monotonic() < end and process.poll() is None:
            time.sleep(0.1)
        time.sleep(rng.random() * 5)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert phase in read(folder), process.stdout.read()
    killed = results(folder)
    process = begin(folder, *PHASES)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    return folder, killed, output


def test_all_phases_rehearse_and_every_check_holds(rehearsed):
    folder, _, output = rehearsed
    for phase, found in read(folder).items():
        errors = {name: cell["error"] for name, cell in found["cells"].items() if "error" in cell}
        assert not errors, output
        assert all(cell.get("ok", True) for cell in found["cells"].values()), found["cells"]
        assert found["rehearsed"]
        for call in found["calls"].values():
            assert {"date", "torch", "transformers", "device", "t3d"} <= set(call), phase
    decode = read(folder)["decode"]["cells"]
    assert decode["tiny batch 1 steps 1 graphs"]["kernels"] > 0
    assert len(decode["tiny batch 1 steps 1 graphs"]["longest"]) == 10


def test_what_was_there_when_it_was_killed_is_not_done_again(rehearsed):
    folder, killed, _ = rehearsed
    files = read(folder)
    assert {phase for phase, _ in killed} == set(PHASES)
    for phase, name in killed:
        found = files[phase]
        assert found["cells"][name]["call"] == next(iter(found["calls"]))  # the first, which was killed
        assert len(found["calls"]) == 2


def test_a_phase_stops_at_its_time_and_says_so(tmp_path):
    process = begin(tmp_path, "decode", "--seconds", "1")
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert not results(tmp_path)


@pytest.fixture
def report(monkeypatch):
    for path in (FOLDER, FOLDER.parent):
        monkeypatch.syspath_prepend(str(path))
    return importlib.import_module("report")


def test_a_failed_cell_is_a_line_and_tried_again_by_the_next_call(tmp_path, report):
    from cells import OutOfTime, Place, Results

    def fails():
        raise ValueError("no\nroom")

    def late():
        raise OutOfTime

    cells = {"a": dict, "b": fails, "c": late}
    first = Results(tmp_path / "x.json", 1.0, Place(True))
    first.run("a", dict)
    first.run("b", fails)
    with pytest.raises(OutOfTime):
        first.run("c", late)
    assert json.loads((tmp_path / "x.json").read_text())["cells"]["b"]["error"] == "ValueError: no room"
    assert list(first.left(cells)) == ["c"]
    assert list(Results(tmp_path / "x.json", 2.0, Place(True)).left(cells)) == ["c", "b"]


def test_the_report_says_what_was_measured_and_what_was_not(tmp_path, report, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    call = {"device": "a GPU", "driver": "1", "torch": "2", "transformers": "3", "date": "2026-01-01T00:00:00+00:00"}
    cell = {"tokens_per_second": 1234.0, "memory_share": 0.5, "matrix_share": 0.1, "kernels": 7, "host_ms": 0.25}
    cell["longest"] = [["gemm", 2.0, 0.5]]
    cells = {
        "4b batch 8 steps 2 flex": cell,
        "4b batch 8 steps 2 graphs": {"error": "OutOfMemoryError: a | b"},
        "4b batch 8 autoregressive": {"tokens_per_second": 617.0},
    }
    found = {"rehearsed": False, "calls": {"1": call}, "cells": cells}
    (tmp_path / "decode.json").write_text(json.dumps(found))
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path), "--page", str(page)])
    report.main()
    text = page.read_text()
    row = "| 617 |  | not measured | 1,234 | failed: OutOfMemoryError: a / b | 2.00 | 50% | 10% | 7 | 0.25 |"
    assert f"| SDAR-4B | 8 | 2 {row}" in text
    assert "- `decode`: a GPU, driver 1, torch 2" in text
    assert "- `train`: not measured" in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    report.main()
    assert page.read_text() == text
    (tmp_path / "decode.json").write_text(json.dumps(found | {"rehearsed": True}))
    with pytest.raises(SystemExit, match="rehearsal"):
        report.main()
