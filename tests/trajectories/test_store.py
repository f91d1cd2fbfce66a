import os
import pickle
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t3d import T3DError
from t3d.trajectories import (
    NFE,
    Trajectory,
    TrajectoryDataset,
    TrajectoryWriter,
    read_metadata,
    read_trajectories,
    validate,
)
from tests.trajectory_examples import make_trajectory

METADATA = {
    "model": "tiny",
    "decoding": {"steps": 4, "stop_ids": (1, 2)},
    "seed": 0,
    "versions": {"t3d": "1"},
}


def write(folder, trajectories, metadata=METADATA, **options):
    with TrajectoryWriter(folder, metadata, **options) as writer:
        for trajectory in trajectories:
            writer.write(trajectory)


@st.composite
def trajectories(draw):
    block = draw(st.integers(1, 8))
    prompt = draw(st.lists(st.integers(0, 151_935), max_size=12))
    n = -len(prompt) % block + block * draw(st.integers(1, 3))

    def row(elements):
        return draw(st.lists(elements, min_size=n, max_size=n))

    text = st.none() | st.text(st.characters(exclude_categories=["Cs"]))
    return Trajectory(
        prompt_ids=prompt,
        response_ids=row(st.integers(0, 151_935)),
        step_map=row(st.integers(0, block - 1)),
        confidence=row(st.floats(0, 1, width=32)),
        length=draw(st.integers(1, n)),
        finish_reason=draw(st.sampled_from(["stop", "length"])),
        nfe=NFE(*draw(st.tuples(*[st.integers(0, 2**31 - 1)] * 4))),
        block_size=block,
        seed=draw(st.integers(-(2**63), 2**63 - 1)),
        prompt_id=draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=8)),
        sample=draw(st.integers(0, 9)),
        text=draw(text),
        question=draw(text),
        answer=draw(text),
        correct=draw(st.none() | st.booleans()),
        extra=draw(st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3), max_size=2)),
    )


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(trajectories(), min_size=1, max_size=5, unique_by=lambda t: (t.prompt_id, t.sample)))
def test_what_is_written_is_read_back(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("store")
    write(folder, rows, shard_size=2)
    read = list(read_trajectories(folder))
    assert sorted(read, key=lambda t: (t.prompt_id, t.sample)) == sorted(rows, key=lambda t: (t.prompt_id, t.sample))


def test_order_does_not_depend_on_order_of_writing_or_on_shards(tmp_path):
    rows = [make_trajectory(f"gsm8k-{i}", sample) for i in range(30) for sample in range(2)]
    write(tmp_path / "once", rows)
    shuffled = random.Random(1).sample(rows, len(rows))
    for start in range(0, len(rows), 13):
        write(tmp_path / "pieces", shuffled[start : start + 13], shard_size=5)
    once, pieces = TrajectoryDataset(tmp_path / "once"), TrajectoryDataset(tmp_path / "pieces")
    assert len(pieces.paths) > 10
    assert list(once) == list(pieces) == rows  # numbers in ids by value: 2 before 10


def test_dataset_random_access_select_column_and_pickle(tmp_path):
    rows = [make_trajectory(f"{i:04d}", correct=i % 3 == 0) for i in range(200)]
    write(tmp_path, rows, shard_size=70)
    dataset = TrajectoryDataset(tmp_path)
    assert len(dataset) == 200
    assert dataset[137] == rows[137]
    assert dataset[-1] == rows[-1]
    with pytest.raises(IndexError):
        dataset[200]
    assert dataset.column("correct") == [t.correct for t in rows]
    correct = dataset.select([c is True for c in dataset.column("correct")])
    assert list(correct) == rows[::3]
    assert correct.column("prompt_id") == [t.prompt_id for t in rows[::3]]
    assert list(pickle.loads(pickle.dumps(correct))) == rows[::3]
    assert list(dataset.select([5, 2, 5])) == [rows[5], rows[2], rows[5]]
    assert list(dataset[3:9:2]) == rows[3:9:2]


def test_the_cache_of_row_groups_is_bounded(tmp_path, monkeypatch):
    write(tmp_path, [make_trajectory(f"{i:04d}") for i in range(400)])
    dataset = TrajectoryDataset(tmp_path)
    one = dataset._group(0, 0).nbytes
    monkeypatch.setattr("t3d.trajectories.dataset.CACHE_BYTES", 2 * one)
    assert [t.prompt_id for t in dataset] == [f"{i:04d}" for i in range(400)]
    assert len(dataset._cache) <= 3
    assert dataset._cached_bytes == sum(table.nbytes for table in dataset._cache.values())


def test_more_shards_than_files_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr("t3d.trajectories.dataset.OPEN_FILES", 3)
    monkeypatch.setattr("t3d.trajectories.dataset.CACHE_BYTES", 0)
    rows = [make_trajectory(f"{i}") for i in range(8)]
    write(tmp_path, rows, shard_size=1)
    dataset = TrajectoryDataset(tmp_path)
    for i in [0, 7, 3, 0, 5, 1, 6, 7, 2, 4, 0]:
        assert dataset[i] == rows[i]
    assert dataset.column("seed") == [t.seed for t in rows]
    assert len(dataset._files) == 3


def test_a_folder_is_continued_and_its_shards_left_alone(tmp_path):
    write(tmp_path, [make_trajectory("a"), make_trajectory("b")])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with TrajectoryWriter(tmp_path, METADATA) as writer:
        assert writer.done() == {("a", 0), ("b", 0)}
        writer.write(make_trajectory("b", seed=7))  # there already: the first stays
        writer.write(make_trajectory("b", 1))
        assert ("b", 1) in writer.done()
    assert all(path.read_bytes() == content for path, content in before.items())
    assert list(read_trajectories(tmp_path)) == [make_trajectory("a"), make_trajectory("b"), make_trajectory("b", 1)]


def test_of_two_rows_with_one_key_the_older_shard_wins(tmp_path):
    write(tmp_path / "x", [make_trajectory("a", seed=1)])
    write(tmp_path / "y", [make_trajectory("a", seed=2), make_trajectory("b")])
    (tmp_path / "y" / "shard-00000.parquet").rename(tmp_path / "x" / "shard-00001.parquet")
    assert list(read_trajectories(tmp_path / "x")) == [make_trajectory("a", seed=1), make_trajectory("b")]


def test_both_triggers_flush(tmp_path):
    with TrajectoryWriter(tmp_path / "rows", METADATA, shard_size=2, flush_seconds=1e9) as writer:
        writer.write(make_trajectory("a"))
        assert not list((tmp_path / "rows").iterdir())
        writer.write(make_trajectory("b"))
        assert len(list(read_trajectories(tmp_path / "rows"))) == 2
    with TrajectoryWriter(tmp_path / "seconds", METADATA, flush_seconds=0) as writer:
        writer.write(make_trajectory("a"))
        assert len(list(read_trajectories(tmp_path / "seconds"))) == 1


@pytest.mark.parametrize("exception", [KeyboardInterrupt, ValueError])
def test_an_interrupted_writer_keeps_what_was_finished(tmp_path, exception):
    def finished_one_then_stopped():
        yield make_trajectory("a")
        raise exception

    with pytest.raises(exception):
        write(tmp_path, finished_one_then_stopped())
    assert [t.prompt_id for t in read_trajectories(tmp_path)] == ["a"]


def test_a_killed_writer_leaves_whole_shards_and_temporary_files_at_most(tmp_path):
    script = (
        "import os, sys, itertools; sys.path.insert(0, sys.argv[2])\n"
        "from tests.trajectory_examples import make_trajectory\n"
        "from t3d.trajectories import TrajectoryWriter\n"
        f"with TrajectoryWriter(sys.argv[1], {METADATA}, shard_size=20) as writer:\n"
        "    for i in itertools.count():\n"
        "        writer.write(make_trajectory(f'p{i}'))\n"
        "        if i == 50: print('go', flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path, Path(__file__).parents[2]], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "go\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    (tmp_path / ".shard-00099.parquet.tmp").write_bytes(b"half a shard")
    read = list(read_trajectories(tmp_path))
    assert len(read) >= 40
    assert read == [make_trajectory(f"p{i}") for i in range(len(read))]
    with TrajectoryWriter(tmp_path, METADATA) as writer:
        assert len(writer.done()) == len(read)
    assert not list(tmp_path.glob(".*"))


def test_no_room_is_a_clear_error_and_loses_nothing(tmp_path):
    """A real limit on the size of files, in a process of its own."""
    script = (
        "import resource, sys; sys.path.insert(0, sys.argv[2])\n"
        "from tests.trajectory_examples import make_trajectory\n"
        "from t3d import T3DError\n"
        "from t3d.trajectories import TrajectoryWriter\n"
        f"writer = TrajectoryWriter(sys.argv[1], {METADATA})\n"
        "writer.write(make_trajectory('a')); writer.flush()\n"
        "writer.write(make_trajectory('b'))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))\n"
        "try: writer.flush()\n"
        "except T3DError as error: print(error)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)\n"
        "print(sorted(p.name for p in writer.folder.iterdir()))\n"
        "writer.close()\n"
    )
    command = [sys.executable, "-c", script, tmp_path, Path(__file__).parents[2]]
    done = subprocess.run(command, capture_output=True, text=True)
    message, names = done.stdout.splitlines()
    assert message.startswith(f"cannot write {tmp_path}/shard-00001.parquet: File too large")
    assert names == "['shard-00000.parquet']"
    assert done.returncode == 0, done.stderr
    assert [t.prompt_id for t in read_trajectories(tmp_path)] == ["a", "b"]


def test_one_writer_at_a_time(tmp_path):
    with TrajectoryWriter(tmp_path, METADATA), pytest.raises(T3DError, match="in use by another writer"):
        TrajectoryWriter(tmp_path, METADATA)
    TrajectoryWriter(tmp_path, METADATA).close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed = 0, not 1"),
        ({"decoding": {"steps": 2, "stop_ids": [1, 2]}}, "decoding.steps = 4, not 2"),
        ({"tokenizer": "abc"}, "tokenizer = None, not 'abc'"),
    ],
)
def test_other_metadata_is_an_error_that_names_the_key(tmp_path, change, message):
    write(tmp_path, [make_trajectory()])
    with pytest.raises(T3DError, match=message):
        TrajectoryWriter(tmp_path, METADATA | change)
    TrajectoryWriter(tmp_path, METADATA | {"versions": {"t3d": "2"}}).close()
    assert read_metadata(tmp_path)["decoding"] == {"steps": 4, "stop_ids": [1, 2]}


