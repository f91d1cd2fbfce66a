"""Several processes under `accelerate launch` or `torchrun`: they train together, all else the first one does alone.

The first process holds the run folder and decides; the others wait until it tells them to join.
"""

import os
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

FOREVER = timedelta(days=365)  # the others wait while the first process decodes; if it dies the launcher ends them


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


class Processes:
    """The processes of this launch. Make it when the process group is there, in every process."""

    def __init__(self):
        self.several = count() > 1
        self.main = rank() == 0
        self.group = dist.new_group(backend="gloo", timeout=FOREVER) if self.several else None
        self.together = False

    @contextmanager
    def joined(self):
        """In the first process: inside, the others do the same."""
        self.together = True
        self.tell(True)
        yield
        self.together = False

    def tell(self, together: bool) -> None:
        """From the first process: what comes is done together, or there is nothing more to do."""
        if self.several:
            dist.broadcast_object_list([together], src=0, group=self.group)

    def told(self) -> bool:
        """In the others: what the first process tells, which may take hours."""
        order = [False]
        dist.broadcast_object_list(order, src=0, group=self.group)
        return order[0]

    def wait(self) -> None:
        """Until all are here, however long it takes."""
        if self.several:
            dist.barrier(group=self.group)
