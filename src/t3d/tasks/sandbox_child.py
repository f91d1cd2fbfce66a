"""What runs inside the sandbox. `sandbox.py` passes this text to a fresh interpreter (`python -s -S -c TEXT JOB_FD`).

First the process cuts itself off: its own user, process, mount, network and IPC namespaces, a root directory that
holds the system's libraries read-only and an empty /tmp, no capabilities, resource limits and, where libseccomp is
installed, a filter of system calls. Then it plays one of three parts:

- `script`: run the program as `__main__`, with the test's input on stdin.
- `serve`: run the program, then answer calls to what it defines over a pipe.
- `check`: run the tests, in a process that the program cannot reach. What the tests call is in the program's process;
  only plain data comes back. So a program cannot patch the checker, forge a verdict, see the expected values, or
  return an object that claims to equal everything.
"""

import builtins
import collections
import contextlib
import ctypes
import decimal
import errno
import fractions
import importlib
import json
import os
import resource
import signal
import sys

PURE = (
    "math",
    "cmath",
    "collections",
    "itertools",
    "functools",
    "operator",
    "heapq",
    "bisect",
    "string",
    "re",
    "typing",
)
MESSAGE = 64 << 20  # most bytes of one message
ISOLATION_FAILED = 97
UNSHARE = {"NEWNS": 0x20000, "NEWUTS": 0x4000000, "NEWIPC": 0x8000000, "NEWPID": 0x20000000, "NEWNET": 0x40000000}
NEWUSER = 0x10000000
RDONLY, NOSUID, NODEV, REMOUNT, BIND, REC, PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
PDEATHSIG, CAPBSET_DROP, NO_NEW_PRIVS = 1, 24, 38  # prctl
# What no program needs, and what holes in kernels were found in; a name that this system does not have is passed over.
DENIED_CALLS = """
    acct add_key bpf chroot clone3 delete_module execveat fanotify_init finit_module fsconfig fsmount fsopen fspick
    init_module io_uring_enter io_uring_register io_uring_setup ioperm iopl kcmp kexec_file_load kexec_load keyctl
    lookup_dcookie memfd_create memfd_secret migrate_pages mknod mknodat modify_ldt mount mount_setattr move_mount
    move_pages msgget name_to_handle_at open_by_handle_at open_tree perf_event_open personality pidfd_getfd pivot_root
    process_madvise process_vm_readv process_vm_writev ptrace quotactl quotactl_fd reboot request_key semget setns
    shmget swapoff swapon syslog umount2 unshare userfaultfd vhangup vmsplice
""".split()  # noqa: SIM905
SOCKET_FAMILIES = (1, 2, 10)  # local, IPv4, IPv6; a network namespace does not hold vsock, netlink reaches the kernel


# --- cutting the process off ---------------------------------------------------------------------------------------


def _libc(name, *args):
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    args = [a.encode() if isinstance(a, str) else ctypes.c_ulong(a) if isinstance(a, int) else a for a in args]
    if function(*args) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def isolate(root, binds, disk):
    """New namespaces; `root` (an empty folder) is the root directory, of `disk` bytes, with `binds` in it read-only."""
    uid, gid = os.geteuid(), os.getegid()
    flags = sum(UNSHARE.values())
    real_root = uid == 0
    if real_root:  # root needs no user namespace, and may not have the right to make one
        try:
            _libc("unshare", flags)
        except OSError:
            real_root = False
    if not real_root:
        _libc("unshare", flags | NEWUSER)
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    for name in ("shmmni", "msgmni"):  # System V memory outlives its process and counts towards no limit
        with contextlib.suppress(OSError), open(f"/proc/sys/kernel/{name}", "w") as file:  # needs rights on old kernels
            file.write("0")
    _libc("mount", "none", "/", None, REC | PRIVATE, None)
    _libc("mount", "tmpfs", root, "tmpfs", NOSUID | NODEV, f"size={disk},nr_inodes=16k,mode=755")
    for path in binds:
        target = root + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), target)
            continue
        if os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
        else:
            open(target, "x").close()
        _libc("mount", path, target, None, BIND | REC, None)
        if not path.startswith("/dev/"):
            kept = os.statvfs(target).f_flag & 0xE  # nosuid, nodev, noexec may not be taken back
            _libc("mount", "none", target, None, BIND | REMOUNT | RDONLY | NOSUID | kept, None)
    os.mkdir(root + "/tmp")
    os.chmod(root + "/tmp", 0o1777)
    os.chroot(root)  # the kernel lets no chrooted process make a user namespace, so there is no way back to rights
    os.chdir("/tmp")
    return real_root


