"""Running generated programs: two sandboxed processes, one for the program and one for its tests.

Each process is cut off by `sandbox_child.py`. A verdict counts only if the process that holds the tests reports on
every one of them; the program's process can neither reach that process nor see what it compares with.
"""

import ctypes
import itertools
import json
import os
import selectors
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from t3d.errors import T3DError
from t3d.log import log

START = 5.0  # seconds of CPU time, beyond the test's own, to start and to import
MEMORY = 1 << 30  # bytes of address space of one process
OUTPUT = 1 << 20  # bytes of output that are read
PROCESSES = 32
FILE = 16 << 20  # bytes of one file
DISK = 64 << 20  # bytes of all files
PROBE = """
import os
try:
    os.close(os.memfd_create("a"))
    filtered = False
except OSError:
    filtered = True
print(len(os.listdir("/tmp")), os.getpid() < 9, filtered)
"""
CHILD = Path(__file__).with_name("sandbox_child.py").read_text(encoding="utf-8")
ISOLATION_FAILED, NO_SANDBOX, TRIES = 97, "the sandbox could not be set up", 4
_numbers = itertools.count()
_TIME = {128 + signal.SIGKILL, 128 + signal.SIGXCPU}  # how a process ends that is out of CPU time


@dataclass(frozen=True)
class Outcome:
    """What the tests found. `passed` has one entry for each test."""

    passed: tuple[bool, ...]
    reason: str = ""  # of the first failure

    @property
    def ok(self) -> bool:
        return bool(self.passed) and all(self.passed)


class Sandbox:
    """Runs programs in isolation; raises `T3DError` where the system allows none and `allow_unsandboxed` is false."""

    def __init__(self, allow_unsandboxed: bool = False):
        self.isolation, why = _isolation()
        if self.isolation == "none" and not allow_unsandboxed:
            raise T3DError(
                f"this system does not allow isolated processes ({why}): install bubblewrap, allow user namespaces, "
                "or set task.allow_unsandboxed=true to run generated code with all your rights"
            )

    def _retry(self, run: Callable[..., Outcome], *args) -> Outcome:
        """What `run` finds; again, a few times, where a sandbox could not be set up: that is no verdict on the program.

        A program can pretend so, and is then run again for nothing.
        """
        for attempt in range(TRIES):
            outcome = run(*args)
            if outcome.reason != NO_SANDBOX:
                break
            time.sleep(0.2 * attempt)
        return outcome

    def function(
        self, program: str, tests: Sequence[str], setup: str = "", entry: Sequence[str] = (), seconds: float = 1.0
    ) -> Outcome:
        """Runs `tests` (Python text) one after the other against what `program` defines.

        setup: run after the program and before the tests, which see its names rather than the program's.
        entry: the functions under test: only they may have the name of a builtin or of a standard module.
        seconds: CPU time for all tests together.
        """
        return self._retry(self._function, program, tests, setup, entry, seconds)

    def _function(
        self, program: str, tests: Sequence[str], setup: str, entry: Sequence[str], seconds: float
    ) -> Outcome:
        failed = (False,) * len(tests)
        # Descriptors: the program reads requests and writes replies, the tests do the opposite.
        requests_in, requests_out = os.pipe()
        replies_in, replies_out = os.pipe()
        deadline = time.monotonic() + wall(seconds)
        with _Process(self.isolation, "serve", {"program": program}, seconds, (requests_in, replies_out)) as served:
            os.close(requests_in)
            os.close(replies_out)
            job = {"setup": setup, "tests": list(tests), "entry": list(entry)}
            with _Process(self.isolation, "check", job, seconds, (replies_in, requests_out), output=True) as checked:
                os.close(replies_in)
                os.close(requests_out)
                report = checked.read(deadline)
                if report is None:
                    return Outcome(failed, f"out of time ({seconds:g} s)")
            passed, reason = _parse(report, len(tests))
            if not all(passed):
                ended = served.exit_code(grace=0.5)
                if ISOLATION_FAILED in (ended, checked.exit_code(grace=0.5)):
                    reason = NO_SANDBOX
                elif ended in _TIME:
                    reason = f"out of time ({seconds:g} s)"
            return Outcome(passed, reason)

    def script(self, program: str, inputs: Sequence[str], outputs: Sequence[str], seconds: float = 1.0) -> Outcome:
        """Runs `program` once for each input, until one output differs (by more than white space)."""
        return self._retry(self._script_tests, program, inputs, outputs, seconds)

    def _script_tests(self, program: str, inputs: Sequence[str], outputs: Sequence[str], seconds: float) -> Outcome:
        passed = []
        for number, (given, expected) in enumerate(zip(inputs, outputs, strict=True), start=1):
            reason = self._script(program, given, expected, seconds)
            passed.append(not reason)
            if reason:
                rest = (False,) * (len(inputs) - number)
                return Outcome((*passed, *rest), reason if reason == NO_SANDBOX else f"test {number}: {reason}")
        return Outcome(tuple(passed))

    def _script(self, program: str, given: str, expected: str, seconds: float) -> str:
        cap = max(OUTPUT, 4 * len(expected.encode()))
        deadline = time.monotonic() + wall(seconds)
        with _Process(self.isolation, "script", {"program": program}, seconds, output=True, stdin=given) as process:
            printed = process.read(deadline, cap)
            if printed is not None and len(printed) > cap:
                return f"more than {cap} bytes of output"
            code = process.exit_code(max(0.0, deadline - time.monotonic()) if printed is not None else 0.0)
        if code is None or code in _TIME:
            return f"out of time ({seconds:g} s)"
        if code == ISOLATION_FAILED:
            return NO_SANDBOX
        if code != 0:
            return f"ended with exit code {code}"
        if printed.decode("utf-8", "replace").split() != expected.split():
            return f"printed {' '.join(printed[:200].decode('utf-8', 'replace').split())[:80]!r}"
        return ""


