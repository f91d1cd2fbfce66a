import contextlib
import ctypes
import errno
import os
import platform
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import psutil
import pytest

from t3d.errors import T3DError
from t3d.tasks import sandbox, sandbox_child
from t3d.tasks.sandbox import Sandbox, _has_libseccomp, _isolation
from tests.tasks.escapes import PROBES
from tests.tasks.hostile_programs import HOSTILE, SLOW

ISOLATION, WHY = _isolation()
TEST = "assert f(2) == 4"
SQUARE = "def f(x):\n    return x * x\n"
isolated = pytest.mark.skipif(ISOLATION == "none", reason=f"no isolation here: {WHY}")


@pytest.fixture
def box():
    return Sandbox(allow_unsandboxed=True)


@pytest.fixture
def hurry(monkeypatch):
    monkeypatch.setattr(sandbox, "START", 1.0)
    monkeypatch.setattr(sandbox, "wall", lambda seconds: 8.0)


def test_verdicts(box):
    tests = ["assert f(2) == 4", "assert f(3) == 10", "assert f(-1) == 1"]
    outcome = box.function(SQUARE, tests)
    assert outcome.passed == (True, False, True)
    assert not outcome.ok
    assert outcome.reason == "test 2: AssertionError"
    assert box.function(SQUARE, tests[:1]).ok
    assert not box.function(SQUARE, []).ok  # nothing was tested
    assert [box.function(SQUARE, tests) for _ in range(3)] == [outcome] * 3


@pytest.fixture(scope="module")
def outcomes():
    """What came of every attack, run side by side, and how many processes were left afterwards."""
    if ISOLATION == "none":
        pytest.skip(f"no isolation here: {WHY}")
    before, box = _processes(), Sandbox()
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(8) as pool:
        patch.setattr(sandbox, "START", 1.0)
        patch.setattr(sandbox, "wall", lambda seconds: 20.0)
        found = dict(zip(HOSTILE, pool.map(lambda text: box.function(text, [TEST]), HOSTILE.values()), strict=True))
        patch.setattr(sandbox, "wall", lambda seconds: 8.0)
        found |= dict(zip(SLOW, pool.map(lambda text: box.function(text, [TEST]), SLOW.values()), strict=True))
    return found | {"processes left": _fewer_than(before + 1)}


@pytest.mark.parametrize("attack", [*HOSTILE, *SLOW])
def test_hostile_programs_fail_cleanly(outcomes, attack):
    outcome = outcomes[attack]
    assert outcome.passed == (False,)
    assert outcome.reason
    assert "\n" not in outcome.reason


@isolated
def test_the_kernel_would_end_programs_first(box):
    """When memory runs out: what a program may take in many processes together has no limit of its own."""
    marked = []

    def look():
        deadline = time.monotonic() + 20
        while "1000" not in marked and time.monotonic() < deadline:
            for process in _sandboxed():
                with contextlib.suppress(OSError):
                    marked.append((process / "oom_score_adj").read_text().strip())

    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        box.function("import time\ntime.sleep(1)\n" + SQUARE, [TEST])
        looking.result()
    assert "1000" in marked


def test_a_sandbox_that_could_not_be_set_up_is_no_verdict(box, monkeypatch):
    starts, real = [], sandbox._Process

    def failing(isolation, part, job, *args, **kwargs):
        starts.append(part)
        if len(starts) <= 2:
            monkeypatch.setattr(sandbox, "CHILD", f"import os\nos._exit({sandbox.ISOLATION_FAILED})")
        try:
            return real(isolation, part, job, *args, **kwargs)
        finally:
            monkeypatch.setattr(sandbox, "CHILD", text)

    text = sandbox.CHILD
    monkeypatch.setattr(sandbox, "_Process", failing)
    assert box.function(SQUARE, [TEST]).ok
    assert starts == ["serve", "check"] * 2
    starts.clear()
    assert box.script("print(5)", [""], ["5"]).ok
    assert starts == ["script"] * 3
    starts.clear()
    monkeypatch.setattr(sandbox, "TRIES", 1)
    assert box.function(SQUARE, [TEST]).reason == sandbox.NO_SANDBOX