def drop_rights(real_root, user):
    if real_root:  # limits on processes do not bind root, and a user of its own shares no count with anyone
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    else:
        for capability in range(64):
            try:
                _libc("prctl", CAPBSET_DROP, capability, 0, 0, 0)
            except OSError:
                break  # past the last capability
        header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        _libc("capset", header, none)
    _libc("prctl", NO_NEW_PRIVS, 1, 0, 0, 0)
    die_with_parent()  # a change of user undoes it


def limit(limits):
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))


class _Compare(ctypes.Structure):  # libseccomp's scmp_arg_cmp
    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


def filter_calls():
    """Where libseccomp is installed, refuses `DENIED_CALLS`, and ends processes that call as another architecture."""
    try:
        lib = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        return
    allow, refuse, end, equal, greater, masked = 0x7FFF0000, 0x50000 | errno.ENOSYS, 0x80000000, 4, 6, 7
    lib.seccomp_init.restype = ctypes.c_void_p
    rules = ctypes.c_void_p(lib.seccomp_init(allow))
    lib.seccomp_attr_set(rules, 2, end)  # of another architecture: i386 and x32 have numbers of their own

    def deny(name, *comparisons):
        number = lib.seccomp_syscall_resolve_name(name.encode())
        lib.seccomp_rule_add_array(rules, refuse, number, len(comparisons), (_Compare * 1)(*comparisons))

    for name in DENIED_CALLS:
        deny(name)
    for flag in (NEWUSER, *UNSHARE.values()):
        deny("clone", _Compare(0, masked, flag, flag))
    for family in set(range(max(SOCKET_FAMILIES))) - set(SOCKET_FAMILIES):
        deny("socket", _Compare(0, equal, family))
    deny("socket", _Compare(0, greater, max(SOCKET_FAMILIES)))
    lib.seccomp_load(rules)
    lib.seccomp_release(rules)


def be_killed_first():
    """If memory runs out, the kernel is to end these processes before any other."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:  # no such file outside of Linux
        file.write("1000")


def fork_and_wait():
    """Returns in a child; the parent waits for it and exits as it did."""
    child = os.fork()
    if child:
        while True:
            pid, status = os.wait()  # the first process of a namespace also inherits orphans
            if pid == child:
                code = os.waitstatus_to_exitcode(status)
                os._exit(128 - code if code < 0 else code)
    die_with_parent()


def die_with_parent():
    if sys.platform == "linux":
        _libc("prctl", PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


# --- values between the program and the tests ----------------------------------------------------------------------

_TAGS = {list: "l", tuple: "t", set: "s", frozenset: "f", collections.deque: "q"}
_MAKE = {tag: kind for kind, tag in _TAGS.items()}
_TEXT = {fractions.Fraction: "F", decimal.Decimal: "D"}
_PARSE = {tag: kind for kind, tag in _TEXT.items()}


def encode(value, keep):
    """`value` as JSON: plain data by value, whatever else by the number that `keep` gives it."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    for kind, tag in _TAGS.items():
        if isinstance(value, kind):
            return [tag, [encode(item, keep) for item in value]]
    if isinstance(value, dict):
        return ["d", [[encode(key, keep), encode(item, keep)] for key, item in value.items()]]
    for kind, tag in _TEXT.items():
        if isinstance(value, kind):
            return [tag, str(value)]
    if isinstance(value, complex):
        return ["c", value.real, value.imag]
    if isinstance(value, (bytes, bytearray)):
        return ["b", bytes(value).hex()]
    if isinstance(value, range):
        return ["r", value.start, value.stop, value.step]
    for kind in (int, float, str):  # enumerations and such
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, type) and getattr(builtins, value.__name__, None) is value:
        return ["B", value.__name__]
    return ["h", keep(value)]


