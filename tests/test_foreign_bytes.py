"""Inputs that benchmarks/fuzz.py found, or such as it tries: each is refused with one line."""

import json
import sys
import time
from pathlib import Path

import pytest

import t3d
from t3d import chat_template
from t3d.config import load_recipe
from t3d.errors import T3DError
from t3d.models.convert import convert
from t3d.models.files import check_weights, read_json
from t3d.models.load import load_model, load_tokenizer, plain_config
from t3d.tasks.records import read_records
from t3d.trajectories.schema import open_shard


def refused(act) -> str:
    with pytest.raises(T3DError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("text", ['{"a": %s}' % ("1" * 5000), "[%s]" % ("1" * 5000), "[" * 100_000, '{"a":' * 100_000])
def test_records(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    refused(lambda: list(read_records(tmp_path / "a.json")))


def test_deep_configurations(tmp_path):
    (tmp_path / "config.json").write_text("[" * 100_000)
    assert "config.json" in refused(lambda: read_json(tmp_path / "config.json"))


@pytest.mark.parametrize("kind", [{"a": 1}, ["sdar"], 1, True])
def test_a_model_type_that_is_no_text(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    for read in (plain_config, load_model, lambda folder: convert(folder, tmp_path / "out")):
        assert "config.json: model_type must be a text" in refused(lambda read=read: read(tmp_path))


@pytest.mark.parametrize("name", [1, None, ["a"], "../other.safetensors", "/etc/passwd", ""])
def test_an_index_names_files_of_its_folder(tmp_path, name):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name, "b": "c"}}))
    assert "no file of this folder" in refused(lambda: check_weights(tmp_path))


def test_damaged_parquet(tmp_path):
    """The library says what is wrong in several lines."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.jsonl"
    pq.write_table(pa.table({"question": ["a", "b"]}), path)
    data = bytearray(path.read_bytes())
    data[8] = 0x17
    path.write_bytes(data)
    refused(lambda: list(read_records(path)))


def test_shards_with_damaged_metadata(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from t3d.trajectories.schema import SCHEMA

    path = tmp_path / "a.parquet"
    for version, metadata in ((b"3", b"{"), (b"3", b"\xff"), (b"\xff", b"{}")):
        schema = SCHEMA.with_metadata({b"t3d_format_version": version, b"t3d": metadata})
        pq.write_table(pa.Table.from_pylist([], schema=schema), path)
        refused(lambda: open_shard(path))


@pytest.mark.parametrize(
    "text",
    [
        "seed: 2020-99-99",
        "seed: !!python/object/apply:os.getpid []",
        "run_dir: ${oc.file:/etc/passwd}",
        "run_dir: ${x:y}",
    ],
)
def test_recipes_run_no_code_and_read_no_file(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    refused(lambda: load_recipe(tmp_path / "a.yaml"))


@pytest.mark.parametrize("text", ["a: " + "[" * 20_000, "[" * 90_000, "- " * 40_000, "? " * 40_000, "a: 1\n" * 30_000])
def test_recipes_that_would_take_long_are_refused_at_once(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    start = time.process_time()
    assert "is not a recipe" in refused(lambda: load_recipe(tmp_path / "a.yaml"))
    assert time.process_time() - start < 2  # the first took 10 seconds


LOOP = "{% for i in range(100000) %}"
TEMPLATES = {
    "{% for i in range(999999999) %}{% endfor %}": "Range too big",
    LOOP * 3 + "{% endfor %}" * 3: "it takes more than 0.2 s",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "recursion",
    "{{ 1 / 0 }}": "division by zero",
    "{{ ": "unexpected",
    "{% include '/etc/passwd' %}": "no loader",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_templates_end(monkeypatch, template):
    tokenizer = load_tokenizer(Path(t3d.__file__).parent / "assets" / "teacher")
    monkeypatch.setattr(chat_template, "SECONDS", 0.2)
    tokenizer.chat_template = template
    before = sys.gettrace()
    assert TEMPLATES[template] in refused(lambda: chat_template.render(tokenizer, [{"role": "user", "content": "a"}]))
    assert sys.gettrace() is before


def test_recipes_may_read_environment_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("T3D_TEST_FOLDER", "there")
    (tmp_path / "a.yaml").write_text("run_dir: ${oc.env:T3D_TEST_FOLDER}/a")
    assert load_recipe(tmp_path / "a.yaml").run_dir == "there/a"