def test_nothing_is_left_of_them(outcomes):
    assert outcomes["processes left"]


def _fewer_than(count: int, seconds: float = 60.0) -> bool:
    """Waits until so many sandboxed processes are left: the kernel takes them down in its own time."""
    deadline = time.monotonic() + seconds
    while _processes() >= count and time.monotonic() < deadline:
        time.sleep(0.05)
    return _processes() < count


def _processes() -> int:
    """How many sandboxed processes there are."""
    count = 0
    for process in _sandboxed():
        with contextlib.suppress(OSError):
            count += "Z" not in (process / "stat").read_text().rpartition(")")[2].split()[0]
    return count


def _sandboxed() -> list[Path]:
    """Processes of the users that sandboxes run as, or, where they run as us, interpreters with our text."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            text = b"cutting the process off" in (process / "cmdline").read_bytes()
            if text or process.stat().st_uid >= 1 << 30:
                found.append(process)
    return found


LOOKS_OUT = """
import os, socket
def writes(paths):
    done = []
    for path in paths:
        try:
            open(path, "w").write("x")
            done.append(path)
        except OSError:
            pass
    return done
def reads(paths):
    return [path for path in paths if os.path.exists(path)]
def environment():
    found = dict(os.environ)
    for pid in ["self", *range(1, 50)]:
        try:
            found[pid] = open(f"/proc/{pid}/environ").read()
        except OSError:
            pass
    return found
def connects(port):
    for family, address in ((socket.AF_INET, ("127.0.0.1", port)), (socket.AF_INET, ("1.1.1.1", 53))):
        try:
            with socket.socket(family) as s:
                s.settimeout(2)
                s.connect(address)
                return True
        except OSError:
            pass
    return False
def rights():
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    tries = [libc.unshare(0x10000000), libc.mount(b"none", b"/tmp", b"tmpfs", 0, None), libc.chroot(b"/tmp")]
    return [*tries, libc.setgroups(0, None), libc.sethostname(b"x", 1)]
def big():
    with open("/tmp/big", "wb") as f:
        for _ in range(200):
            f.write(bytes(1 << 20))
