"""Kills and interrupts commands of `t3d`, fills their disk and takes their permissions, and compares what they leave.

    OMP_NUM_THREADS=1 python benchmarks/chaos.py --minutes 60 --json chaos.json

Every stage is run once without disturbance, and then again and again, each time with up to `--disturb` disturbances at
random moments. After each disturbance the same command is given again, until it ends. The exit code is
1 where something differs, a command has a traceback, or one cannot go on.

The stage `rollout` needs `t3d[ray]`; `train` and `rl` need `rollout` before them. Linux only. Only root has a disk to
fill, which no other process sees. Commands are forked from this process, which has imported what they need: kills hit
work, not imports.
"""

import argparse
import atexit
import contextlib
import ctypes
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

DEMO = str(Path(__file__).resolve().parents[1] / "recipes" / "demo.yaml")
SIZES = (
    "task.num_train=192", "task.num_eval=48", "rollout.max_tokens=96", "rollout.save_every=16", "eval.max_tokens=96",
    "engine.max_batch_size=16", "train.per_device_train_batch_size=8", "train.max_steps=16", "train.warmup_steps=2",
    "train.save_steps=3", "train.save_total_limit=2",
)  # fmt: skip
STUDY = {
    "recipe": DEMO,
    "folder": "study",
    "set": ["task.num_train=48", "train.max_steps=4", "eval.grid=[{steps: 2}]"],
    "variants": {"mean-field": [], "t3d": ["train.objective=t3d"]},
    "against": ["mean-field"],
}
DISK = "384m"
HANGS = 900.0  # seconds after which a command counts as one that never ends


@dataclass(frozen=True)
class Stage:
    """A command, without `t3d`, and the folder that it works in."""

    folder: str
    command: tuple[str, ...]


STAGES = {
    "rollout": Stage("run", ("rollout", DEMO, *SIZES, "run_dir=run", "engine.workers=2")),
    "train": Stage("run", ("train", DEMO, *SIZES, "run_dir=run")),
    "eval": Stage("run", ("eval", DEMO, *SIZES, "run_dir=run")),
    "rl": Stage(
        "rl",
        ("run", DEMO, *SIZES, "run_dir=rl", "rollout.source=run/rollout", "train.objective=cj_grpo",
         "train.per_device_train_batch_size=2", "train.rl_updates=2", "train.learning_rate=3e-4", "train.max_steps=6",
         "train.save_steps=1", "eval.grid=[{steps: 2}]", "eval.teacher=false"),
    ),
    "study": Stage("study", ("study", "study.yaml", *SIZES[2:7], "task.num_eval=24", "train.save_steps=2")),
    # Two short steps, so that most of it is writing.
    "save": Stage("save", ("train", DEMO, *SIZES, "run_dir=save", "train.objective=sft", "train.max_steps=2",
                           "train.save_steps=1")),
}  # fmt: skip


class Failure(Exception):
    """What must not happen."""


@dataclass
class Tally:
    """What happened to one stage in all rounds, and the `wall` and `processor` seconds that its commands took."""

    undisturbed: Counter = field(default_factory=Counter)  # seconds of one round
    disturbed: Counter = field(default_factory=Counter)  # seconds of all rounds
    rounds: int = 0
    disturbances: Counter = field(default_factory=Counter)  # by kind
    refusals: int = 0  # exit code 2 and one line

    def cost(self, clock: str) -> float | None:
        """Seconds of work done again, for each disturbance."""
        number = self.disturbances.total()
        return (self.disturbed[clock] - self.rounds * self.undisturbed[clock]) / number if number else None

    def to_dict(self) -> dict:
        return vars(self) | {"cost": {clock: self.cost(clock) for clock in ("wall", "processor")}}


@dataclass
class Report:
    seed: int
    left_out: dict[str, str]  # kinds of disturbance, and why
    failures: list[str] = field(default_factory=list)
    stages: dict[str, Tally] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        values = vars(self) | {"stages": {name: tally.to_dict() for name, tally in self.stages.items()}}
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps(values, indent=1) + "\n")
        temporary.replace(path)


# What disturbs: each is given the command's process and folder, and undoes what it did when the command has ended.


@contextlib.contextmanager
def group(pid: int, folder: Path) -> Iterator[None]:
    """SIGKILL to the command and what shares its process group."""
    os.killpg(pid, signal.SIGKILL)
    yield


