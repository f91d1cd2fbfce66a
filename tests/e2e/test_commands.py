"""The commands that are no stages, and the installed program itself."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from rich.console import Console

from t3d import __version__
from t3d.decoding import DecodingConfig, load_decoding
from t3d.evaluation import EvalConfig, EvalRow, read_summary
from t3d.evaluation.rows import print_table
from t3d.trajectories import TrajectoryDataset


def program(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "t3d", *arguments]
    options = {"capture_output": True, "text": True, "timeout": 300} | options
    return subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **options)


def test_help_and_version_do_not_wait_for_torch():
    code = "import sys, t3d.cli; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'rich')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0
    assert program("--version").stdout == f"t3d {__version__}\n"
    listed = program("--help").stdout
    for command in ("run", "rollout", "train", "eval", "report", "generate", "config", "show"):
        assert f"\n  {command} " in listed


def test_a_reader_that_stops_reading_is_no_error():
    command = f"{sys.executable} -m t3d --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr == ""


def test_config_shows_a_recipe_as_the_stages_see_it(t3d, write_recipe):
    recipe = write_recipe(t3d.folder)
    done = t3d("config", recipe, "seed=9", "train.weight_decay=0.5")
    assert done.code == 0
    assert "seed: 9" in done.stdout
    assert "weight_decay: 0.5" in done.stdout
    assert "temperature: 0.1" in done.stdout  # a default
    (t3d.folder / "again.yaml").write_text(done.stdout)
    assert t3d("config", "again.yaml").stdout == done.stdout
    assert not (t3d.folder / "runs").exists()


def test_generate(t3d, tiny):
    plain = t3d("generate", str(tiny), "How many apples?", "--max-tokens", "12", "--steps", "2")
    assert plain.code == 0
    assert "12 tokens in " in plain.stderr
    assert "tokens per forward" in plain.stderr
    assert "\x1b" not in plain.stdout
    colored = t3d("generate", str(tiny), "How many apples?", "--max-tokens", "12", "--steps", "2", "--color")
    assert "\x1b" in colored.stdout
    sampled = [
        t3d("generate", str(tiny), "Mia", "--temperature", "1", "--seed", str(seed)).stdout for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]
    raw = t3d("generate", str(tiny), "How many apples?", "--max-tokens", "12", "--steps", "2", "--raw")
    assert raw.stdout != plain.stdout
    piped = program("generate", str(tiny), "-", "--max-tokens", "12", "--steps", "2", input="How many apples?")
    assert piped.stdout == plain.stdout


@pytest.mark.parametrize(
    "arguments",
    [("--steps", "5"), ("--temperature", "-1"), ("--strategy", "fast"), ("--threshold", "2"), ("--floor", "ones")],
)
def test_generate_refuses_what_makes_no_sense(t3d, tiny, arguments):
    done = t3d("generate", str(tiny), "How many?", *arguments)
    assert done.code == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(("command", "without"), [("generate", {"n"}), ("serve", {"n", "seed", "max_tokens"})])
def test_every_setting_is_an_option(t3d, command, without):
    done = t3d(command, "--help")
    assert done.code == 0, done.stderr
    settings = {f.name for f in fields(DecodingConfig)}
    offered = {name.replace("-", "_") for name in re.findall(r"^  --([a-z-]+)", done.stdout, re.M)}
    assert settings & offered == settings - without
    assert "0..1" in done.stdout.split("--threshold ")[1].split("--")[0]  # bounds
    assert "low_confidence_dynamic" in done.stdout.split("--threshold ")[0].splitlines()[-2]  # whose it is


def test_an_unknown_name_is_refused_before_anything_is_loaded(t3d):
    """The nearest is named; the checkpoint is not there, and that is not what is said."""
    for command in (["generate", "nowhere", "How many?"], ["serve", "nowhere"]):
        for option, wrong, right in (("--strategy", "sequental", "sequential"), ("--flight", "s2d", "s2d2")):
            done = t3d(*command, option, wrong)
            assert done.code == 2
            assert f"did you mean {right!r}?" in done.stderr
            assert len(done.stderr.splitlines()) == 1


def test_options_are_settings(t3d, tiny):
    """Given as options or as recipes have them, and options go before a file."""
    question, common = "How many apples?", ("--max-tokens", "12", "--temperature", "1", "--seed", "4")
    options = ("--strategy", "low_confidence_dynamic", "--threshold", "0.1", "--blocks-in-flight", "2", "--ignore-eos")
    texts = ("strategy=low_confidence_dynamic", "threshold=0.1", "blocks_in_flight=2", "ignore_eos=true")
    one = t3d("generate", str(tiny), question, *common, *options)
    other = t3d("generate", str(tiny), question, *common, *(part for text in texts for part in ("--set", text)))
    assert one.code == other.code == 0, one.stderr
    assert one.stdout == other.stdout
    assert one.stderr.split(",")[0] == other.stderr.split(",")[0]
    plain = t3d("generate", str(tiny), question, *common, "--ignore-eos")
    assert plain.stderr.split(",")[0] != one.stderr.split(",")[0]


def test_show(finished, t3d):
    run, _ = finished
    rollout = t3d("show", str(run / "rollout"), "-n", "2")
    assert rollout.code == 0, rollout.stderr
    assert rollout.stdout.count("forwards") == 2
    answers = next((run / "eval" / "student").iterdir())
    one = t3d("show", str(answers), "--id", "word_problems/test/0/000003")
    assert one.code == 0, one.stderr
    assert one.stdout.count("forwards") == 1
    for folder, arguments in ((answers, ["--id", "nobody"]), (t3d.folder / "nothing", [])):
        done = t3d("show", str(folder), *arguments)
        assert done.code == 2
        assert done.stderr.startswith("error: ")


def test_show_puts_the_answers_to_a_problem_together(finished, t3d):
    run, _ = finished
    settings = sorted((run / "eval").glob("*/*steps1*"))
    both = t3d("show", *map(str, settings), "-n", "2")
    assert both.code == 0, both.stderr
    assert both.stdout.count("forwards") == 4
    assert both.stdout.count("word_problems/test/0/000001") == 1
    assert all(re.search(rf"^{name}  (correct|wrong)", both.stdout, re.M) for name in ("teacher", "student"))
    everything = t3d("show", str(run / "eval"), "-n", "1")
    assert everything.stdout.count("forwards") == 4  # two models, two settings
    for other in (run / "rollout", run / "student"):
        done = t3d("show", str(settings[0]), str(other))
        assert done.code == 2
        assert "no traject" in done.stderr
        assert len(done.stderr.splitlines()) == 1


def chat(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def test_a_rollout_on_chats(t3d, write_recipe):
    turns = chat("How many apples had Mia?", "4", "How many pears?", "Mia had 4 pears: \\boxed{4}")
    records = [{"messages": [{"role": "system", "content": "How many?"}, *turns]}, {"messages": turns[2:]}]
    records += [{"prompt": turns[:1], "completion": turns[1:2]}, {"prompt": "How many plums?", "answer": 3}]
    (t3d.folder / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    task = {"name": "prompts", "path": "chats.jsonl", "num_train": None, "num_eval": None}
    done = t3d("rollout", write_recipe(t3d.folder, task=task))
    assert done.code == 0, done.stderr
    found = list(TrajectoryDataset(t3d.folder / "runs" / "recipe" / "rollout"))
    assert [(t.question, t.answer, t.correct) for t in found] == [
        ("System: How many?\n\nUser: How many apples had Mia?\n\nAssistant: 4\n\nUser: How many pears?", "4", False),
        ("How many pears?", "4", False),
        ("How many apples had Mia?", None, None),
        ("How many plums?", "3", False),
    ]
    done = t3d("train", write_recipe(t3d.folder, task=task, train={"objective": "sft"}, run_dir="sft"))
    assert done.code == 2
    assert not (t3d.folder / "sft").exists()
    assert done.stderr.splitlines()[-1].endswith("has no ground-truth responses for chats:4; train on rollouts")


def test_trajectories_for_trl(finished, t3d, tiny):
    run, _ = finished
    known = list(TrajectoryDataset(run / "rollout"))
    for source, extra in ((run, []), (run / "rollout", ["--format", "messages"])):
        done = t3d("export-trajectories", str(source), "out.jsonl", *extra)
        assert (done.code, done.stdout) == (0, f"out.jsonl: {len(known)} trajectories\n"), done.stderr
        rows = [json.loads(line) for line in (t3d.folder / "out.jsonl").read_text().splitlines()]
        if extra:
            assert [row["messages"] for row in rows] == [chat(t.question, t.text) for t in known]
        else:
            assert [(row["response_ids"], row["step_map"]) for row in rows] == [
                (t.response_ids, t.step_map) for t in known
            ]
    answers = next((run / "eval" / "student").iterdir())
    with_tokenizer = ("--tokenizer", str(tiny))
    done = t3d("export-trajectories", str(answers), "out.jsonl", "--format", "prompt-completion", *with_tokenizer)
    assert done.code == 0, done.stderr
    for arguments, said in (
        (("export-trajectories", str(answers), "out.jsonl", "--format", "messages"), "add --tokenizer CHECKPOINT"),
        (("export-trajectories", "nowhere", "out.jsonl"), "no trajectories in nowhere"),
        (("export", str(run / "rollout"), "out"), "holds trajectories; `t3d export-trajectories` writes them"),
    ):
        done = t3d(*arguments)
        assert done.code == 2
        assert said in done.stderr


def test_report_of_run_folders(finished, t3d):
    for name in ("a", "b"):
        shutil.copytree(finished[0], t3d.folder / name, ignore=shutil.ignore_patterns("report*"))
    one = t3d("report", "a")
    assert (one.code, one.stdout) == (0, "report: a/report.html\n"), one.stderr
    assert (t3d.folder / "a" / "report.html").read_text() == (finished[0] / "report.html").read_text().replace(
        finished[0].name, "a"
    )
    both = t3d("report", "a", "b", "-o", "both.html", "--title", "Two runs", "--problems", "2")
    assert both.code == 0, both.stderr
    page = (t3d.folder / "both.html").read_text()
    assert "<h1>Two runs</h1>" in page
    assert (t3d.folder / "both-accuracy.svg").exists()
    assert t3d("report", "a", "b").stdout == "report: report.html\n"
    assert t3d("report", "a", "b").code == 0  # a report may be made anew


def test_report_refuses(finished, t3d, write_recipe):
    recipe = write_recipe(t3d.folder)
    (t3d.folder / "empty").mkdir()
    (t3d.folder / "mine.html").write_text("my own page")
    run = str(finished[0])
    cases = {
        ("nowhere",): "nowhere is not a run folder, nor a recipe",
        (run, "nowhere"): "nowhere is not a run folder",
        (run, "report.title=x"): "report.title=x is not a run folder",
        ("empty",): "empty/summary.json",
        (run, "-o", "mine.html"): "mine.html exists and is not a t3d report",
        (run, "-o", "mine.html/x.html"): "cannot write",
        (run, "--problems", "-1"): "problems must not be negative",
        (recipe, "--title", "x"): "a recipe has report.title",
    }
    for arguments, said in cases.items():
        done = t3d("report", *arguments)
        assert (done.code, done.stdout) == (2, ""), (arguments, done)
        assert done.stderr.startswith("error: ")
        assert len(done.stderr.splitlines()) == 1
        assert said in done.stderr
    assert (t3d.folder / "mine.html").read_text() == "my own page"
    assert not list((t3d.folder / "empty").iterdir())


def test_an_unexpected_failure_is_not_hidden(t3d, write_recipe):
    (t3d.folder / "broken.py").write_text(
        "from t3d.tasks import Task, Problem, register\n\n\n"
        '@register("broken")\n'
        "class Broken(Task):\n"
        "    def problems(self, split, n=None, seed=None):\n"
        '        return [Problem("a", "How many?", "3")]\n\n'
        "    def judge_all(self, texts, problems):\n"
        '        raise RuntimeError("a fault of the program")\n'
    )
    done = t3d("run", write_recipe(t3d.folder, task={"name": "broken.py"}))
    assert done.code == 1
    assert "RuntimeError: a fault of the program" in done.stderr
    assert "RuntimeError: a fault of the program" in (t3d.folder / "runs" / "recipe" / "log.txt").read_text()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_fits_the_terminal(finished, width):
    console = Console(width=width, file=io.StringIO())
    print_table([EvalRow(**row) for row in read_summary(finished[0] / "summary.json")["rows"]], console)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines)
    assert all(word in lines[1] for word in ("model", "setting", "accuracy %", "95%", "TPF"))


def test_calibrate_and_decode_with_what_it_chose(t3d, write_recipe, tiny):
    recipe = write_recipe(t3d.folder)
    command = ["calibrate", recipe, "--model", str(tiny), "--strategy", "low_confidence_dynamic"]
    done = t3d(*command, "--tpf", "1.5", "-o", "chosen.json")
    assert done.code == 0, done.stderr
    assert "tokens per forward on 6 dev problems" in done.stdout
    chosen = load_decoding(t3d.folder / "chosen.json")
    assert chosen.strategy == "low_confidence_dynamic"
    assert 0 < chosen.threshold < 1
    answer = t3d("generate", str(tiny), "How many apples?", "--decoding", "chosen.json", "--max-tokens", "12")
    assert answer.code == 0, answer.stderr
    settings = EvalConfig(decoding=[str(t3d.folder / "chosen.json")], max_tokens=7).settings(seed=5)
    assert settings[-1] == replace(chosen, max_tokens=7, seed=5)
    for wrong, said in {
        ("--tpf", "1.5", "--accuracy", "0.5"): "either --accuracy or --tpf",
        ("--tpf", "100"): "reaches at best tpf",
        ("--accuracy", "1"): "reaches at best quality",
        ("--tpf", "2", "--strategy", "sequential"): "calibrate one --strategy",
        ("--tpf", "2", "--split", "none"): "none",
    }.items():
        done = t3d(*command, *wrong, "-o", "not-there.json")
        assert done.code == 2
        assert said in done.stderr
        assert not (t3d.folder / "not-there.json").exists()
    done = t3d("calibrate", recipe, "--model", str(tiny), "--strategy", "sequential", "--tpf", "2")
    assert done.code == 2
    assert "nothing to calibrate" in done.stderr


def test_calibrate_with_a_guarantee(t3d, write_recipe, tiny):
    recipe = write_recipe(t3d.folder)
    command = ["calibrate", recipe, "task.num_eval=20", "--model", str(tiny)]
    ready = ["--strategy", "adaptive", "--strategy", "sequential", "--blocks-in-flight", "1", "-o", "safe.json"]
    done = t3d(*command, "--alpha", "0.3", *ready)
    assert done.code == 0, done.stderr
    assert "with 95% confidence it loses at most 30% of all problems to the reference (0 of 20 dev" in done.stdout
    assert len([line for line in done.stderr.splitlines() if "of 20 lost" in line]) == 8
    first = json.loads((t3d.folder / "safe.json").read_text())
    trials = first["notes"]["trials"]
    assert max(trials, key=lambda trial: trial["tpf"])["tpf"] == first["notes"]["reached"]["tpf"]
    assert load_decoding(t3d.folder / "safe.json").strategy in ("adaptive", "sequential")
    kept = sorted(t3d.folder.rglob("calibrate/**/*.parquet"))
    assert len(kept) == 9  # the reference too
    kept[3].unlink()  # as if killed before it: the rest is not decoded again
    before = {path: path.stat().st_mtime_ns for path in kept[:3] + kept[4:]}
    again = t3d(*command, "--alpha", "0.3", *ready)
    assert (again.code, again.stdout) == (0, done.stdout)
    assert json.loads((t3d.folder / "safe.json").read_text()) == first
    assert {path: path.stat().st_mtime_ns for path in before} == before
    few = "20 problems are too few for alpha 0.05 and delta 0.05: to certify one of 5 settings takes at least 90"
    for wrong, said in {
        ("--alpha", "0.05", "--strategy", "adaptive", "--blocks-in-flight", "1"): few,
        ("--alpha", "1.5"): "alpha must lie between 0 and 1, got 1.5",
        ("--alpha", "0.3", "--delta", "0"): "delta must lie between 0 and 1, got 0",
        ("--alpha", "0.3", "--tpf", "2"): "either --accuracy or --tpf or --alpha",
        ("--alpha", "0.3", "--blocks-in-flight", "1"): "--blocks-in-flight goes with --strategy",
        ("--tpf", "2", "--blocks-in-flight", "1"): "--delta and --blocks-in-flight go with --alpha",
        ("--alpha", "0.3", "--strategy", "adaptve"): "did you mean 'adaptive'",
        ("--alpha", "0.3", "eval.grid=[{steps: 4}]"): "nothing to choose: the only setting is the reference",
    }.items():
        done = t3d(*command, *wrong, "-o", "not-there.json")
        assert (done.code, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert said in done.stderr
        assert not (t3d.folder / "not-there.json").exists()
    grid = "eval.grid=[{flight: look_ahead, steps: [4, 2]}, {guidance_scale: [0.0, 1.0], steps: 4}]"
    done = t3d(*command, "--alpha", "0.3", grid, "-o", "any.json")
    assert done.code == 0, done.stderr
    told = [trial["setting"] for trial in json.loads((t3d.folder / "any.json").read_text())["notes"]["trials"]]
    assert told == ["4 steps, look-ahead 1", "2 steps, look-ahead 1", "4 steps, guidance scale 1.0"]


def test_calibrate_says_what_a_guarantee_would_take(t3d, write_recipe):
    recipe = write_recipe(t3d.folder)
    done = t3d(
        *("calibrate", recipe, "task.num_eval=40", "--model", "embedded", "--alpha", "0.15", "-o", "none.json"),
        *("--strategy", "low_confidence_static", "--blocks-in-flight", "4", "eval.max_tokens=96"),
    )
    assert done.code == 2
    assert "none of 3 settings is certified: the best, " in done.stderr
    assert "0.017 is needed); raise --alpha" in done.stderr
    assert not (t3d.folder / "none.json").exists()


def test_the_oracle_is_kept_with_the_evaluation(t3d, write_recipe):
    recipe = write_recipe(t3d.folder)
    plain = t3d("eval", recipe)
    assert plain.code == 0, plain.stderr
    done = t3d("eval", recipe, "eval.oracle=true")  # of an evaluation that is there
    assert done.code == 0, done.stderr
    rows = json.loads((t3d.folder / "runs" / "recipe" / "summary.json").read_text())["rows"]
    [found] = {row["extra"]["oracle_tpf"] for row in rows}
    careful = next(row for row in rows if row["steps"] == 4)
    assert careful["tpf"] <= found <= 4
    stored = next(t3d.folder.rglob("oracle.json"))
    assert stored.parent.name == Path(careful["results"]).name
    known = json.loads(stored.read_text())
    assert len(known) == 6
    stored.write_text(json.dumps(dict.fromkeys(known, 1)))  # what is there is taken as it is
    again = t3d("eval", recipe, "eval.oracle=true", "eval.grid=[{steps: [4, 2, 1]}]")
    assert again.code == 0, again.stderr
    rows = json.loads((t3d.folder / "runs" / "recipe" / "summary.json").read_text())["rows"]
    assert {row["extra"]["oracle_tpf"] for row in rows} == {careful["mean_length"]}
    assert "oracle" in (t3d.folder / "runs" / "recipe" / "eval" / "results.md").read_text()


def test_any_setting_of_a_decode_on_the_command_line(t3d, tiny):
    question = "How many apples?"
    plain = t3d("generate", str(tiny), question, "--max-tokens", "12", "--steps", "2")
    ahead = t3d("generate", str(tiny), question, "--max-tokens", "12", "--steps", "2", "--set", "flight=look_ahead")
    assert (ahead.code, ahead.stdout) == (0, plain.stdout), ahead.stderr
    for text, said in (
        ("flight=look_ahaed", "unknown flight 'look_ahaed' (did you mean 'look_ahead'?)"),
        ("depht=2", "unknown decoding setting 'depht' (did you mean 'depth'?)"),
        ("depth=two", "setting depth must be int, got 'two' (str)"),
        ("depth", "write settings as key=value"),
    ):
        done = t3d("generate", str(tiny), question, "--set", text)
        assert (done.code, done.stdout) == (2, "")
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1
