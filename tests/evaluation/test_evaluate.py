import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import rich

import t3d.answers
from t3d import DecodingConfig, Engine, T3DError
from t3d.decoding.policy import POLICIES
from t3d.evaluation import EvalConfig, evaluate, read_summary, runner, summarise, table, write_summary
from t3d.evaluation.results import markdown
from t3d.evaluation.rows import print_table, setting
from t3d.evaluation.runner import setting_name
from t3d.tasks import Problem, TaskConfig, get_task
from t3d.tasks.word_problems import build_tokenizer
from t3d.trajectories import NFE, TrajectoryDataset, read_trajectories
from tests.conftest import make_model
from tests.trajectory_examples import make_trajectory

STATIC = [DecodingConfig(steps=steps, max_tokens=12) for steps in (4, 2, 1)]


@pytest.fixture(scope="module")
def parts():
    tokenizer = build_tokenizer()
    task = get_task(TaskConfig(name="word_problems"))
    model = make_model(vocab_size=len(tokenizer) + 1, eos_token_id=tokenizer.eos_token_id)
    return model, tokenizer, task, task.problems("test", 12)


def facts(row):
    """All of a row that must not depend on how often it was interrupted."""
    values = row.to_dict()
    for name in ("wall_seconds", "tps", "results", "hardware"):
        values.pop(name)
    return values


def test_rows_are_what_the_engine_and_the_task_give(parts, tmp_path):
    model, tokenizer, task, problems = parts
    rows = evaluate(model, tokenizer, task, problems, STATIC, output=tmp_path, name="teacher")
    assert [row.steps for row in rows] == [4, 2, 1]
    for row, config in zip(rows, STATIC, strict=True):
        plain = Engine(model, tokenizer).generate([task.prompt(p, tokenizer) for p in problems], config)
        stored = {t.prompt_id: t for t in read_trajectories(tmp_path / row.results)}
        assert [stored[p.id].response_ids for p in problems] == [t.response_ids for t in plain]
        assert [stored[p.id].correct for p in problems] == [
            task.verify(t.text, p) for t, p in zip(plain, problems, strict=True)
        ]
        assert row.num_problems == row.num_verified == 12
        assert row.accuracy == sum(t.correct for t in stored.values()) / 12
        assert row.tokps == 4 / row.steps
        assert row.tpf == sum(t.length for t in plain) / sum(t.nfe.denoise for t in plain)
        assert row.tpf_all == sum(t.length for t in plain) / sum(t.nfe.total for t in plain)
        assert row.mean_length == sum(t.length for t in plain) / 12
        assert row.truncated == sum(t.finish_reason == "length" for t in plain) / 12
        assert row.tps == pytest.approx(sum(t.length for t in plain) / row.wall_seconds)
        assert row.wall_seconds > 0
        assert "threads" in row.hardware
        assert row.batch_size == 64


def test_what_is_stored_is_not_decoded_again(parts, tmp_path, monkeypatch):
    model, tokenizer, task, problems = parts
    engine, asked = Engine(model, tokenizer, max_batch_size=3), []
    stream = engine.stream

    def counting(prompts, *args, **kwargs):
        asked.append(len(prompts))
        return stream(prompts, *args, **kwargs)

    monkeypatch.setattr(engine, "stream", counting)
    config = [DecodingConfig(steps=2, max_tokens=12, temperature=1.0, seed=5)]
    whole = evaluate(model, tokenizer, task, problems, config, output=tmp_path / "whole", engine=engine)
    first = evaluate(model, tokenizer, task, problems[4:9], config, output=tmp_path / "parts", engine=engine)
    more = evaluate(model, tokenizer, task, problems, config, output=tmp_path / "parts", engine=engine)
    again = evaluate(model, tokenizer, task, problems, config, output=tmp_path / "parts", engine=engine)
    fewer = evaluate(model, tokenizer, task, problems[4:9], config, output=tmp_path / "parts", engine=engine)
    assert asked == [12, 5, 7, 0, 0]
    assert facts(more[0]) == facts(whole[0]) == facts(again[0])  # sampled, and yet the same
    assert again == more
    assert facts(fewer[0]) == facts(first[0])
    assert fewer[0].wall_seconds == first[0].wall_seconds


