"""Reading records (dicts) from a file (JSONL, JSON, CSV, TSV, Parquet) or a dataset; what is wrong is one line."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from t3d.errors import T3DError

_DELIMITERS = {"csv": ",", "tsv": "\t"}  # by the end of a file's name
_SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` of `datasets` leaves


def read_records(path: str | Path) -> Iterator[tuple[str, dict]]:
    """The records of a file with where each one is ("line 3", "record 3"), one after the other.

    Parquet, a JSON array and JSON lines are told apart by content, gzip too; CSV and TSV, whose first row names the
    fields, by the file's name (.csv, .tsv.gz, ...).
    """
    path = Path(path)
    if not path.exists():
        raise T3DError(f"{path} does not exist")
    if path.is_dir():
        raise T3DError(f"{path} is a folder; give a JSONL, JSON, CSV, TSV or Parquet file, or task.dataset={path}")
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
        delimiter = _DELIMITERS.get(path.name.lower().removesuffix(".gz").rpartition(".")[2])
        with io.TextIOWrapper(stream, encoding="utf-8-sig", newline=delimiter and "") as text:
            yield from _json(path, text) if delimiter is None else _table(path, text, delimiter)


def read_dataset(name: str, configuration: str | None, split: str) -> Iterator[tuple[str, dict]]:
    """The records of a split of a dataset: a hub id, a folder of data files, or what `save_to_disk` made.

    A saved dataset without splits is used whole, whatever the split.
    """
    from datasets import DatasetDict, load_dataset, load_from_disk

    place = "from the Hugging Face hub"
    hint = "check the network and HF_HUB_OFFLINE, or download it and set task.path=FILE"
    if Path(name).is_dir():
        place, hint = "from its folder", "its data files must be of one kind, and datasets must find the split in them"
    try:
        if any((Path(name) / saved).exists() for saved in _SAVED):
            records = load_from_disk(name)
            if isinstance(records, DatasetDict):
                if split not in records:
                    raise ValueError(f"its splits are {', '.join(records)}")
                records = records[split]
        else:
            records = load_dataset(name, configuration, split=split)
    except Exception as error:  # the library has dozens, from network, cache and parsing
        cause = str(error).strip().split("\n")[0]
        if "split" in cause:
            hint = "choose with task.dataset_train_split and task.dataset_test_split"
        raise T3DError(f"cannot load {name} ({split}) {place}: {cause[:200]}; {hint}") from error
    return ((f"record {number}", record) for number, record in enumerate(records, start=1))


def _table(path: Path, text: io.TextIOWrapper, delimiter: str) -> Iterator[tuple[str, dict]]:
    csv.field_size_limit(2**31 - 1)  # of the whole process; a prompt may be longer than the 128 KB of the default
    rows = csv.reader(text, delimiter=delimiter, strict=True)
    line = 1  # where the row begins: a quoted field may have several lines
    try:
        names = next(rows, [])
        if repeated := {name for name in names if names.count(name) > 1}:
            raise T3DError(f"{path}, line 1: two fields have the name {min(repeated)!r}")
        line = rows.line_num + 1
        for row in rows:
            if row and len(row) != len(names):
                raise T3DError(f"{path}, line {line}: {len(row)} fields, where the first row names {len(names)}")
            if row:
                yield f"line {line}", dict(zip(names, row, strict=True))
            line = rows.line_num + 1
    except csv.Error as error:
        raise T3DError(f"{path}, line {line}: not {path.suffix} ({error})") from error


def _json(path: Path, text: io.TextIOWrapper) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(text, start=1):  # not splitlines(): that also cuts at U+2028 and others
        if not line.strip():
            continue
        if number == 1 and line.lstrip().startswith("["):
            yield from _array(path, line + text.read())
            return
        try:
            yield f"line {number}", json.loads(line)
        except (ValueError, RecursionError) as error:  # also a number of too many digits
            raise T3DError(f"{path}, line {number}: not JSON ({error})") from error


def _array(path: Path, text: str) -> Iterator[tuple[str, object]]:
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
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
