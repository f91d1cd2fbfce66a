"""Reading trajectories back, in an order that does not depend on how they were written, not all at once."""

import re
from collections import OrderedDict
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from t3d.errors import T3DError
from t3d.trajectories.record import Trajectory
from t3d.trajectories.schema import damaged, difference, open_shard, shards, to_trajectory
from t3d.trajectories.store import read_keys

CACHE_BYTES = 256 * 2**20  # of decoded row groups
OPEN_FILES = 256  # at once, below the usual limit of a process


class TrajectoryDataset(Sequence):
    """The trajectories of a folder (or of one file), read from disk as they are asked for.

    Ordered by prompt id (numbers inside ids by value: `p2` before `p10`), then by sample, whatever the order
    in which they were written; of several with the same key the first in the oldest shard counts. It holds the
    keys in memory while opening, and 12 bytes per row afterwards. Picklable, for DataLoader workers.

    Raises:
        T3DError: if there is none, or a file is damaged, foreign, of another version or of other settings.
    """

    def __init__(self, folder: Path | str):
        self.paths = shards(folder)
        if not self.paths:
            raise T3DError(f"no trajectories in {folder}: no .parquet file there")
        self.metadata: dict = {}
        keys, places = [], []  # of every row: (prompt_id, sample); (shard, row group, row in it)
        for number, path in enumerate(self.paths):
            file, metadata = open_shard(path)
            with file:
                if number and (found := difference(self.metadata, metadata)):
                    raise T3DError(f"{path} was made with a different {found[0]} from {self.paths[0].name} beside it")
                self.metadata = self.metadata or metadata
                keys += read_keys(file, path)
                for group, size in enumerate(_sizes(file)):
                    rows = np.arange(size)
                    places.append(np.stack([np.full(size, number), np.full(size, group), rows], 1))
        unique: dict[tuple[str, int], int] = {}
        for index, key in enumerate(keys):
            unique.setdefault(key, index)
        order = sorted(unique, key=lambda key: (_natural(key[0]), key))
        every = np.concatenate([np.empty((0, 3), np.int32), *places]).astype(np.int32)
        self._places = every[np.array([unique[key] for key in order], np.int64)]
        self._reset()

    def _reset(self):
        self._files: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        self._cache: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()
        self._cached_bytes = 0

    def __getstate__(self) -> dict:
        return {"paths": self.paths, "metadata": self.metadata, "_places": self._places}

    def __setstate__(self, state: dict):
        self.__dict__.update(state)
        self._reset()

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Trajectory: ...
    @overload
    def __getitem__(self, index: slice) -> "TrajectoryDataset": ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        shard, group, row = self._places[index].tolist()
        return to_trajectory(self._group(shard, group), row)

    def __iter__(self) -> Iterator[Trajectory]:
        return (self[i] for i in range(len(self)))

    def select(self, rows: Sequence[int] | np.ndarray) -> "TrajectoryDataset":
        """A view of these rows (indices, or a boolean mask of length `len(self)`), in the order given."""
        view = object.__new__(TrajectoryDataset)
        view.__setstate__(self.__getstate__() | {"_places": self._places[np.asarray(rows)]})
        return view

    def keys(self) -> list[tuple[str, int]]:
        """(prompt_id, sample) of every row, in order."""
        return list(zip(self.column("prompt_id"), self.column("sample"), strict=True))

    def column(self, name: str) -> list:
        """One column for all rows, in this dataset's order, reading no other: e.g. `correct`, `length`."""
        values: list = []
        starts: dict[tuple[int, int], int] = {}
        for shard in np.unique(self._places[:, 0]).tolist():
            start = len(values)
            for group, size in enumerate(_sizes(self._open(shard))):
                starts[shard, group] = start
                start += size
            values += self._read(shard, lambda file: file.read(columns=[name]))[name].to_pylist()
        return [values[starts[shard, group] + row] for shard, group, row in self._places.tolist()]

    def _open(self, shard: int) -> pq.ParquetFile:
        if shard not in self._files:
            self._files[shard] = open_shard(self.paths[shard])[0]
            if len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(shard)
        return self._files[shard]

    def _read(self, shard: int, read) -> pa.Table:
        try:
            return read(self._open(shard))
        except (pa.ArrowException, OSError) as error:
            raise damaged(self.paths[shard], error) from error

    def _group(self, shard: int, group: int) -> pa.Table:
        """A decoded row group; the ones used last are kept, up to `CACHE_BYTES`."""
        if (shard, group) in self._cache:
            self._cache.move_to_end((shard, group))
            return self._cache[shard, group]
        table = self._read(shard, lambda file: file.read_row_group(group, use_threads=False)).combine_chunks()
        self._cache[shard, group] = table
        self._cached_bytes += table.nbytes
        while self._cached_bytes > CACHE_BYTES and len(self._cache) > 1:
            self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return table


def _sizes(file: pq.ParquetFile) -> list[int]:
    return [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]


def _natural(prompt_id: str) -> list[tuple[int, int | str]]:
    """Sort key in which runs of digits compare as numbers; comparable between any two ids."""
    parts = re.findall(r"[0-9]{1,18}|[^0-9]+", prompt_id)
    return [(0, int(part)) if part[0] in "0123456789" else (1, part) for part in parts]


def read_trajectories(folder: Path | str) -> Iterator[Trajectory]:
    """Every trajectory of a folder or file, once, in `TrajectoryDataset`'s order."""
    return iter(TrajectoryDataset(folder))


def as_begun(folder: Path | str, part: str, now: dict, changed: Container[str]) -> dict:
    """`now`, the settings that metadata[part] holds, as the version that began the folder would have written them.

    A later version's keys, which its metadata lack, are left out, but for those in `changed`: they are not at what
    earlier versions did. Where nothing was begun, all are kept.
    """
    if not shards(folder):
        return now
    known = read_metadata(folder).get(part) or now
    return {key: value for key, value in now.items() if key in known or key in changed}


def read_metadata(folder: Path | str) -> dict:
    """The metadata that a folder's (or file's) trajectories were written with."""
    for path in shards(folder):
        file, metadata = open_shard(path)
        file.close()
        return metadata
    raise T3DError(f"no trajectories in {folder}: no .parquet file there")
