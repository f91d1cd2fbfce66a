# ruff: noqa: E501
"""A program that tries the ways out of the sandbox that we know; each function gives what it reached: nothing, if all
is well.

System calls go by their numbers on x86-64, since Python and the C library do not offer them all.
"""

PROBES = '''
import ctypes, errno, mmap, os, resource, signal, socket, stat, struct
libc = ctypes.CDLL(None, use_errno=True)
BYTES = ctypes.create_string_buffer(bytes(4096), 4096)


def call(number, *args):
    return libc.syscall(ctypes.c_long(number), *(ctypes.c_void_p(a) if isinstance(a, int) else a for a in args))


def in_a_child(act):
    """What `act` returns, run in a process of its own; None if that does not live to say it."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, repr(act()).encode())
        except BaseException as error:
            os.write(write, f"None # {error}".encode())
        os._exit(0)
    os.close(write)
    text = os.read(read, 4096).decode()
    os.close(read)
    os.waitpid(child, 0)
    return eval(text) if text else None


def calls(table):
    """The names of the system calls that did something."""
    return [name for name, args in table.items() if in_a_child(lambda args=args: call(*args)) not in (None, -1)]


def kernel_interfaces():
    return calls({
        "io_uring_setup": (425, 8, BYTES), "userfaultfd": (323, 1), "bpf": (321, 0, BYTES, 72),
        "perf_event_open": (298, BYTES, 0, -1, -1, 0), "keyctl": (250, 0, -3, 1), "add_key": (248, b"user", b"x", b"y", 1, -3),
        "memfd_create": (319, b"x", 0), "execveat": (322, -100, b"/usr/bin/true", 0, 0, 0),
        "modify_ldt": (154, 0, BYTES, 16), "personality": (135, 0x0040000), "kcmp": (312, os.getpid(), os.getpid(), 0, 0, 1),
        "name_to_handle_at": (303, -100, b"/tmp", BYTES, BYTES, 0), "shmget": (29, 0, 4096, 0o1666), "syslog": (103, 3, BYTES, 64),
        "memfd_secret": (447, 0), "fanotify_init": (300, 0, 0), "quotactl": (179, 0x800001, 0, 0, BYTES),
    })


def namespaces():
    flags = dict(user=1 << 28, mount=1 << 17, network=1 << 30, process=1 << 29)
    found = calls({f"unshare {name}": (272, flag) for name, flag in flags.items()})
    # clone returns twice: what comes of it ends at once
    def clone(number, *args):
        made = call(number, *args)
        return os._exit(0) if made == 0 else made
    for name, flag in flags.items():
        packed = ctypes.create_string_buffer(struct.pack("<11Q", flag, 0, 0, 0, signal.SIGCHLD, *[0] * 6))
        for number, args in ((56, (flag | signal.SIGCHLD, 0, 0, 0, 0)), (435, (packed, 88))):
            if in_a_child(lambda number=number, args=args: clone(number, *args)) not in (None, -1):
                found.append(f"clone {number} {name}")
    return found + calls({
        "setns": (308, 0, 0), "mount": (165, b"none", b"/tmp", b"tmpfs", 0, 0), "umount": (166, b"/", 2), "chroot": (161, b"/tmp"),
        "pivot_root": (155, b"/tmp", b"/tmp"), "fsopen": (430, b"tmpfs", 0), "open_tree": (428, -100, b"/", 1), "move_mount": (429, 0, b"", 0, b"", 0),
        "mknod": (133, b"/tmp/null", stat.S_IFCHR | 0o666, os.makedev(1, 3)),
    })


def other_processes():
    parent, local = os.getppid(), struct.pack("<QQ", ctypes.addressof(BYTES), 8)
    found = calls({
        "ptrace": (101, 16, parent, 0, 0), "ptrace seize": (101, 0x4206, parent, 0, 0),
        "process_vm_readv": (310, parent, local, 1, local, 1, 0), "process_vm_writev": (311, parent, local, 1, local, 1, 0),
    })
    handle = call(434, parent, 0)
    if handle >= 0:
        found += ["pidfd_getfd"] if call(438, handle, 1, 0) >= 0 else []
        os.close(handle)
    return found + [pid for pid in range(9, 400) if call(62, pid, 0) == 0 and pid > os.getpid()]


def other_architectures():
    """32-bit calls have other numbers, so a filter of the 64-bit ones alone would pass them by."""
    def machine(code):
        page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        page.write(code)
        return ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
    by_interrupt = in_a_child(lambda: machine(bytes([0x53, 0xB8, 20, 0, 0, 0, 0xCD, 0x80, 0x5B, 0xC3])))
    by_x32 = in_a_child(lambda: call(0x40000000 + 39))
    return [name for name, got in (("int 0x80", by_interrupt), ("x32", by_x32)) if got is not None and got > 0]


def sockets(name):
    """Kinds of sockets that leave the network namespace or reach into the kernel, and a listener outside of it."""
    found = []
    for family in range(1, 46):
        for kind in (1, 2, 3, 5):
            try:
                socket.socket(family, kind).close()
                found.append(family)
                break
            except OSError:
                pass
    with socket.socket(socket.AF_UNIX) as abstract:
        try:
            abstract.connect(chr(0) + name)
            found.append("abstract")
        except OSError:
            pass
    return [family for family in found if family not in (1, 2, 10)]


def descriptors():
    """Open files that are not the standard streams or the two pipes: a folder would be a way out of the root."""
    found = []
    for fd in range(1024):
        try:
            mode = os.fstat(fd).st_mode
        except OSError:
            continue
        null = stat.S_ISCHR(mode) and os.fstat(fd).st_rdev == os.makedev(1, 3)
        if not (null or stat.S_ISFIFO(mode)):
            found.append((fd, oct(mode)))
    return found


def files():
    tried = ["/proc/self/mem", "/proc/1/root", "/proc/sys/kernel/core_pattern", "/dev/shm", "/dev/kmsg", "/dev/ptmx", "/dev/tty",
             "/sys/kernel", "/run", "/tmp/../../etc/passwd", "/.."  + "/home"]
    found = [path for path in tried if os.path.lexists(path)]
    os.symlink("/../../../../etc/shadow", "/tmp/link")
    found += ["link"] if os.path.exists("/tmp/link") else []
    folders = ["/", "/dev", "/usr", "/usr/lib", "/usr/bin", "/lib", *("/" + name for name in os.listdir("/"))]
    return found + [path for path in folders if path != "/tmp" and os.access(path, os.W_OK)]


def many_files():
    """Whether as many files can be made as one likes: they take the kernel's memory."""
    count = 0
    os.mkdir("/tmp/many")
    try:
        for count in range(100_000):
            os.close(os.open(f"/tmp/many/{count}", os.O_CREAT | os.O_WRONLY))
    except OSError:
        pass
    return count > 50_000


def full_disk():
    """How many bytes of files there can be, where that is too many."""
    made = 0
    try:
        with open("/tmp/sparse", "wb") as file:
            file.truncate(1 << 40)
            made = 1 << 40
    except OSError:
        pass
    try:
        for number in range(32):
            with open(f"/tmp/full{number}", "wb", buffering=0) as file:
                for _ in range(8):
                    made += file.write(bytes(1 << 20))
    except OSError:
        pass
    return made if made > 70 << 20 else 0


def limits():
    found = []
    for name in ("CPU", "AS", "FSIZE", "NOFILE", "CORE", "NPROC"):
        which = getattr(resource, "RLIMIT_" + name)
        try:
            resource.setrlimit(which, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            found.append(name)
        except (OSError, ValueError):
            pass
    return found, resource.getrlimit(resource.RLIMIT_CORE)


def privileges():
    """A program that belongs to root and says so when it starts (su, sudo, mount) gives nothing."""
    gained = [path for path in ("/usr/bin/su", "/usr/bin/passwd", "/bin/mount") if os.path.exists(path)
              and os.statvfs(path).f_flag & os.ST_NOSUID == 0]
    return gained, libc.prctl(39, 0, 0, 0, 0), libc.prctl(21, 0, 0, 0, 0)
'''
