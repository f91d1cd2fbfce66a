"""The Parquet form of a trajectory: columns, metadata, opening a shard (see docs/trajectories.md)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from t3d.errors import T3DError
from t3d.trajectories.record import NFE, Trajectory, validate

FORMAT_VERSION = "3"
READABLE = ("1", "2", FORMAT_VERSION)
SINCE = {"revisions": "2", "nfe_verify": "2", "anchored": "3", "canvas": "3"}  # what version 1 did not have
VERSION_KEY, METADATA_KEY = b"t3d_format_version", b"t3d"
UNCOMPARED = {"versions"}  # recorded with each shard, free to differ between them

SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("sample", pa.int32(), nullable=False),
        pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("response_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("step_map", pa.list_(pa.int16()), nullable=False),
        pa.field("confidence", pa.list_(pa.float32()), nullable=False),
        pa.field("revisions", pa.list_(pa.int16())),  # null: nothing was revised
        pa.field("length", pa.int32(), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("nfe_prefill", pa.int32(), nullable=False),
        pa.field("nfe_denoise", pa.int32(), nullable=False),
        pa.field("nfe_commit", pa.int32(), nullable=False),
        pa.field("nfe_verify", pa.int32(), nullable=False),
        pa.field("block_size", pa.int32(), nullable=False),
        pa.field("anchored", pa.bool_(), nullable=False),
        pa.field("canvas", pa.int32(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("text", pa.string()),
        pa.field("question", pa.string()),
        pa.field("answer", pa.string()),
        pa.field("correct", pa.bool_()),
        pa.field("extra", pa.string()),  # a JSON object, null when empty
    ]
)
_LISTS = {"prompt_ids": np.int32, "response_ids": np.int32, "step_map": np.int16, "confidence": np.float32}
_OPTIONAL = ("extra", "revisions")
_NFE = ("prefill", "denoise", "commit", "verify")
_PLAIN = [name for name in SCHEMA.names if not (name in _LISTS or name.startswith("nfe_") or name in _OPTIONAL)]


def to_table(trajectories: list[Trajectory], metadata: dict) -> pa.Table:
    """One row per trajectory, with `metadata` in the schema."""
    columns = {name: [getattr(t, name) for t in trajectories] for name in _PLAIN}
    for name, dtype in _LISTS.items():
        columns[name] = [np.asarray(getattr(t, name), dtype) for t in trajectories]
    columns["revisions"] = [None if t.revisions is None else np.asarray(t.revisions, np.int16) for t in trajectories]
    for kind in _NFE:
        columns[f"nfe_{kind}"] = [getattr(t.nfe, kind) for t in trajectories]
    columns["extra"] = [json.dumps(t.extra) if t.extra else None for t in trajectories]
    arrays = [pa.array(columns[field.name], field.type) for field in SCHEMA]
    packed = {VERSION_KEY: FORMAT_VERSION, METADATA_KEY: json.dumps(metadata)}
    return pa.Table.from_arrays(arrays, schema=SCHEMA.with_metadata(packed))


def to_trajectory(table: pa.Table, row: int) -> Trajectory:
    """Row `row` of a table in this schema, checked."""
    values = {name: table.column(name)[row].as_py() for name in _PLAIN if name in table.column_names}
    lists = {name: table.column(name)[row].values.to_numpy(zero_copy_only=False).tolist() for name in _LISTS}
    kinds = [kind for kind in _NFE if f"nfe_{kind}" in table.column_names]
    nfe = NFE(**{kind: table.column(f"nfe_{kind}")[row].as_py() for kind in kinds})
    extra = json.loads(table.column("extra")[row].as_py() or "{}")
    revisions = table.column("revisions")[row].as_py() if "revisions" in table.column_names else None
    return validate(Trajectory(**values, **lists, revisions=revisions, nfe=nfe, extra=extra))


def open_shard(path: Path) -> tuple[pq.ParquetFile, dict]:
    """The open file and its metadata.

    Raises:
        T3DError: if the file is truncated, not Parquet, not of ours, or of another format version.
    """
    try:
        file = pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)
        packed = file.schema_arrow.metadata or {}
    except (pa.ArrowException, OSError, ValueError) as error:  # the last: a name that is not UTF-8
        raise damaged(path, error) from error
    if VERSION_KEY not in packed or METADATA_KEY not in packed:
        raise T3DError(f"{path} is Parquet, but not a file of t3d; docs/trajectories.md gives the schema")
    version = packed[VERSION_KEY].decode(errors="replace")
    if version not in READABLE:
        raise T3DError(
            f"{path} has trajectory format version {version}, this t3d reads {FORMAT_VERSION}; "
            "use the t3d that wrote it, or write it again"
        )
    for field in SCHEMA:
        if version < SINCE.get(field.name, "1"):
            continue
        index = file.schema_arrow.get_field_index(field.name)
        found = None if index < 0 else file.schema_arrow.field(index).type
        if found is None or not (found == field.type or _same_list(found, field.type)):
            raise T3DError(f"{path}: column {field.name!r} should be {field.type}, found {found or 'none'}")
    try:
        metadata = json.loads(packed[METADATA_KEY])
    except (ValueError, RecursionError) as error:
        raise damaged(path, error) from error
    return file, metadata


def _same_list(a: pa.DataType, b: pa.DataType) -> bool:
    return pa.types.is_list(a) and pa.types.is_list(b) and a.value_type == b.value_type


def damaged(path: Path, error: Exception) -> T3DError:
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return T3DError(f"cannot read {path}: {first} (truncated or not Parquet? move it away and run again)")


def shards(path: Path | str) -> list[Path]:
    """The Parquet files of a folder in order of their names, or the one file that `path` is."""
    path = Path(path)
    if path.is_dir():
        return sorted(path.glob("*.parquet"))
    return [path] if path.is_file() else []


def difference(a: dict, b: dict, prefix: str = "") -> tuple[str, Any, Any] | None:
    """(dotted name, value in a, value in b) of the first key whose values differ, or None."""
    for key in sorted(a.keys() | b.keys()):
        if not prefix and key in UNCOMPARED:
            continue
        x, y = a.get(key), b.get(key)
        if isinstance(x, dict) and isinstance(y, dict):
            if inner := difference(x, y, f"{prefix}{key}."):
                return inner
        elif x != y:
            return f"{prefix}{key}", x, y
    return None
