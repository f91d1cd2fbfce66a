"""`engine.workers=N`: the same result as one process, though a worker is killed."""

import contextlib
import os
import signal

import psutil
import pytest

from tests.e2e.program import assert_same_trajectories
from tests.e2e.test_run import rows

pytest.importorskip("ray", reason="needs t3d[ray]")


def workers_of(pid: int) -> list[int]:
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it may end while we look
            if any("ray::_Worker" in part for part in process.cmdline()):
                found.append(process.pid)
    return found


def test_a_worker_that_is_killed_changes_nothing(t3d, write_recipe, finished):
    recipe = write_recipe(t3d.folder)
    begun = "runs/recipe/rollout/shard-*.parquet"
    process = t3d.start("run", recipe, "engine.workers=2", "engine.max_batch_size=2", moment=begun)
    t3d.until(begun, process)
    os.kill(workers_of(process.pid)[0], signal.SIGKILL)
    done = t3d.finish(process)
    assert done.code == 0, done.stderr
    assert_same_trajectories(t3d.folder / "runs" / "recipe", finished[0])
    assert [row["accuracy"] for row in rows(t3d.folder / "runs" / "recipe")] == [
        row["accuracy"] for row in rows(finished[0])
    ]


def test_too_many_workers_is_one_line(t3d, write_recipe):
    done = t3d("rollout", write_recipe(t3d.folder), "engine.workers=1000")
    assert done.code == 2
    assert "engine.workers = 1000, but the Ray cluster has" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
