"""Inputs that benchmarks/fuzz.py found, or such as it tries: each is refused with one line."""

import json

import pytest

from t3d.config import load_recipe
from t3d.errors import T3DError
from t3d.models.files import check_weights, read_json
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


@pytest.mark.parametrize("name", [1, None, ["a"], "../other.safetensors", "/etc/passwd", ""])
def test_an_index_names_files_of_its_folder(tmp_path, name):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name, "b": "c"}}))
    assert "no file of this folder" in refused(lambda: check_weights(tmp_path))


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


def test_recipes_may_read_environment_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("T3D_TEST_FOLDER", "there")
    (tmp_path / "a.yaml").write_text("run_dir: ${oc.env:T3D_TEST_FOLDER}/a")
    assert load_recipe(tmp_path / "a.yaml").run_dir == "there/a"