def test_shards_of_different_settings_do_not_mix(tmp_path):
    write(tmp_path / "x", [make_trajectory("a")])
    write(tmp_path / "y", [make_trajectory("b")], METADATA | {"model": "other"})
    (tmp_path / "y" / "shard-00000.parquet").rename(tmp_path / "x" / "shard-00001.parquet")
    with pytest.raises(T3DError, match=r"shard-00001.parquet was made with a different model from shard-00000"):
        TrajectoryDataset(tmp_path / "x")


def damage_truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def damage_text(path):
    path.write_text("not parquet")


def damage_empty(path):
    path.write_bytes(b"")


def damage_foreign(path):
    pq.write_table(pa.table({"x": [1]}), path)


def _with_metadata(path, change):
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata(change(table.schema.metadata)), path)


def damage_version(path):
    _with_metadata(path, lambda metadata: metadata | {b"t3d_format_version": b"99"})


def damage_column(path):
    table = pq.read_table(path)
    pq.write_table(table.drop_columns("step_map"), path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncate, "cannot read"),
        (damage_text, "cannot read"),
        (damage_empty, "cannot read"),
        (damage_foreign, "is Parquet, but not a file of t3d"),
        (damage_version, "format version 99"),
        (damage_column, "column 'step_map' should be"),
    ],
)
def test_a_damaged_or_foreign_file_is_named(tmp_path, damage, message):
    write(tmp_path, [make_trajectory()])
    path = tmp_path / "shard-00000.parquet"
    damage(path)
    attempts = [TrajectoryDataset, read_metadata, read_trajectories, lambda f: TrajectoryWriter(f, METADATA)]
    for attempt in attempts:
        with pytest.raises(T3DError, match=message) as caught:
            attempt(tmp_path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_flipped_bit_is_found(tmp_path):
    write(tmp_path, [make_trajectory(f"{i}") for i in range(50)])
    path = tmp_path / "shard-00000.parquet"
    column = pq.ParquetFile(path).metadata.row_group(0).column(3)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(T3DError, match="cannot read"):
        list(read_trajectories(tmp_path))


def test_missing_empty_and_unwritable_folders(tmp_path):
    for read in (TrajectoryDataset, read_metadata):
        with pytest.raises(T3DError, match="no trajectories in"):
            read(tmp_path / "missing")
        with pytest.raises(T3DError, match="no trajectories in"):
            read(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(T3DError, match="cannot use"):
        TrajectoryWriter(tmp_path / "file" / "folder", METADATA)


def test_datasets_opens_it(tmp_path):
    os.environ["HF_HUB_OFFLINE"] = "1"
    datasets = pytest.importorskip("datasets")
    rows = [make_trajectory(f"{i}") for i in range(5)]
    write(tmp_path / "store", rows, shard_size=2)
    files = sorted(map(str, (tmp_path / "store").glob("*.parquet")))
    table = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert table["response_ids"][:] == [t.response_ids for t in rows]
    assert table["correct"][:] == [t.correct for t in rows]
    assert table.features["step_map"].feature.dtype == "int16"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step_map": [0]}, "differ in length"),
        ({"block_size": 5}, "not a multiple of block_size 5"),
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"length": 0}, "length must lie in 1..11"),
        ({"length": 12}, "length must lie in 1..11"),
        ({"finish_reason": "eos"}, "finish_reason"),
        ({"step_map": [4] * 11}, "steps count from 0"),
        ({"step_map": [-1] * 11}, "steps count from 0"),
        ({"response_ids": [-1] * 11}, "negative"),
        ({"confidence": [1.5] * 11}, "confidences"),
        ({"nfe": NFE(-1, 0, 0)}, "forwards"),
    ],
)
def test_validate_names_what_is_wrong(tmp_path, change, message):
    good = make_trajectory("p7", 2)
    assert validate(good) is good
    bad = replace(good, **change)
    with pytest.raises(T3DError, match=message) as caught:
        validate(bad)
    assert "'p7' (sample 2)" in str(caught.value)
    with TrajectoryWriter(tmp_path, METADATA) as writer, pytest.raises(T3DError):
        writer.write(bad)


