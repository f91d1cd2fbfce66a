"""What a fixed reference says of micro-batches, kept on disk for runs that see the same states again."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from t3d.distill.batch import TrainingBatch
from t3d.errors import T3DError

INPUT = ("input_ids", "document", "copy", "position", "select", "target")  # fields that the values depend on


class ReferenceValues:
    """A folder of tuples of tensors, one for each micro-batch, named after a hash of its input and of `made_with`.

    The name is all there is to know, so runs in any order, several at a time or killed ones can share a folder.
    """

    def __init__(self, folder: Path | str, *made_with):
        self.folder, self.made_with = Path(folder), repr(made_with).encode()

    def get(self, batch: TrainingBatch, ask: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """The values of this batch: the folder's, or else what `ask()` gives, which is then in the folder.

        Raises:
            T3DError: if a file cannot be read or written.
        """
        path = self._path(batch)
        values = None if path.exists() else ask()
        try:
            if values is None:
                found = load_file(path, device=str(batch.input_ids.device))
                return tuple(found[str(i)] for i in range(len(found)))
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            save_file({str(i): value.contiguous() for i, value in enumerate(values)}, temporary)
            temporary.rename(path)
        except (OSError, SafetensorError, KeyError) as error:
            raise T3DError(f"train.reference_cache: {path}: {error}; remove it, or make room, to continue") from error
        return values

    def _path(self, batch: TrainingBatch) -> Path:
        digest = hashlib.sha256(self.made_with)
        for name in INPUT:
            value: Tensor = getattr(batch, name)
            digest.update(f"{name}{tuple(value.shape)}".encode() + value.cpu().numpy().tobytes())
        name = digest.hexdigest()[:32]
        return self.folder / name[:2] / f"{name}.safetensors"