@contextlib.contextmanager
def interrupt(pid: int, folder: Path) -> Iterator[None]:
    """Ctrl-C, which a terminal sends to the whole process group."""
    os.killpg(pid, signal.SIGINT)
    yield


@contextlib.contextmanager
def child(pid: int, folder: Path) -> Iterator[None]:
    """SIGKILL to one worker or helper of the command, or to it where it has none; not to Ray's own processes, without
    which Ray ends the command."""
    import psutil

    found = []
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                line = " ".join(process.cmdline())
                if line.startswith(("ray::_Worker", "ray::IDLE")) or ("/ray/" not in line and "ray::" not in line):
                    found.append(process.pid)
    with contextlib.suppress(ProcessLookupError):
        os.kill(random.choice(found or [pid]), signal.SIGKILL)
    yield


@contextlib.contextmanager
def full(pid: int, folder: Path) -> Iterator[None]:
    """No byte is left on the folder's disk."""
    filler = folder.parents[1] / "filler"
    with open(filler, "wb", buffering=0) as out:
        for size in (2**20, 2**12):
            with contextlib.suppress(OSError):
                while True:
                    out.write(bytes(size))
    yield
    filler.unlink()


@contextlib.contextmanager
def denied(pid: int, folder: Path) -> Iterator[None]:
    """Nothing in the folder may be written; every second time nothing may be read either."""
    readable = random.random() < 0.5
    for path in [*reversed(paths(folder)), folder]:
        with contextlib.suppress(FileNotFoundError):
            path.chmod((0o555 if path.is_dir() else 0o444) if readable else 0)
    yield
    allow(folder)


def allow(folder: Path) -> None:
    """Everything in the folder may be read and written again."""
    if folder.exists():
        folder.chmod(0o755)
        for parent, folders, files in os.walk(folder):
            for name in folders:
                Path(parent, name).chmod(0o755)
            for name in files:
                Path(parent, name).chmod(0o644)


def paths(folder: Path) -> list[Path]:
    """Everything in a folder that may change meanwhile, what contains before what is contained."""
    return [Path(parent, name) for parent, folders, files in os.walk(folder) for name in (*folders, *files)]


DISTURBANCES = {f.__name__: f for f in (group, interrupt, child, full, denied)}


def moment(folder: Path, seconds: float) -> Callable[[], bool]:
    """Whether it has come: a random one of the seconds, or when one of the next files gets its name."""
    if random.random() < 0.5:
        at = time.monotonic() + random.uniform(0, seconds)
        return lambda: time.monotonic() >= at
    seen, number = set(paths(folder)), random.randint(1, 40)
    before = len(seen)

    def come() -> bool:
        seen.update(paths(folder))
        return len(seen) - before >= number

    return come


def begin(work: Callable[[], object], cwd: Path, streams: Path) -> int:
    """Fork a process in a group of its own for `work`, which may exit; its output goes to the folder `streams`."""
    streams.mkdir(exist_ok=True)
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)  # here and there: whoever is first
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell began this with `&`
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(streams / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.chdir(cwd)
        work()
        code = 0
    except SystemExit as done:
        code = done.code or 0
    except KeyboardInterrupt:  # before or after the command itself
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        atexit._run_exitfuncs()  # as at the end of a program
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code)


def t3d(command: tuple[str, ...]) -> None:
    from t3d.cli import main

    main(list(command))


def call(stage: Stage, cwd: Path, streams: Path, disturb: str | None = None, seconds: float = 0.0) -> tuple[int, bool]:
    """Give the command once: its exit code (negative: the signal that ended it), and whether it was disturbed."""
    folder = cwd / stage.folder
    come = moment(folder, seconds)
    pid = begin(lambda: t3d(stage.command), cwd, streams)
    end, happened = time.monotonic() + HANGS, False
    with contextlib.ExitStack() as undo:
        while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
            if disturb and not happened and come():
                happened = True
                undo.enter_context(DISTURBANCES[disturb](pid, folder))
            if time.monotonic() > end:
                raise Failure(f"it did not end within {HANGS:g} s")
            time.sleep(0.01)
    return os.waitstatus_to_exitcode(ended[1]), happened


