"""Writing trajectories: Parquet shards that a kill at any moment leaves whole."""

import contextlib
import fcntl
import json
import os
import time
from pathlib import Path

import pyarrow.parquet as pq

from t3d.errors import T3DError
from t3d.trajectories.record import Trajectory, validate
from t3d.trajectories.schema import damaged, difference, open_shard, shards, to_table

ROW_GROUP = 32  # rows decoded to read one of them


class TrajectoryWriter:
    """Adds trajectories to a folder, as a context manager.

    Rows are buffered and become a shard, written to a temporary file and renamed, when `shard_size` of them
    are finished, when `flush_seconds` have passed since the last shard, and on leaving the `with` block for
    whatever reason. A shard is never rewritten. A trajectory whose (prompt_id, sample) is there already is
    ignored.

    Args:
        folder: made if missing; one writer at a time.
        metadata: JSON-able; what the rows were made with (model, decoding settings, tokenizer, seed, ...).
            `versions` may differ when a folder is continued, everything else must not.

    Raises:
        T3DError: if the folder was written with other metadata, is in use, or cannot be written.
    """

    def __init__(self, folder: Path | str, metadata: dict, shard_size: int = 1024, flush_seconds: float = 30):
        self.folder = Path(folder)
        self.metadata = json.loads(json.dumps(metadata))  # as it will be read back: tuples are lists
        self.shard_size, self.flush_seconds = shard_size, flush_seconds
        self._rows: list[Trajectory] = []
        self._last_flush = time.monotonic()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder, os.O_RDONLY)
        except OSError as error:
            raise T3DError(f"cannot use {self.folder}: {error.strerror}") from error
        try:
            self._take_over()
        except BaseException:
            os.close(self._lock)
            raise

    def _take_over(self):
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system frees it when we die
        except BlockingIOError as error:
            raise T3DError(f"{self.folder} is in use by another writer; wait for it or stop it") from error
        for leftover in self.folder.glob(".*.parquet.tmp"):
            leftover.unlink()
        self._keys: set[tuple[str, int]] = set()
        for path in shards(self.folder):
            file, metadata = open_shard(path)
            with file:
                if found := difference(metadata, self.metadata):
                    key, before, now = found
                    raise T3DError(
                        f"{self.folder} was written with {key} = {before!r}, not {now!r}; use another folder, or "
                        "remove it to start again"
                    )
                self._keys.update(read_keys(file, path))

    def done(self) -> set[tuple[str, int]]:
        """The (prompt_id, sample) of every trajectory that is in the folder or about to be."""
        return set(self._keys)

    def write(self, trajectory: Trajectory):
        validate(trajectory)
        key = (trajectory.prompt_id, trajectory.sample)
        if key in self._keys:
            return
        self._keys.add(key)
        self._rows.append(trajectory)
        self.flush_if_due()

    def flush_if_due(self):
        """`flush` if the rows are many or have waited long; to be called where nothing new has come, too."""
        if len(self._rows) >= self.shard_size or time.monotonic() - self._last_flush >= self.flush_seconds:
            self.flush()

    def flush(self):
        """Makes a shard of the rows written so far. If that fails, the rows stay for the next try."""
        self._last_flush = time.monotonic()
        if not self._rows:
            return
        table = to_table(self._rows, self.metadata)
        numbers = [int(p.stem[6:]) for p in self.folder.glob("shard-*.parquet") if p.stem[6:].isdigit()]
        final = self.folder / f"shard-{max(numbers, default=-1) + 1:05d}.parquet"
        temporary = final.with_name(f".{final.name}.tmp")
        try:
            with open(temporary, "wb") as out:
                pq.write_table(
                    table,
                    out,
                    row_group_size=ROW_GROUP,
                    compression="zstd",
                    use_dictionary=["finish_reason"],  # dictionaries make numbers slower to read, not smaller
                    write_page_checksum=True,
                )
                out.flush()
                os.fsync(out.fileno())
            os.rename(temporary, final)
            os.fsync(self._lock)  # the folder: makes the new name durable
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise T3DError(
                f"cannot write {final}: {error.strerror or error}; what was saved before is intact, "
                "make room or fix the permissions and run again to continue"
            ) from error
        self._rows = []

    def close(self):
        """Flushes and lets go of the folder."""
        try:
            self.flush()
        finally:
            os.close(self._lock)

    def __enter__(self) -> "TrajectoryWriter":
        return self

    def __exit__(self, *exception):
        self.close()


def read_keys(file: pq.ParquetFile, path: Path) -> list[tuple[str, int]]:
    """(prompt_id, sample) of each row, reading only these columns."""
    try:
        table = file.read(columns=["prompt_id", "sample"])
    except (OSError, ValueError) as error:
        raise damaged(path, error) from error
    return list(zip(table["prompt_id"].to_pylist(), table["sample"].to_pylist(), strict=True))