def wall(seconds: float) -> float:
    """Seconds on the clock for `seconds` of CPU time: generous, so that a busy machine decides nothing."""
    return 5 * (seconds + START) + 10


def _parse(report: bytes, count: int) -> tuple[tuple[bool, ...], str]:
    try:
        passed, reason = json.loads(report)
    except ValueError:
        return (False,) * count, "the tests were not finished"
    return tuple(passed), reason


class _Process:
    """One sandboxed interpreter; leaving the `with` block kills all that is left of it."""

    def __init__(self, isolation, part, job, seconds, fds=(), output=False, stdin=None):
        self.folder = tempfile.mkdtemp(prefix="t3d-sandbox-")
        cpu = int(seconds + START + 0.999)
        limits = {"CPU": cpu, "AS": MEMORY, "FSIZE": FILE, "NOFILE": 64, "CORE": 1}  # 0 would not stop a core handler
        if isolation != "none":  # elsewhere the user's own processes count too
            limits["NPROC"] = PROCESSES
        job = job | {
            "part": part,
            "fds": list(fds),
            "limits": limits,
            "root": self.folder if isolation == "namespaces" else None,
            "binds": _binds(),
            "disk": DISK,
            "folder": "/tmp" if isolation == "bwrap" else self.folder,
            "user": (1 << 30) + os.getpid() % (1 << 22) * 256 + next(_numbers) % 256,
        }
        with tempfile.TemporaryFile() as jobs, tempfile.TemporaryFile() as given:
            jobs.write(json.dumps(job).encode())
            jobs.seek(0)
            given.write((stdin or "").encode("utf-8", "replace"))
            given.seek(0)
            self.process = subprocess.Popen(
                [*_prefix(isolation), os.path.realpath(sys.executable), "-s", "-S", "-c", CHILD, str(jobs.fileno())],
                stdin=given if stdin is not None else subprocess.DEVNULL,
                stdout=subprocess.PIPE if output else subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(jobs.fileno(), *fds),
                env={"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1", "LC_ALL": "C.UTF-8", "PYTHONUTF8": "1"},
                cwd="/",
                start_new_session=True,
            )

    def __enter__(self):
        return self

    def read(self, deadline: float, cap: int = OUTPUT) -> bytes | None:
        """Standard output until its end, or until it is longer than `cap`; None if that takes too long."""
        found, stream = b"", self.process.stdout
        with selectors.DefaultSelector() as selector:
            selector.register(stream, selectors.EVENT_READ)
            while len(found) <= cap:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return None
                piece = os.read(stream.fileno(), 1 << 16)
                if not piece:
                    break
                found += piece
        return found

    def exit_code(self, grace: float) -> int | None:
        try:
            return self.process.wait(grace)
        except subprocess.TimeoutExpired:
            return None

    def __exit__(self, *_):
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _binds() -> list[str]:
    """What a program may see: system libraries, the Python installation, the plain devices."""
    paths = ["/usr", "/bin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/dev/null", "/dev/zero", "/dev/urandom"]
    prefixes = {sys.base_prefix, sys.base_exec_prefix, str(Path(sys.executable).resolve().parents[1])}
    paths += sorted(p for p in prefixes if not p.startswith("/usr"))
    return [path for path in paths if os.path.lexists(path)]


