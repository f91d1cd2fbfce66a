"""Reading records (dicts) from a local JSONL, JSON or Parquet file; whatever is wrong with it is one line."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from t3d.errors import T3DError


def read_records(path: str | Path) -> Iterator[tuple[str, dict]]:
    """The records of a file with where each one is ("line 3", "record 3"), one after the other.

    Parquet, a JSON array and JSON lines are told apart by content, gzip too; the file's name does not matter.
    """
    path = Path(path)
    if not path.exists():
        raise T3DError(f"{path} does not exist")
    if path.is_dir():
        raise T3DError(f"{path} is a folder; give a JSONL, JSON or Parquet file")
    count = 0
    try:
        for count, (where, record) in enumerate(_any(path), start=1):  # noqa: B007
            if not isinstance(record, dict):
                raise T3DError(f"{path}, {where}: expected an object with fields, got {type(record).__name__}")
            yield where, record
    except OSError as error:  # also gzip's BadGzipFile
        raise T3DError(f"cannot read {path}: {error.strerror or error}") from error
    except (EOFError, zlib.error) as error:
        raise T3DError(f"{path} is a damaged gzip file ({error})") from error
    except UnicodeDecodeError as error:
        raise T3DError(f"{path} is not UTF-8 text, nor Parquet or gzip ({error.reason})") from error
    if not count:
        raise T3DError(f"{path} holds no records")


def _any(path: Path) -> Iterator[tuple[str, object]]:
    with open(path, "rb") as raw:
        magic = raw.read(4)
        raw.seek(0)
        if magic == b"PAR1":
            yield from _parquet(path)
            return
        stream = gzip.GzipFile(fileobj=raw) if magic[:2] == b"\x1f\x8b" else raw
        with io.TextIOWrapper(stream, encoding="utf-8-sig") as text:
            yield from _json(path, text)


def _json(path: Path, text: io.TextIOWrapper) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(text, start=1):  # not splitlines(): that also cuts at U+2028 and others
        if not line.strip():
            continue
        if number == 1 and line.lstrip().startswith("["):
            yield from _array(path, line + text.read())
            return
        try:
            yield f"line {number}", json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise T3DError(f"{path}, line {number}: not JSON ({error})") from error


def _array(path: Path, text: str) -> Iterator[tuple[str, object]]:
    try:
        records = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise T3DError(f"{path}: not a JSON array ({error})") from error
    yield from ((f"record {number}", record) for number, record in enumerate(records, start=1))


def _parquet(path: Path) -> Iterator[tuple[str, object]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        number = 0
        for batch in pq.ParquetFile(path).iter_batches(batch_size=1024):
            for record in batch.to_pylist():
                number += 1
                yield f"record {number}", record
    except pa.ArrowException as error:
        raise T3DError(f"{path} is a damaged Parquet file ({str(error).splitlines()[0]})") from error