"""


@isolated
def test_a_program_sees_and_reaches_nothing(box, tmp_path, monkeypatch):
    monkeypatch.setenv("T3D_SECRET", "hunter2")
    secret = tmp_path / "secret"
    secret.write_text("x")
    home = str(Path.home())
    with socket.create_server(("127.0.0.1", 0)) as server:
        outside = [str(tmp_path / "new"), str(secret), home + "/x", "/usr/x", "/etc/x", sys.prefix + "/x"]
        hidden = [str(tmp_path), home + "/.bashrc", "/etc/passwd", "/proc/1", "/sys", str(Path.cwd())]
        tests = [
            f"assert writes({outside!r}) == []",
            f"assert reads({hidden!r}) == []",
            "assert environment() == {}",
            f"assert connects({server.getsockname()[1]}) is False",
            "assert rights() == [-1] * 5",
            "assert writes(['/tmp/mine']) == ['/tmp/mine']",
            "try:\n    big()\nexcept OSError:\n    pass\nelse:\n    raise AssertionError('no limit')",
        ]
        outcome = box.function(LOOKS_OUT, tests, seconds=5)
    assert outcome.ok, outcome
    assert secret.read_text() == "x"
    assert not (tmp_path / "new").exists()
    assert not Path("/tmp/mine").exists()


ESCAPES = {  # a probe of escapes.py -> what it is to give
    "descriptors()": [],
    "namespaces()": [],
    "other_processes()": [],
    "sockets(LISTENER)": [],
    "files()": [],
    "full_disk()": 0,
    "many_files()": False,
    "limits()": ([], (1, 1)),
    "privileges()": ([], 1, 2),  # no new ones, and the filter is on
    "kernel_interfaces()": [],
    "other_architectures()": [],
}
FILTERED = {"privileges()", "kernel_interfaces()", "other_architectures()", "sockets(LISTENER)"}


@contextlib.contextmanager
def only(isolation: str):
    """Programs are isolated in this way alone; skips where it does not work."""
    with pytest.MonkeyPatch.context() as patch:
        real = sandbox._try
        patch.setattr(sandbox, "_try", lambda name: real(name) if name == isolation else "not tried")
        sandbox._working.cache_clear()
        try:
            if _isolation()[0] != isolation:
                pytest.skip(f"{isolation} does not work here: {_isolation()[1]}")
            yield
        finally:
            sandbox._working.cache_clear()


@pytest.fixture(scope="module", params=["namespaces", "bwrap"])
def escaped(request):
    """What came of every escape, tried by one program."""
    if platform.machine() != "x86_64":
        pytest.skip("the escapes know the numbers of x86-64")
    name = f"t3d-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("\0" + name)
        listener.listen()
        tests = [f"x = {probe.replace('LISTENER', repr(name))}\nassert x == {ok!r}, x" for probe, ok in ESCAPES.items()]
        with only(request.param):
            first = Sandbox().function(PROBES, tests, seconds=15)
    return request.param, first, dict(zip(ESCAPES, first.passed, strict=True))


@pytest.mark.parametrize("probe", ESCAPES)
def test_no_escape_gets_through(escaped, probe):
    isolation, outcome, passed = escaped
    if (isolation, probe) == ("bwrap", "many_files()"):
        pytest.skip("bubblewrap limits bytes, not files")
    if probe in FILTERED and not _has_libseccomp():
        pytest.skip("libseccomp is not installed")
    assert passed[probe], outcome.reason


@isolated
@pytest.mark.skipif(not _has_libseccomp(), reason="libseccomp is not installed")
def test_a_kernel_that_takes_no_filter(caplog):
    """The sandbox holds all the same, and says what is missing."""

    def without(pipe):
        lib, refuse = ctypes.CDLL("libseccomp.so.2"), 0x50000 | errno.EINVAL
        lib.seccomp_init.restype = ctypes.c_void_p
        rules = ctypes.c_void_p(lib.seccomp_init(0x7FFF0000))
        way = (sandbox_child._Compare * 1)(sandbox_child._Compare(0, 4, 22))  # prctl(PR_SET_SECCOMP, ...)
        lib.seccomp_rule_add_array(rules, refuse, lib.seccomp_syscall_resolve_name(b"seccomp"), 0, None)
        lib.seccomp_rule_add_array(rules, refuse, lib.seccomp_syscall_resolve_name(b"prctl"), 1, way)
        assert lib.seccomp_load(rules) == 0
        caplog.clear()
        sandbox._working.cache_clear()
        pipe.send((_isolation()[0], Sandbox().function(SQUARE, [TEST]).ok, caplog.messages))

    ours, theirs = (context := get_context("fork")).Pipe()
    process = context.Process(target=without, args=(theirs,))
    process.start()
    assert ours.poll(120)
    isolation, ok, messages = ours.recv()
    process.join()
    assert (isolation, ok) == (ISOLATION, True)
    assert len(messages) == 1
    assert "without a filter of system calls" in messages[0]


def test_names_of_the_program_do_not_reach_the_checker(box):
    cheat = (
        "def abs(x): return 0\ndef sorted(x): return [1]\nclass math:\n    isclose = staticmethod(lambda a, b: True)\n"
    )
    tests = ["assert abs(f(2) - 4) < 1", "assert sorted([f(2)]) == [4]", "import math\nassert math.isclose(f(2), 4)"]
    for text in ("5", "[5]"):
        assert box.function(cheat + f"def f(x): return {text}", tests).passed == (False,) * 3
    assert box.function(cheat + SQUARE, tests).ok
    helper = "def double(x): return 2 * x\n"
    assert not box.function("def double(x): return 7\ndef f(x): return 7", ["assert f(2) == double(2)"], helper).ok
    assert box.function("def double(x): return 7\ndef f(x): return 4", ["assert f(2) == double(2)"], helper).ok
    assert box.function("def sum(a, b): return a * b", ["assert sum(2, 3) == 6"], entry=["sum"]).ok


def test_values_come_through(box):
    program = """
