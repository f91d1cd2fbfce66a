"""The run folder: one writer at a time, what each stage was made with, and how long it took."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

from t3d.config import Recipe
from t3d.disk import write_whole
from t3d.errors import InUseError, T3DError
from t3d.log import log, to_file
from t3d.pipeline.settings import differences, settings
from t3d.pipeline.versions import versions

STAGES = ("rollout", "train", "eval", "report")
# What each stage leaves in the run folder. Its record lies in the folder of its name, which is removed last.
OUTPUTS = {
    "rollout": ("rollout",),
    "train": ("student", "train"),
    "eval": ("summary.json", "eval"),
    "report": ("report.html", "report-accuracy.svg", "report-accuracy.png"),
}
ROUNDS = {"train": ("rollout-*",)}  # what it may leave besides: the rollouts of later rounds
CALIBRATION = "calibrate"  # answers of `t3d calibrate`, which belong to no stage
SAVE_SECONDS = 5.0  # how much of a stage's measured time a kill may lose


class RunFolder:
    """RUN, held by this process inside `with`. If the block fails before a stage began, the folders made here are
    removed.

    Raises:
        T3DError: when the folder cannot be written, another process holds it, or it holds something else.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._save_time = lambda: None  # writes down the time of the stage that runs now

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def __enter__(self) -> "RunFolder":
        with contextlib.ExitStack() as stack, writing(self.path):
            made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise T3DError(f"cannot make the run folder {self.path}: {error.strerror}") from error
            if not made and any(self.path.iterdir()) and not (self / ".lock").exists():
                raise T3DError(f"{self.path} is not empty and not a run folder; choose another run_dir")
            lock = stack.enter_context(open(self / ".lock", "a"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system frees it when we die
            except BlockingIOError as error:
                raise InUseError(
                    f"{self.path} is in use by another run; wait for it, or choose another run_dir"
                ) from error
            if made:
                stack.push(partial(self._remove_if_unused, made[1:]))
            for leftover in self.path.glob(".removed-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            stack.enter_context(to_file(self / "log.txt"))
            stack.push(self._log_failure)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception):
        return self._stack.__exit__(*exception)

    def _remove_if_unused(self, parents: list[Path], kind, *_):
        with contextlib.suppress(OSError):  # it may not be looked into, or another run has begun in a parent
            if kind is not None and not any((self / name).exists() for name in (*STAGES, CALIBRATION)):
                shutil.rmtree(self.path, ignore_errors=True)
                for parent in parents:
                    parent.rmdir()

    def _log_failure(self, kind, error, traceback):
        if kind is not None:
            expected = issubclass(kind, T3DError | KeyboardInterrupt)
            log.debug("stopped: %s", error or kind.__name__, exc_info=None if expected else (kind, error, traceback))

    def record(self, stage: str) -> dict | None:
        """What is known of a stage that was begun: `complete`, `seconds`, `settings`; None if it was not."""
        path = self / stage / "stage.json"
        try:
            record = json.loads(path.read_text())
            return {key: record[key] for key in ("complete", "seconds", "settings")}
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise T3DError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, LookupError, TypeError) as error:
            raise T3DError(f"cannot read {path}; remove {path.parent} to do this stage again") from error

    def complete(self, stage: str) -> bool:
        """Whether a stage ended and its output is still there."""
        record = self.record(stage)
        return bool(record and record["complete"]) and all((self / name).exists() for name in OUTPUTS[stage])

    def check(self, stage: str, recipe: Recipe) -> None:
        """Raises T3DError if the stage was begun with settings that differ from the recipe's in what matters to it."""
        record = self.record(stage)
        if record is None:
            if stage == "eval" and any(self.path.glob("eval/[!.]*")):
                raise T3DError(
                    f"{self.path / 'eval'} holds something, but no stage.json that says what it is; move it away, or "
                    "add --force to remove it"
                )
            return
        old = record["settings"]
        new = settings(recipe, stage, student="train.objective" in old)
        for key, before, now in differences(old, new):
            raise T3DError(
                f"{self.path}: the {stage} stage was run with {key} = {before!r}, not {now!r}; "
                "add --force to do it again, or choose another run_dir"
            )

    def changed(self, stage: str, recipe: Recipe) -> bool:
        """Whether a stage that passed `check` was begun with a smaller or larger grid, or without the student."""
        record = self.record(stage)
        return record is not None and record["settings"] != self._settings(stage, recipe)

    def _settings(self, stage: str, recipe: Recipe) -> dict:
        return settings(recipe, stage, student=self.complete("train"))

    def clear(self, stages: tuple[str, ...]) -> None:
        """Remove the output of `stages`, the last first; what is only half removed no longer has its name."""
        with writing(self.path):
            found = [
                name
                for stage in reversed(stages)
                for pattern in (*ROUNDS.get(stage, ()), *OUTPUTS[stage])
                for name in sorted(path.name for path in self.path.glob(pattern))
            ]
            for name in found:
                trash = Path(tempfile.mkdtemp(prefix=".removed-", dir=self.path))
                (self / name).rename(trash / name)
                shutil.rmtree(trash, ignore_errors=True)

    @contextlib.contextmanager
    def stage(self, name: str, recipe: Recipe):
        """Inside, the stage is recorded as begun, and its time, added to that of earlier attempts, is kept on disk."""
        before = (self.record(name) or {"seconds": 0.0})["seconds"]
        start, over, lock = time.monotonic(), threading.Event(), threading.Lock()
        wanted = self._settings(name, recipe)

        def save(complete: bool = False) -> None:
            with lock:
                seconds = round(before + time.monotonic() - start, 3)
                self.write_json(f"{name}/stage.json", {"complete": complete, "seconds": seconds, "settings": wanted})

        def keep_time() -> None:
            with contextlib.suppress(T3DError):  # a full disk stops the stage itself
                save()

        def keep_saving() -> None:
            while not over.wait(SAVE_SECONDS):
                keep_time()

        save()
        self._save_time = save
        keeper = threading.Thread(target=keep_saving, daemon=True)
        keeper.start()
        try:
            with writing(self / name):
                yield
        finally:
            over.set()
            keeper.join()
            keep_time()
            self._save_time = lambda: None
        save(complete=True)

    def seconds(self) -> dict[str, float]:
        """Wall time so far of every stage that takes long, over all attempts, and their total."""
        self._save_time()
        times = {stage: (self.record(stage) or {"seconds": 0.0})["seconds"] for stage in STAGES[:3]}
        return times | {"total": round(sum(times.values()), 3)}

    def write_json(self, name: str, value) -> None:
        write_whole(self / name, json.dumps(value, indent=1, ensure_ascii=False) + "\n")

    def describe(self, recipe: Recipe) -> None:
        """Write recipe.yaml and versions.json; say so if the run continues with other versions."""
        now, path = versions(), self / "versions.json"
        with contextlib.suppress(OSError, ValueError):
            before = json.loads(path.read_text())
            changed = [
                f"{name} {before.get(name)} -> {value}" for name, value in now.items() if before.get(name) != value
            ]
            if changed:
                log.warning("this run continues with other versions: %s", ", ".join(changed))
        self.write_json("versions.json", now)
        write_whole(self / "recipe.yaml", recipe.to_yaml())


@contextlib.contextmanager
def writing(path: Path):
    """Turns what a full disk or a missing permission raises, in whichever library, into one line."""
    try:
        yield
    except T3DError:
        raise
    except Exception as error:
        if any(map(_disk_full, _causes(error))) or _no_room(path):
            raise T3DError(f"cannot write {path}: no space left; make room and run again") from error
        refused = isinstance(error, OSError) and error.errno in _REFUSED
        if refused or _no_access(path):
            where, why = (error.filename or path, error.strerror) if refused else (path, os.strerror(errno.EACCES))
            raise T3DError(
                f"cannot write {where}: {why}; choose another run_dir, or fix the permissions and run again"
            ) from error
        raise


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FULL_TEXTS = (*map(os.strerror, _FULL), "PytorchStreamWriter failed writing")  # from libraries in other languages
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG}


def _causes(error: BaseException) -> list[BaseException]:
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    return chain


def _disk_full(error: BaseException) -> bool:
    return getattr(error, "errno", None) in _FULL or any(text in str(error) for text in _FULL_TEXTS)


def _no_room(path: Path) -> bool:
    """Whether the disk is full now: not every library says why a write failed."""
    usage = shutil.disk_usage(_reachable(path))
    return usage.total > 0 and usage.free < 2**16


def _no_access(path: Path) -> bool:
    """Whether the folder, or what it lies in, may not be read or written now; not every library says that either."""
    return not os.access(_reachable(path), os.R_OK | os.W_OK | os.X_OK)


def _reachable(path: Path) -> Path:
    """The path, or the nearest folder above it that can be seen; one without permissions hides what is in it."""
    while not os.path.exists(path) and path != path.parent:
        path = path.parent
    return path
