"""Runs `t3d` in processes of its own, which a test can stop."""

import os
import resource
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from t3d.trajectories import TrajectoryDataset


def _wait_at(moment: str, go_on: Path):
    """From the moment on in which something matches the pattern, wait before each file that is opened or renamed.

    So a test that stops this process comes in time, however late the system runs it. Ends when `go_on` exists.
    """

    def hook(event: str, _):
        while event in ("open", "os.rename") and any(Path().glob(moment)) and not go_on.exists():
            time.sleep(0.01)

    sys.addaudithook(hook)


def _command(
    arguments: list[str], folder: str, output: str, largest_file: int | None = None, moment: str | None = None
):
    """Runs in the forked process: what the `t3d` program does, its streams in files."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(f"{output}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    os.chdir(folder)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest's workers may ignore it
    from t3d.cli import main

    if moment is not None:
        _wait_at(moment, Path(output) / "go-on")
    main(arguments)


def assert_same_trajectories(run: Path, other: Path, folder: str = "rollout") -> None:
    """Equal in all that does not depend on what else was in the batch.

    What does: the last bits of the confidences, and how many forwards read the prompt.
    """
    pairs = zip(TrajectoryDataset(run / folder), TrajectoryDataset(other / folder), strict=True)
    for a, b in pairs:
        one, two = (replace(t, confidence=[], nfe=replace(t.nfe, prefill=0)) for t in (a, b))
        assert one == two
        assert a.confidence == pytest.approx(b.confidence, abs=1e-5)


@dataclass
class Done:
    code: int
    stdout: str
    stderr: str


class Program:
    """`t3d` with working directory `folder`."""

    def __init__(self, folder: Path, context):
        self.folder, self.context, self.calls = folder, context, 0

    def start(self, *arguments: str, largest_file: int | None = None, moment: str | None = None):
        """`largest_file`: bytes beyond which a write fails, as on a full disk; `moment`: see `stop`."""
        self.calls += 1
        output = self.folder / f".call{self.calls}"
        output.mkdir()
        process = self.context.Process(
            target=_command, args=(list(arguments), str(self.folder), str(output), largest_file, moment)
        )
        process.start()
        process.output = output
        return process

    def until(self, moment: str, process, seconds: float = 600):
        """Wait until something in the working directory matches the pattern `moment`."""
        end = time.monotonic() + seconds
        while not any(self.folder.glob(moment)):
            assert process.is_alive(), f"ended before: {self.finish(process)}"
            assert time.monotonic() < end, "it never happened"
            time.sleep(0.005)

    def finish(self, process, seconds: float = 600) -> Done:
        (process.output / "go-on").touch()
        process.join(seconds)
        assert process.exitcode is not None, f"still running after {seconds} s"
        read = [(process.output / name).read_text() for name in ("stdout", "stderr")]
        return Done(process.exitcode, *read)

    def __call__(self, *arguments: str, largest_file: int | None = None) -> Done:
        return self.finish(self.start(*arguments, largest_file=largest_file))

    def stop(self, moment: str, *arguments: str, by: signal.Signals = signal.SIGKILL) -> Done:
        """Start `t3d` and send it a signal as soon as something matches the pattern `moment`."""
        process = self.start(*arguments, moment=moment)
        self.until(moment, process)
        os.kill(process.pid, by)
        return self.finish(process)