def test_foreign_rows_are_checked_when_read(tmp_path):
    write(tmp_path, [make_trajectory()])
    path = tmp_path / "shard-00000.parquet"
    table = pq.read_table(path)
    index = table.schema.get_field_index("block_size")
    pq.write_table(table.set_column(index, table.schema.field(index), pa.array([3], pa.int32())), path)
    with pytest.raises(T3DError, match="not a multiple of block_size 3"):
        TrajectoryDataset(tmp_path)[0]


def test_a_file_of_format_1_is_read():
    """Written by a version that knew no revisions; it reads as it was, and version 2 adds to it what is new."""
    path = Path(__file__).parent / "data" / "format1.parquet"
    assert pq.read_schema(path).metadata[b"t3d_format_version"] == b"1"
    assert "revisions" not in pq.read_schema(path).names
    assert list(read_trajectories(path)) == [make_trajectory(f"p{i}") for i in range(3)]


def test_revisions_are_kept(tmp_path):
    """Where something was revised, steps may go beyond the block's size; null where nothing was."""
    plain, revised = make_trajectory("a", blocks=1, prompt=4), make_trajectory("b", blocks=1, prompt=4)
    revised = replace(revised, revisions=[0, 2, 0, 1], step_map=[0, 7, 1, 5])
    write(tmp_path, [plain, revised])
    assert list(read_trajectories(tmp_path)) == [plain, revised]
    for wrong, message in (
        ({"revisions": [0, 1]}, "revisions has 2 entries"),
        ({"revisions": [0, -1, 0, 0]}, "must not be negative"),
        ({"revisions": None}, "steps count from 0"),
    ):
        with pytest.raises(T3DError, match=message):
            validate(replace(revised, **wrong))


def test_version_1_had_neither_revisions_nor_forwards_that_verify(tmp_path):
    write(tmp_path / "now", [make_trajectory(nfe=NFE(1, 2, 3))])
    (shard,) = (tmp_path / "now").glob("*.parquet")
    table = pq.read_table(shard)
    old = table.drop_columns(["revisions", "nfe_verify"])
    old = old.replace_schema_metadata(table.schema.metadata | {b"t3d_format_version": b"1"})
    (tmp_path / "then").mkdir()
    pq.write_table(old, tmp_path / "then" / shard.name, write_page_checksum=True)
    (read,) = TrajectoryDataset(tmp_path / "then")
    assert read.nfe == NFE(prefill=1, denoise=2, commit=3, verify=0)
    assert read.revisions is None