def test_several_samples_extend_what_is_there(parts, tmp_path):
    model, tokenizer, task, problems = parts
    config = DecodingConfig(steps=1, max_tokens=8, temperature=1.0)
    evaluate(model, tokenizer, task, problems[:3], [config], output=tmp_path)
    row = evaluate(model, tokenizer, task, problems[:3], [replace(config, n=4)], output=tmp_path)[0]
    stored = list(read_trajectories(tmp_path / row.results))
    assert [(t.prompt_id, t.sample) for t in stored] == [(p.id, s) for p in problems[:3] for s in range(4)]
    assert len({tuple(t.response_ids) for t in stored}) > 3
    assert row.samples == 4
    assert row.num_problems == 3
    assert set(row.pass_at) == {"1", "2", "4"}
    assert row.pass_at["1"] == pytest.approx(row.accuracy)


def test_killed_and_continued_gives_the_same(parts, tmp_path):
    """The process dies when the verifier sees its sixth answer."""
    script = (
        "import functools, os, sys; sys.path[:0] = sys.argv[2].split(',')\n"
        "from tests.conftest import make_model\n"
        "from t3d import DecodingConfig, Engine\n"
        "from t3d.evaluation import evaluate\n"
        "from t3d.tasks import TaskConfig, get_task\n"
        "from t3d.tasks.word_problems import build_tokenizer\n"
        "import t3d.evaluation.runner as runner\n"
        "class Writer(runner.TrajectoryWriter):\n"
        "    def __init__(self, *args, **kwargs): super().__init__(*args, **kwargs, shard_size=2)\n"
        "runner.TrajectoryWriter = Writer\n"
        "runner.store_answers = functools.partial(runner.store_answers, together=1)\n"
        "tokenizer, task = build_tokenizer(), get_task(TaskConfig(name='word_problems'))\n"
        "model = make_model(vocab_size=len(tokenizer) + 1, eos_token_id=tokenizer.eos_token_id)\n"
        "judge, seen = task.judge_all, []\n"
        "def dying(*args):\n"
        "    seen.append(1)\n"
        "    if len(seen) == 6: os.kill(os.getpid(), 9)\n"
        "    return judge(*args)\n"
        "task.judge_all = dying\n"
        "evaluate(model, tokenizer, task, task.problems('test', 12), [DecodingConfig(steps=2, max_tokens=12)],\n"
        "         output=sys.argv[1], engine=Engine(model, tokenizer, max_batch_size=2))\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "killed"), str(Path(__file__).parents[2])]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL, done.stderr
    model, tokenizer, task, problems = parts
    folder = tmp_path / "killed" / "model" / "block4-low_confidence_static-steps2-seed0"
    assert len(TrajectoryDataset(folder)) == 4
    engine = Engine(model, tokenizer, max_batch_size=2)
    rows = [
        evaluate(model, tokenizer, task, problems, STATIC[1:2], output=tmp_path / name, engine=engine)[0]
        for name in ("killed", "whole")
    ]
    assert facts(rows[0]) == facts(rows[1])
    whole = read_trajectories(tmp_path / "whole" / rows[1].results)
    for a, b in zip(read_trajectories(folder), whole, strict=True):
        assert replace(a, extra={}, confidence=[]) == replace(b, extra={}, confidence=[])
        assert a.confidence == pytest.approx(b.confidence, abs=1e-5)  # the last bits depend on the batch


def test_answers_reach_the_disk_however_few_there_are(parts, tmp_path, monkeypatch):
    """When it is time, what is finished is saved, although fewer are there than are judged together."""
    model, tokenizer, _, problems = parts
    task = get_task(TaskConfig(name="word_problems"))
    judge, saved = task.judge_all, []

    def watching(texts, asked):
        saved.extend(sum(pq.read_metadata(p).num_rows for p in tmp_path.rglob("*.parquet")) for _ in texts)
        return judge(texts, asked)

    monkeypatch.setattr(task, "judge_all", watching)
    monkeypatch.setattr(runner, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(t3d.answers, "GROUP_SECONDS", 0.0)
    engine = Engine(model, tokenizer, max_batch_size=1)
    evaluate(model, tokenizer, task, problems, STATIC[:1], output=tmp_path, engine=engine)
    assert saved == list(range(12))


def test_results_of_another_model_task_or_prompt_are_refused(parts, tmp_path):
    model, tokenizer, task, problems = parts
    evaluate(model, tokenizer, task, problems[:2], STATIC[:1], output=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.parquet")}
    other = make_model(vocab_size=len(tokenizer) + 1, seed=1, eos_token_id=tokenizer.eos_token_id)
    with pytest.raises(T3DError, match="model_fingerprint"):
        evaluate(other, tokenizer, task, problems[:2], STATIC[:1], output=tmp_path)
    asked = get_task(TaskConfig(name="word_problems", template="Well: {question}"))
    with pytest.raises(T3DError, match="another prompt for problem"):
        evaluate(model, tokenizer, asked, problems[:2], STATIC[:1], output=tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.parquet")}


def test_bad_input_is_one_line(parts):
    model, tokenizer, task, problems = parts
    with pytest.raises(T3DError, match="nothing to evaluate"):
        evaluate(model, tokenizer, task, [], STATIC)
    with pytest.raises(T3DError, match="1 problems share an id with another"):
        evaluate(model, tokenizer, task, [problems[0], Problem(problems[0].id, "q", "1")], STATIC)
    with pytest.raises(T3DError, match="needs the model's tokenizer"):
        evaluate(model, None, task, problems, STATIC)
    with pytest.raises(T3DError, match="steps = 9 is more than block_size = 4"):
        evaluate(model, tokenizer, task, problems, [DecodingConfig(steps=9)])


def test_without_output_nothing_is_kept(parts, tmp_path, monkeypatch):
    model, tokenizer, task, problems = parts
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    row = evaluate(model, tokenizer, task, problems[:2], STATIC[:1])[0]
    assert row.num_problems == 2
    assert row.results == ""
    assert not list(tmp_path.iterdir())


def test_grid_of_settings():
    assert [c.steps for c in EvalConfig().settings(3)] == [4, 2, 1]
    assert {c.seed for c in EvalConfig().settings(3)} == {3}
    grid = [{"steps": [2, 1]}, {"strategy": "low_confidence_dynamic", "threshold": [0.8, 0.9], "depth": 2}]
    found = EvalConfig(grid=grid, seeds=[1, 2], samples=3).settings(0)
    assert len(found) == len(set(found)) == 2 * (2 + 2)
    assert {c.n for c in found} == {3}
    assert len(EvalConfig(grid=[{"steps": [2, 2]}]).settings(0)) == 1
    names = ["entropy_bounded_eb", "random"]
    bounds = EvalConfig(grid=[{"strategy": names, "entropy_bound": [0.1, 0.2], "steps": 2}]).settings(0)
    assert [(c.strategy, c.entropy_bound) for c in bounds] == [(n, b) for n in names for b in (0.1, 0.2)]


def test_whatever_can_be_rolled_out_can_be_evaluated():
    item = {
        "confidence": "sampling",
        "stop": ["END", "."],
        "stop_ids": [[1, 2], [3]],
        "ignore_eos": True,
        "flight": "look_ahead",
        "depth": [1, 2],
        "temperature": 0.5,
    }
    found = EvalConfig(grid=[item], temperature=[0.0, 1.0]).settings(0)
    assert [(c.stop_ids, c.depth) for c in found] == [((1, 2), 1), ((1, 2), 2), ((3,), 1), ((3,), 2)]
    assert {(c.confidence, c.stop, c.ignore_eos, c.temperature) for c in found} == {
        ("sampling", ("END", "."), True, 0.5)
    }


def test_what_a_policy_does_not_look_at_does_not_distinguish_settings():
    def canonical(**settings):
        return DecodingConfig(**settings).at(4).canonical()

    assert canonical(steps=2) == canonical(steps=2, threshold=0.1, risk=3.0, floor="schedule", depth=3, enter=0.7)
    dynamic = {"strategy": "low_confidence_dynamic"}
    assert canonical(steps=2, **dynamic) == canonical(**dynamic)
    assert canonical(steps=2, floor="schedule", **dynamic).steps == 2
    assert canonical(flight="look_ahead", depth=3).depth == 3
    every = [
        {"strategy": sorted(POLICIES)},
        {"flight": "look_ahead", "depth": [1, 2]},
        {"blocks_in_flight": [2, 4], "enter": [0.1, 0.5]},
        {"window": 2, "stop": [["a"], ["b"]]},
        {"guidance_scale": [0.5, 1.0], "confidence": "sampling"},
        {"strategy": "low_confidence_dynamic", "block_size": 8},
    ]
    found = [c.at(4).canonical() for c in EvalConfig(grid=every).settings(0)]
    assert len({setting_name(c) for c in found}) == len(set(found)) == len(POLICIES) + 2 + 4 + 2 + 2 + 1
    shown = [setting(summarise([], c, "model", 4).to_dict()) for c in found]
    assert shown[-1] == "dynamic 0.9, block size 8"
    assert len(set(shown)) == len(found), "rows must be told apart by their text"


def test_answers_of_a_version_with_fewer_settings_are_continued(parts, tmp_path):
    """What its settings lack was at its default; anything else is another decode, and refused."""
    model, tokenizer, task, problems = parts
    [row] = evaluate(model, tokenizer, task, problems[:2], STATIC[:1], output=tmp_path)
    [shard] = (tmp_path / row.results).glob("*.parquet")

    def rewrite(change):
        table = pq.read_table(shard)
        metadata = json.loads(table.schema.metadata[b"t3d"])
        change(metadata["decoding"])
        packed = table.schema.metadata | {b"t3d": json.dumps(metadata).encode()}
        pq.write_table(table.replace_schema_metadata(packed), shard, write_page_checksum=True)

    rewrite(lambda decoding: [decoding.pop(name) for name in ("window", "depth", "guidance_scale")])
    [more] = evaluate(model, tokenizer, task, problems[:3], STATIC[:1], output=tmp_path)
    assert (more.results, more.num_problems) == (row.results, 3)
    rewrite(lambda decoding: decoding.update(window=2))
    with pytest.raises(T3DError, match=r"decoding\.window"):
        evaluate(model, tokenizer, task, problems[:3], STATIC[:1], output=tmp_path)


def test_flights_have_rows_and_folders_of_their_own(parts, tmp_path):
    model, tokenizer, task, problems = parts
    grid = [{"steps": 2}, {"steps": 2, "flight": "look_ahead", "depth": 2}, {"steps": 2, "blocks_in_flight": 3}]
    found = EvalConfig(grid=grid, max_tokens=32).settings(0)
    rows = evaluate(model, tokenizer, task, problems[:3], found, output=tmp_path)
    assert [setting(row.to_dict()) for row in rows] == ["2 steps", "2 steps, look-ahead 2", "2 steps, 3 blocks"]
    assert len({row.results for row in rows}) == 3
    assert rows[0].accuracy == rows[1].accuracy
    assert rows[0].tpf <= rows[1].tpf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": [{"strategy": ["low_confidence_statik"]}]}, "did you mean 'low_confidence_static'"),
        ({"grid": [{"steps": []}]}, "steps is an empty list"),
        ({"grid": []}, "grid is an empty list"),
        ({"grid": [{"steps": 2}, {"n": 2}]}, "item 2 of grid: n is for the whole grid, set eval.samples"),
        ({"grid": [{"stepz": 2}]}, "did you mean 'steps'"),
        ({"grid": [{"steps": [0]}]}, "steps must be at least 1"),
        ({"grid": [{"threshold": 1.5}]}, "threshold must lie in 0..1"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"split": "tset"}, "split is 'test', 'dev' or 'train', got 'tset'"),
    ],
)
def test_bad_grid(change, message):
    with pytest.raises(T3DError, match=message):
        EvalConfig(**change)


def some_rows():
    def trajectories(correct, n=4):
        return [
            make_trajectory(f"{i}", blocks=3, length=9, nfe=NFE(1, 6, 2), correct=i < correct, finish_reason="stop")
            for i in range(n)
        ]

    static = DecodingConfig(block_size=4, steps=2)
    dynamic = DecodingConfig(block_size=4, steps=4, strategy="low_confidence_dynamic", threshold=0.8)
    return [
        summarise(trajectories(4), static, "teacher"),
        summarise(trajectories(3), static, "student", objective="t3d"),
        summarise(trajectories(2), dynamic, "student", objective="t3d"),
        summarise([replace(t, correct=None) for t in trajectories(2)], static, "student", objective="t3d"),
    ]


def test_rows_by_hand():
    teacher, student, dynamic, unverified = some_rows()
    assert (teacher.accuracy, student.accuracy) == (1.0, 0.75)
    assert student.ci95 == pytest.approx((0.3006, 0.9544), abs=1e-4)
    assert (student.tpf, student.tpf_all, student.nfe, student.nfe_commit) == (1.5, 1.0, 9.0, 2.0)
    assert (student.knobs, student.tokps, student.tps) == ({}, 2.0, None)
    assert (dynamic.knobs, dynamic.tokps) == ({"threshold": 0.8, "floor": "one"}, None)
    assert (unverified.accuracy, unverified.ci95, unverified.num_verified) == (None, None, 0)


def test_summary_has_the_schema_and_is_read_back(tmp_path):
    rows = some_rows()
    path = tmp_path / "run" / "summary.json"
    written = write_summary(
        path, task="word_problems", seed=3, versions={"t3d": "0"}, wall_seconds={"eval": 2.5}, rows=rows
    )
    assert json.loads(path.read_text()) == json.loads(json.dumps(written)) == read_summary(path)
    assert written["wall_seconds"] == {"rollout": 0.0, "train": 0.0, "eval": 2.5, "total": 0.0}
    assert written["num_problems"] == 4
    keys = "model objective block_size steps strategy temperature accuracy ci95 tokps tpf tps nfe mean_length truncated"
    assert all(set(keys.split()) <= row.keys() for row in written["rows"])
    assert written["aup"] == pytest.approx({"teacher": 150.0, "student": 112.5, "student, dynamic": 75.0})
    assert not list(path.parent.glob(".*"))


@pytest.mark.parametrize("content", ["{", "[]", '{"rows": 3}'])
def test_a_foreign_summary_is_named(tmp_path, content):
    path = tmp_path / "summary.json"
    path.write_text(content)
    with pytest.raises(T3DError, match=r"summary.json is not"):
        read_summary(path)
    with pytest.raises(T3DError, match="run `t3d eval` first"):
        read_summary(tmp_path / "missing.json")


def test_tables_fit_and_have_what_only_some_evaluations_have():
    rows = [replace(row, pass_at={"1": 0.5, "2": 0.75}, majority=0.25, extra={"bleu": 12.345}) for row in some_rows()]
    rows[1] = replace(rows[1], extra={"bleu": 20.0}, majority=0.5)

    def printed(width, rows):
        console = rich.console.Console(width=width, record=True, file=io.StringIO())
        print_table(rows, console)
        return console.export_text()

    assert printed(80, some_rows()).count("accuracy %") == 1
    assert max(map(len, printed(80, some_rows()).splitlines())) <= 80
    text = printed(160, rows)
    assert "12.35" in text
    assert "majority %" in text
    assert "pass@2 % 75.0" in text  # the same in all rows: said once, below
    assert "pass@2 % | majority % | bleu |" in markdown([row.to_dict() for row in rows])


def test_table_shows_every_row():
    console = rich.console.Console(width=160, record=True, file=io.StringIO())
    console.print(table(some_rows(), "results"))
    text = console.export_text()
    assert "dynamic 0.8" in text
    assert "75.0" in text
    assert "30.1–95.4" in text
    assert text.count("student") == 3
