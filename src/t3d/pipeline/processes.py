"""Several processes under `accelerate launch` or `torchrun`: they train together, all else the first one does alone.

The first process holds the run folder and decides; the others wait until it tells them to join.
"""

import os
from collections.abc import Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import cache

import torch.distributed as dist

from t3d.log import log

FOREVER = timedelta(days=365)  # the others wait while the first process decodes; if it dies the launcher ends them


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # of torchrun and of MPIs


def should_be_several(environment: Mapping[str, str]) -> bool:
    """Whether `accelerate launch` was asked for several processes and started this one alone.

    It does so where it finds no several GPUs: it then sets ACCELERATE_USE_CPU, to either value, and, for several
    processes only, the place where they would meet.
    """
    asked = "ACCELERATE_USE_CPU" in environment and "MASTER_PORT" in environment
    return asked and not any(name in environment for name in _SIZES)


@cache  # once, not for every run of a study
def warn_of_one_process() -> None:
    if should_be_several(os.environ):
        log.warning(
            "accelerate launch started one process where several were asked for, as it does without several GPUs; on "
            "CPUs use torchrun --nproc_per_node N -m t3d ..."
        )


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