import collections, math, re
from fractions import Fraction
from math import isclose
class Node:
    def __init__(self, value): self.value, self.left = value, None
    def double(self): return 2 * self.value
def depth(node): return 0 if node is None else 1 + depth(node.left)
def same(x, **named): return named.get("y", x)
def count(n): yield from range(n)
def grow(items): items.append(len(items))
def fails(kind): raise {"v": ValueError, "k": KeyError}[kind]("no")
Point = collections.namedtuple("Point", "x y")
LIMIT = 7
"""
    values = (
        "None, True, 2, 2**200, 0.1, 'é\\u2028\"', (1, (2,)), {1, 2}, frozenset({3}), {(1, 2): [3]}, 1j, b'x', range(3)"
    )
    tests = [
        f"for v in [{values}]:\n    w = same(v)\n    assert w == v and type(w) is type(v), v",
        "assert same(float('inf')) == float('inf') and str(same(float('nan'))) == 'nan'",
        "assert same(1, y=2) == 2 and LIMIT == 7",
        "a = Node(1); a.left = Node(2); a.left.left = Node(3)\nassert depth(a) == 3",
        "assert a.left.value == 2 and a.left.left.double() == 6",
        "assert list(count(3)) == [0, 1, 2] and Point(1, 2) == (1, 2)",
        "x = [5]; grow(x); grow(x)\nassert x == [5, 1, 2]",
        "try:\n    fails('v')\nexcept ValueError as e:\n    assert str(e) == 'no'\nelse:\n    raise AssertionError",
        "assert math.pi > 3 and isclose(1, 1 + 1e-12) and re.match('a', 'ab')",
        "assert same(int) is int",
    ]
    outcome = box.function(program, tests, seconds=5)
    assert outcome.passed == (True,) * len(tests), outcome


def test_scripts(box):
    add = "a, b = map(int, input().split())\nprint(a + b)\n"
    assert box.script(add, ["2 3\n", "10 20"], ["5\n", "30"]).ok
    assert box.script("import sys\nprint(sum(map(int, sys.stdin.read().split())))\nsys.exit()", ["2 3"], ["5"]).ok
    assert box.script("if __name__ == '__main__':\n    print(5)", [""], [" 5 \n\n"]).ok
    big = "1 " * 300_000
    assert box.script("print(input())", [big], [big]).ok
    assert box.script("print(open(0).read())", ["x"], ["x"]).ok
    outcome = box.script(add, ["2 3", "1 1", "2 2"], ["5", "3", "4"])
    assert outcome.passed == (True, False, False)
    assert outcome.reason == "test 2: printed '2'"


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("print(5)\n1/0", "ended with exit code 1"),
        ("import sys\nprint(5)\nsys.exit(3)", "ended with exit code 3"),
        ("", "printed ''"),
        ("print(5", "ended with exit code 1"),
        ("while True: print('x' * 1000)", "bytes of output"),
        ("while True: pass", "out of time"),
        ("import time\ntime.sleep(99)", "out of time"),
        ("import os\nif os.fork(): print(5)\nelse:\n    while True: pass", ""),
        ("x = bytearray(1 << 34)\nprint(5)", "ended with exit code 1"),
    ],
)
@isolated
def test_bad_scripts(box, hurry, program, reason):
    outcome = box.script(program, [""], ["5"])
    assert outcome.ok is (reason == "")
    assert reason in outcome.reason


@isolated
def test_the_parents_open_files_change_no_verdict(box):
    attacks = ["closes the pipe", "garbage on the pipe", "forges names and answers"]
    found = [box.function(HOSTILE[attack], [TEST]) for attack in attacks]
    with contextlib.ExitStack() as stack:
        for _ in range(80):  # the pipes get numbers that no process of the sandbox could open
            stack.enter_context(open(os.devnull))
        assert [box.function(HOSTILE[attack], [TEST]) for attack in attacks] == found
    assert not any(outcome.ok for outcome in found)


def test_many_at_once_give_the_same(box):
    programs = [SQUARE, "def f(x): return 5", "exit(0)", "def f(x): return [x"] * 4
    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(lambda program: box.function(program, ["assert f(2) == 4"]), programs))
    assert [outcome.ok for outcome in outcomes] == [True, False, False, False] * 4
    assert outcomes[:4] == outcomes[4:8] == outcomes[8:12] == outcomes[12:]


def test_no_isolation_needs_a_flag(monkeypatch):
    monkeypatch.setattr(
        sandbox, "_isolation", lambda: ("none", "namespaces: not permitted; bubblewrap is not installed")
    )
    with pytest.raises(T3DError, match=r"not permitted.*task\.allow_unsandboxed=true"):
        Sandbox()
    box = Sandbox(allow_unsandboxed=True)
    assert box.function(SQUARE, ["assert f(2) == 4"]).ok
    assert box.script("print(1)", [""], ["1"]).ok
    for name in ("exit(0)", "claims to equal all", "patches the checker", "writes a report on every descriptor"):
        assert box.function(HOSTILE[name], ["assert f(2) == 4"]).passed == (False,)


@isolated
def test_a_probe_that_fails_is_tried_again(monkeypatch):
    """And where every one fails, what is found then is not kept: the system may have been busy."""
    real, tries = sandbox._probe, []

    def busy(isolation):
        tries.append(isolation)
        return "a program did not end within 60 s" if len(tries) % sandbox.TRIES else real(isolation)

    sandbox._working.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(sandbox, "_probe", lambda isolation: "a program did not end within 60 s")
            patch.setattr(sandbox.time, "sleep", lambda seconds: None)
            with pytest.raises(T3DError, match=r"namespaces: a program did not end within 60 s"):
                Sandbox()
        monkeypatch.setattr(sandbox, "_probe", busy)
        assert Sandbox().isolation == ISOLATION
        assert tries == [tries[0]] * sandbox.TRIES
        assert Sandbox().isolation == ISOLATION
        assert len(tries) == sandbox.TRIES  # what works is known from then on
    finally:
        sandbox._working.cache_clear()


@isolated
def test_a_probe_that_does_not_end_is_no_refusal(monkeypatch):
    monkeypatch.setattr(sandbox, "PROBE", "import time\ntime.sleep(600)")
    monkeypatch.setattr(sandbox, "wall", lambda seconds: 1.0)
    assert sandbox._probe(ISOLATION) == "a program did not end within 1 s"


def test_bubblewrap():
    with only("bwrap"):
        box = Sandbox()
        assert box.function(SQUARE, ["assert f(2) == 4"]).ok
        paths = [str(Path.home() / ".bashrc"), "/etc/passwd", str(Path.cwd())]
        assert box.function(LOOKS_OUT, [f"assert reads({paths!r}) == []", "assert environment() == {}"], seconds=5).ok
        assert box.function(LOOKS_OUT, ["assert writes(['/usr/x']) == [] and connects(1) is False"], seconds=5).ok
        for name in ("exit(0)", "memory bomb", "kills its neighbours"):
            assert not box.function(HOSTILE[name], ["assert f(2) == 4"]).ok


def test_nothing_outlives_a_killed_parent():
    if ISOLATION == "none":
        pytest.skip(WHY)
    code = (
        "from t3d.tasks.sandbox import Sandbox\n"
        "box = Sandbox()\n"  # its probe is a sandboxed process, too, and is over after this
        "print('ready', flush=True)\n"
        "box.function('import time\\ntime.sleep(600)', ['assert f(2) == 4'], seconds=600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "ready\n"
        found, deadline = [], time.monotonic() + 120
        while len(found) < 6:  # the program's and the tests': one outside, the first one inside, and its child
            assert parent.poll() is None
            assert time.monotonic() < deadline, found
            time.sleep(0.1)
            found = psutil.Process(parent.pid).children(recursive=True)
        parent.kill()
    assert psutil.wait_procs(found, timeout=60)[1] == []