def decode(data, found):
    """The value that `encode` made `data` of; `found` turns a number into the thing it stands for."""
    if not isinstance(data, list):
        return data
    tag, *rest = data
    if tag in _MAKE:
        return _MAKE[tag](decode(item, found) for item in rest[0])
    if tag == "d":
        return {decode(key, found): decode(item, found) for key, item in rest[0]}
    if tag in _PARSE:
        return _PARSE[tag](rest[0])
    if tag == "B":
        kind = getattr(builtins, rest[0])
        return kind if isinstance(kind, type) else None
    return {"c": complex, "b": bytes.fromhex, "r": range, "h": found}[tag](*rest)


def send(pipe, message):
    pipe.write(json.dumps(message) + "\n")
    pipe.flush()


# --- the program's side --------------------------------------------------------------------------------------------


def script(job):
    sys.stdin = open(0, encoding="utf-8", errors="replace")  # noqa: SIM115
    module = type(sys)("__main__")
    sys.modules["__main__"] = module
    exec(compile(job["program"], "program.py", "exec"), module.__dict__)


def _standard(value):
    """Where the standard library has `value`, as `["m", module, name]`: the tests then use their own."""
    if type(value) is type(os):
        return ["m", value.__name__, None] if value.__name__ in sys.stdlib_module_names else None
    module, name = getattr(value, "__module__", None), getattr(value, "__name__", None)
    if module in PURE and getattr(sys.modules[module], str(name), None) is value:
        return ["m", module, name]
    return None


def serve(job, requests, replies):
    kept = []

    def keep(value):
        kept.append(value)
        return len(kept) - 1

    module = type(sys)("program")
    sys.modules["program"] = module
    try:
        exec(compile(job["program"], "program.py", "exec"), module.__dict__)
        names = {}
        for name, value in list(module.__dict__.items()):
            if not name.startswith("__"):
                names[name] = _standard(value) or encode(value, keep)
    except BaseException as error:
        return send(replies, {"error": [type(error).__name__, str(error)[:500]]})
    send(replies, {"names": names})
    for line in requests:
        operation, target, *rest = json.loads(line)
        try:
            target = kept[target]
            args = [decode(item, kept.__getitem__) for item in rest[0]]
            if operation == "call":
                value = target(*args, **{key: decode(item, kept.__getitem__) for key, item in rest[1].items()})
            else:
                value = {"get": getattr, "set": setattr, "next": next, "iter": iter, "len": len, "str": str}.get(
                    operation, lambda target, key: target[key]
                )(target, *args)
            changed = {
                i: encode(arg, keep)
                for i, arg in enumerate(args)
                if type(arg) in (list, dict, set) and encode(arg, keep) != rest[0][i]
            }
            send(replies, {"value": encode(value, keep), "changed": changed})
        except BaseException as error:
            send(replies, {"error": [type(error).__name__, str(error)[:500]]})
    return None


# --- the tests' side -----------------------------------------------------------------------------------------------


class Gone(BaseException):
    """The program's process ended, or said something that is no answer."""


class Remote:
    """Stands, in the tests, for a function or object of the program. It equals itself only."""

    def __init__(self, wire, number):
        self.__dict__.update(_wire=wire, _number=number)

    def __call__(self, *args, **kwargs):
        return self._wire.ask("call", self._number, args, kwargs)

    def __getattr__(self, name):
        return self._wire.ask("get", self._number, (name,))

    def __setattr__(self, name, value):
        self._wire.ask("set", self._number, (name, value))

    def __getitem__(self, key):
        return self._wire.ask("item", self._number, (key,))

    def __iter__(self):
        return self._wire.ask("iter", self._number, ())

    def __next__(self):
        return self._wire.ask("next", self._number, ())

    def __len__(self):
        return self._wire.ask("len", self._number, ())

    def __str__(self):
        return self._wire.ask("str", self._number, ())

    def __bool__(self):
        return True

    def __eq__(self, other):
        return isinstance(other, Remote) and other._number == self._number

    def __hash__(self):
        return hash(self._number)