def survive(stage: Stage, cwd: Path, streams: Path, kinds: list[str], tally: Tally) -> None:
    """Give the command until it ends, disturbed in these ways, one after another; raises Failure."""
    history = []
    for kind in (*kinds, *[None] * 5):
        code, happened = call(stage, cwd, streams, kind, tally.undisturbed["wall"] if kind else 0.0)
        stderr = (streams / "stderr").read_text()
        if happened:
            tally.disturbances[kind] += 1
            history.append(kind)
        last = (stderr.splitlines() or [""])[-1]
        refusal = code == 2 and last.startswith("error: ")
        tally.refusals += refusal
        killed = code == -signal.SIGKILL and kind in ("group", "child")
        interrupted = code == 130 and kind == "interrupt"
        expected = happened and (killed or interrupted or refusal)
        expected |= refusal and "start Ray" in last  # it does not wait for a busy machine
        if "Traceback" in stderr or not (code == 0 or expected):
            said = "\n".join(stderr.splitlines()[-30:])
            raise Failure(f"exit code {code} after {history or 'no disturbance'}:\n{said}")
        if code == 0:
            return


def sweep() -> None:
    """End what the commands left running."""
    import psutil

    while found := psutil.Process().children(recursive=True):
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.01)


@contextlib.contextmanager
def timed(into: Counter) -> Iterator[None]:
    """Add the seconds of the commands in the block, whose processes are all gone after it."""

    def processor() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    wall, before = time.monotonic(), processor()
    try:
        yield
    finally:
        wall = time.monotonic() - wall
        sweep()
        into.update(wall=wall, processor=processor() - before)


def outcome(folder: Path) -> dict:
    """What must not depend on disturbances: every answer's tokens, steps and verdict, and every student's bytes."""
    from t3d.trajectories import TrajectoryDataset

    found = {}
    for name in sorted({path.parent for path in folder.rglob("shard-*.parquet")}):
        for t in TrajectoryDataset(name):
            what = {"tokens": t.response_ids, "steps": t.step_map, "correct": t.correct}
            found |= {f"{name.relative_to(folder)} {t.prompt_id}/{t.sample} {key}": x for key, x in what.items()}
    for path in sorted(folder.rglob("student/model.safetensors")):
        found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def outcome_of(stage: Stage, cwd: Path, streams: Path) -> dict:
    """`outcome`, read in another process: this one starts no threads before it forks."""
    result = streams / "outcome.json"
    result.unlink(missing_ok=True)
    pid = begin(lambda: result.write_text(json.dumps(outcome(cwd / stage.folder))), cwd, streams)
    os.waitpid(pid, 0)
    if not result.exists():
        raise Failure(f"its output cannot be read:\n{(streams / 'stderr').read_text()}")
    return json.loads(result.read_text())


def compare(expected: dict, found: dict) -> None:
    """Raises Failure that names what differs."""
    differ = [key for key in sorted(expected.keys() | found.keys()) if expected.get(key) != found.get(key)]
    if differ:
        raise Failure(f"{len(differ)} of {len(expected)} results differ: {', '.join(differ[:5])}")


def chaos(
    stages: dict[str, Stage], disk: Path, streams: Path, kinds: list[str], most: int, end: float, report: Report
) -> Iterator[None]:
    """Disturb the stages in turn, every one at least once, until the time `end`; stops after each of them."""
    calm, cwd, expected, broken = disk / "undisturbed", disk / "disturbed", {}, False
    for number, (name, stage) in enumerate(cycle(stages.items())):
        if number >= len(stages) and time.monotonic() > end:
            return
        if number % len(stages) == 0:
            shutil.rmtree(cwd, ignore_errors=True)
            broken = False
        if name not in expected:
            report.stages[name] = Tally()
            expected[name] = undisturbed(stage, prepared(calm), streams, report.stages[name])
            print(
                f"{name}: undisturbed {dict(report.stages[name].undisturbed)}, {len(expected[name])} results",
                flush=True,
            )
        if broken:
            continue  # this stage would build on what the one before it left
        tally = report.stages[name]
        try:
            with timed(tally.disturbed):
                survive(stage, prepared(cwd), streams, random.choices(kinds, k=random.randint(1, most)), tally)
            compare(expected[name], outcome_of(stage, cwd, streams))
        except Failure as failure:
            broken = True
            report.failures.append(f"{name}: {failure}")
            print(f"FOUND {report.failures[-1]}", flush=True)
        tally.rounds += 1
        print(f"{name}: {tally.rounds} rounds, {dict(tally.disturbances)}, {tally.refusals} refusals", flush=True)
        yield


