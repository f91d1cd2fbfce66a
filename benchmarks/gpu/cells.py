"""What the phases share: named cells, their results in one JSON file per phase, and the end of the time.

A cell is a name and a function that returns a dict. The file is written whole and then moved into place, so at any
moment it is valid; a cell is noted as begun before it runs, so that one which takes the process with it is known.
"""

import gc
import json
import os
import platform
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
import transformers

import t3d
from t3d.disk import write_whole

Cells = dict[str, Callable[[], dict]]
LOST = "the process ended in this cell"
ROOT = Path(__file__).parents[2]


class OutOfTime(BaseException):
    """The phase's time is over; raised by an alarm, and not to be caught by a cell."""


@dataclass(frozen=True)
class Place:
    """Where a phase runs, and where its results go. `rehearse`: at tiny shapes on a CPU; the only switch."""

    rehearse: bool
    folder: Path

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    def wait(self) -> None:
        if not self.rehearse:
            torch.cuda.synchronize()

    def clean(self) -> None:
        """What the last cell held is free for the next."""
        gc.collect()
        if not self.rehearse:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def seconds(self, work: Callable[[], object]) -> float:
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start


class Results:
    """The file of one phase: `calls`, what each ran on, and `cells` by name."""

    def __init__(self, path: Path, call: float, place: Place):
        self.path, self.call, self.place = path, str(call), place
        found = json.loads(path.read_text()) if path.exists() else {"calls": {}, "cells": {}}
        if found.setdefault("rehearsed", place.rehearse) != place.rehearse:
            raise SystemExit(f"{path} is {'' if found['rehearsed'] else 'not '}of a rehearsal; use another --json")
        found["calls"].setdefault(self.call, about(place))
        self.found, self.cells = found, found["cells"]
        self.write()

    def write(self) -> None:
        write_whole(self.path, json.dumps(self.found, indent=1) + "\n")

    def left(self, cells: Cells) -> Iterator[str]:
        """What has no result: first what was never tried, then what failed in an earlier call."""
        yield from [name for name in cells if name not in self.cells]
        yield from [name for name in cells if self.failed(name) and self.cells[name]["call"] != self.call]

    def failed(self, name: str) -> bool:
        return "error" in self.cells.get(name, ())

    def run(self, name: str, work: Callable[[], dict]) -> None:
        before, start = self.cells.get(name), time.monotonic()
        self.cells[name] = {"call": self.call, "error": LOST}
        self.write()
        try:
            blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
            try:
                found = work()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        except OutOfTime:
            del self.cells[name]
            if before is not None:
                self.cells[name] = before
            self.write()
            raise
        except Exception as error:  # whatever it is, the other cells go on
            found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]}
        self.cells[name] = {"call": self.call, "seconds": round(time.monotonic() - start, 2)} | found
        self.write()


def about(place: Place) -> dict:
    """What a call runs on."""
    told = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "t3d": t3d.__version__,
        "revision": _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
    }
    if place.rehearse:
        return told | {"device": "cpu"}
    return told | {
        "device": torch.cuda.get_device_name(),
        "memory": torch.cuda.get_device_properties(0).total_memory,
        "cuda": torch.version.cuda,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    }


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