class Wire:
    def __init__(self, replies, requests):
        self.replies, self.requests = replies, requests

    def find(self, number):
        return Remote(self, int(number))

    def number(self, value):
        if isinstance(value, Remote):
            return value._number
        raise TypeError(f"{type(value).__name__} cannot be passed to the program")

    def read(self):
        try:
            line = self.replies.readline(MESSAGE)
            if not line.endswith("\n"):
                raise Gone("the program ended before its tests were done")
            reply = json.loads(line)
            if "error" in reply:
                name, text = reply["error"]
                kind = getattr(builtins, name, RuntimeError)
                error = kind(text) if issubclass(kind, Exception) else Gone(f"the program raised {name}")
            else:
                error = None
        except Exception:
            raise Gone("the program garbled its answers") from None
        if error is not None:
            raise error
        return reply

    def names(self, entry):
        """What the program defines. Only the functions in `entry` may hide a builtin or a module from the tests."""
        found = {}
        for name, value in self.read()["names"].items():
            if name.startswith("__"):  # `__builtins__` would replace what the tests compute with
                continue
            if isinstance(value, list) and value[:1] == ["m"]:
                module = importlib.import_module(value[1]) if value[1] in (name, *PURE) else None
                if value[2] is None and value[1] == name and name in sys.stdlib_module_names:
                    found[name] = module
                elif value[1] in PURE and value[2] in dir(module) and not hasattr(builtins, name):
                    found[name] = getattr(module, value[2])
            elif name in entry or not (hasattr(builtins, name) or name in sys.stdlib_module_names):
                found[name] = decode(value, self.find)
        return found

    def ask(self, operation, number, args, kwargs=None):
        data = [encode(arg, self.number) for arg in args]
        named = {key: encode(value, self.number) for key, value in (kwargs or {}).items()}
        try:
            send(self.requests, [operation, number, data, named])
        except OSError:
            raise Gone("the program ended before its tests were done") from None
        reply = self.read()
        try:
            value = decode(reply["value"], self.find)
            for i, change in reply["changed"].items():  # a program may work in place
                new, old = decode(change, self.find), args[int(i)]
                if type(new) is type(old):
                    old.clear()
                    (old.extend if isinstance(old, list) else old.update)(new)
        except Exception:
            raise Gone("the program garbled its answers") from None
        return value


def check(job, replies, requests):
    """Runs the tests; returns what held and, for the first that did not, why."""
    passed, reason = [], ""
    try:
        namespace = {"__name__": "__main__", **Wire(replies, requests).names(job["entry"])}
        exec(compile(job["setup"], "setup.py", "exec"), namespace)
    except BaseException as error:
        return [False] * len(job["tests"]), describe(error)
    for number, test in enumerate(job["tests"], start=1):
        try:
            exec(compile(test, f"test {number}", "exec"), namespace)
            passed.append(True)
        except BaseException as error:
            passed.append(False)
            reason = reason or f"test {number}: {describe(error)}"
    return passed, reason


def describe(error):
    name = "" if isinstance(error, Gone) else type(error).__name__
    text = " ".join(str(error).split())[:200]
    return f"{name}: {text}" if name and text else name or text


# -------------------------------------------------------------------------------------------------------------------


def lowered(fd):
    """`fd` under a low number: what a program does must not depend on how many files the parent had open."""
    low = os.dup(fd)
    os.close(fd)
    return low


def main():
    die_with_parent()
    with open(int(sys.argv[1]), encoding="utf-8") as file:
        job = json.load(file)
    pipes = [open(lowered(fd), mode, encoding="utf-8", errors="surrogatepass") for fd, mode in zip(job["fds"], "rw")]  # noqa: B905, SIM115
    for name in PURE:
        importlib.import_module(name)
    be_killed_first()
    real_root = None
    if job["root"] is not None:
        try:
            real_root = isolate(job["root"], job["binds"], job["disk"])
        except OSError as error:
            os.write(1, str(error).encode())
            os._exit(ISOLATION_FAILED)
    fork_and_wait()
    if job["root"] is not None:
        drop_rights(real_root, job["user"])
        fork_and_wait()
    else:
        os.chdir(job["folder"])
    os.environ.clear()
    sys.argv = ["program.py"]
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(0)
    builtins.exit = builtins.quit = sys.exit  # what `site` would have set up
    part = {"script": script, "serve": serve, "check": check}[job["part"]]
    filter_calls()
    limit(job["limits"])
    if part is check:
        result = os.dup(1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.write(result, json.dumps(check(job, *pipes)).encode())
        os._exit(0)
    part(job, *pipes)


if __name__ == "__main__":
    main()