def undisturbed(stage: Stage, cwd: Path, streams: Path, tally: Tally) -> dict:
    """The outcome to compare with; the script ends where there is none."""
    try:
        with timed(tally.undisturbed):
            survive(stage, cwd, streams, [], Tally())
        return outcome_of(stage, cwd, streams)
    except Failure as failure:
        sys.exit(f"{stage.command[0]} does not end well even undisturbed: {failure}")


def prepared(cwd: Path) -> Path:
    """A working directory with the study's file."""
    cwd.mkdir(exist_ok=True)
    (cwd / "study.yaml").write_text(json.dumps(STUDY))
    return cwd


def own_disk(disk: Path) -> str | None:
    """Put a small file system at `disk` that no other process sees and that goes with this one, however it ends; why
    not, if that fails."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x00020000):  # CLONE_NEWNS
        return f"no mounts of its own: {os.strerror(ctypes.get_errno())}"
    for command in (["mount", "--make-rprivate", "/"], ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", disk]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return done.stderr.strip()
    return None


def obey_permissions(disk: Path) -> str | None:
    """Give up what lets root ignore permissions, here and in all commands; why not, if they are still ignored."""
    status = dict(re.findall(r"^(Cap\w+):\s*(\w+)$", Path("/proc/self/status").read_text(), re.MULTILINE))
    sets = [int(status[name], 16) & ~0b110 for name in ("CapEff", "CapPrm", "CapInh")]  # DAC_OVERRIDE, _READ_SEARCH
    words = [value >> shift & 0xFFFFFFFF for shift in (0, 32) for value in sets]
    ctypes.CDLL(None).capset(struct.pack("Ii", 0x20080522, 0), struct.pack("6I", *words))
    locked = disk / "locked"
    locked.mkdir(mode=0o555)
    try:
        (locked / "file").touch()
    except PermissionError:
        return None
    finally:
        shutil.rmtree(locked)
    return "this process may write everywhere"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--stages", choices=STAGES, nargs="+", default=list(STAGES), metavar="STAGE",
                        help=", ".join(STAGES))  # fmt: skip
    parser.add_argument("--minutes", type=float, default=60, help="after them no stage is begun")
    parser.add_argument("--disturb", type=int, default=4, help="most disturbances of one stage in one round")
    parser.add_argument("--kinds", choices=DISTURBANCES, nargs="+", default=list(DISTURBANCES), metavar="KIND",
                        help=", ".join(DISTURBANCES))  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of disturbances and moments")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="changes all recipes")
    parser.add_argument("--json", type=Path, help="file for the results, written after every stage")
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes
    random.seed(args.seed)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: what a killed command leaves becomes ours
    scratch = Path(tempfile.mkdtemp(prefix="t3d-chaos-", dir="/tmp"))  # short: Ray has sockets in it
    os.environ |= {"HF_HUB_OFFLINE": "1", "RAY_TMPDIR": str(scratch)}
    disk = scratch / "disk"
    disk.mkdir()
    found = {"full": own_disk(disk), "denied": obey_permissions(disk)}
    report = Report(args.seed, {kind: why for kind, why in found.items() if why})
    for kind, why in report.left_out.items():
        print(f"left out: {kind}: {why}")
    kinds = [kind for kind in args.kinds if kind not in report.left_out]
    stages = {
        name: Stage(stage.folder, (*stage.command, *args.set)) for name, stage in STAGES.items() if name in args.stages
    }

    import t3d.cli
    import t3d.generate
    import t3d.pipeline
    import t3d.study  # noqa: F401

    try:
        for _ in chaos(stages, disk, scratch / "streams", kinds, args.disturb, end, report):
            if args.json:
                report.write(args.json)
    finally:
        sweep()
        subprocess.run(["umount", "--lazy", disk], capture_output=True)
        allow(scratch)
        shutil.rmtree(scratch, ignore_errors=True)
    for name, tally in report.stages.items():
        print(f"{name}: {tally.to_dict()}")
    print(f"{len(report.failures)} failures")
    sys.exit(bool(report.failures))


if __name__ == "__main__":
    main()