def _prefix(isolation: str) -> list[str]:
    """The command in front of the interpreter where bubblewrap does the isolation."""
    if isolation != "bwrap":
        return []
    command = ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    for path in _binds():
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
        else:
            command += ["--dev-bind" if path.startswith("/dev/") else "--ro-bind", path, path]
    return [*command, *_bwrap_size(), "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp"]


@cache
def _bwrap_size() -> list[str]:
    """The limit of `/tmp`, for which bubblewrap must be 0.7 or newer and not a set-user-id program."""
    privileged = os.stat(shutil.which("bwrap")).st_mode & stat.S_ISUID
    usage = subprocess.run(["bwrap", "--help"], capture_output=True, text=True).stdout
    return ["--size", str(DISK)] if "--size" in usage and not privileged else []


def _has_libseccomp() -> bool:
    try:
        return bool(ctypes.CDLL("libseccomp.so.2"))
    except OSError:
        return False


def _isolation() -> tuple[str, str]:
    """The first way to isolate that works here ("namespaces", "bwrap" or "none"), and why those before it did not."""
    try:
        return _working()
    except T3DError as none:
        return "none", str(none)


@cache  # of what works: a system where nothing did is asked again
def _working() -> tuple[str, str]:
    reasons = []
    for isolation in ("namespaces", "bwrap"):
        failure = _try(isolation)
        if not failure:
            return isolation, "; ".join(reasons)
        reasons.append(f"{isolation}: {failure}")
    raise T3DError("; ".join(reasons))


def _try(isolation: str) -> str:
    """Why `isolation` does not work here; empty if it does. One failure says nothing of a busy system."""
    if isolation == "bwrap" and shutil.which("bwrap") is None:
        return "not installed"
    for attempt in range(TRIES):
        time.sleep(0.2 * attempt)
        if not (failure := _probe(isolation)):
            break
    return failure


def _probe(isolation: str) -> str:
    """Why one program did not run in `isolation`; empty if it did."""
    deadline = time.monotonic() + wall(5.0)
    with _Process(isolation, "script", {"program": PROBE}, 5.0, output=True, stdin="") as process:
        printed = process.read(deadline)
        code = process.exit_code(max(0.0, deadline - time.monotonic()))
    if printed is None or code is None:
        return f"a program did not end within {wall(5.0):g} s"
    if code == 0 and printed == b"0 True False\n" and _has_libseccomp():
        log.warning("programs run in a sandbox without a filter of system calls: the kernel refuses libseccomp's")
    if code == 0 and printed.startswith(b"0 True "):
        return ""
    return " ".join(printed.decode("utf-8", "replace").split()) or f"exit code {code}"
