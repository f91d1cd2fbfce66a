"""Programs that want to pass `assert f(2) == 4` without a right `f`, or to do harm."""

HOSTILE = {
    "exit(0)": """
exit(0)
""",
    "sys.exit": """
import sys
sys.exit()
""",
    "os._exit": """
import os
os._exit(0)
""",
    "os._exit in the call": """
import os
def f(x):
    os._exit(0)
""",
    "raise SystemExit": """
raise SystemExit
""",
    "SystemExit in the call": """
def f(x):
    raise SystemExit(0)
""",
    "sys.exit in a thread": """
import sys, threading
threading.Thread(target=sys.exit).start()
""",
    "os._exit in a thread": """
def f(x):
    return 5
import os, threading
threading.Timer(.05, os._exit, (0,)).start()
""",
    "prints the expected text": """
print('4')
print('[[true], ""]')
print('all tests passed')
""",
    "writes a report on every descriptor": """
import os
for fd in range(64):
    try:
        os.write(fd, b'[[true], ""]\\n')
    except OSError:
        pass
""",
    "forges an answer": """
import os
for fd in range(64):
    try:
        os.write(fd, b'{"names": {}}\\n{"value": true}\\n')
    except OSError:
        pass
""",
    "claims to equal all": """
class A:
    def __eq__(self, other): return True
    def __bool__(self): return True
def f(x): return A()
""",
    "a number that equals all": """
class A(int):
    def __eq__(self, other): return True
def f(x): return A(5)
""",
    "a list that equals all": """
class A(list):
    def __eq__(self, other): return True
def f(x): return A([5])
""",
    "mock.ANY": """
from unittest.mock import ANY
def f(x): return ANY
""",
    "mock.ANY by name": """
from unittest.mock import ANY as f
""",
    "MagicMock": """
from unittest.mock import MagicMock as f
""",
    "patches the checker": """
import sys, builtins, json
main = sys.modules['__main__']
for name in ('check', 'send', 'describe', 'decode'):
    setattr(main, name, lambda *a, **k: True)
builtins.AssertionError = type('E', (Exception,), {})
json.dumps = lambda *a, **k: '[[true], ""]'
builtins.exec = builtins.compile = builtins.isinstance = lambda *a, **k: True
def f(x): return 5
""",
    "walks the frames": """
import sys
frame = sys._getframe()
while frame:
    frame.f_globals['check'] = lambda *a: ([True], '')
    frame.f_locals.update(passed=[True], tests=[])
    frame = frame.f_back
def f(x): return 5
""",
    "looks for the expected value": """
import gc
seen = [o for o in gc.get_objects() if isinstance(o, (str, list)) and 'assert f(2)' in str(o)[:10000]]
def f(x): return 4 if any(s is not None for s in seen if 'gc.get' not in str(s)) else 5
""",
    "traces": """
import sys
sys.settrace(lambda *a: None)
sys.setprofile(lambda *a: None)
def f(x): return 5
""",
    "not Python": """
def f(x:
""",
    "nothing": """

""",
    "raises": """
1/0
""",
    "another name": """
def g(x): return x * x
""",
    "garbage on the pipe": """
import os
for fd in range(3, 64):
    try: os.write(fd, b'\\xff\\x00{}\\n')
    except OSError: pass
""",
    "closes the pipe": """
import os
os.closerange(0, 64)
def f(x):
    return x * x
""",
    "memory bomb": """
x = 'a' * (1 << 34)
def f(x):
    return x * x
""",
    "memory bomb in steps": """
x = []
while True: x.append(bytearray(1 << 24))
def f(x):
    return x * x
""",
    "deep recursion": """
import sys
sys.setrecursionlimit(10**7)
def f(x): return f(x)
""",
    "crash": """
import ctypes
ctypes.string_at(0)
def f(x):
    return x * x
""",
    "huge integer": """
def f(x): return 10 ** 300000
""",
    "deep value": """
def f(x):
    y = []
    for _ in range(100000): y = [y]
    return y
""",
    "ends like a sandbox that did not start": """
import os
os._exit(97)
""",
    "forges names and answers": """
import os
for fd in range(3, 64):
    try: os.write(fd, b'{"names": {"f": ["h", 0], "abs": ["h", 0]}}\\n{"value": ["B", "object"], "changed": {}}\\n')
    except OSError: pass
""",
    "forges what the tests compute with": """
import os
def f(x): return 5
for fd in range(3, 64):
    try: os.write(fd, b'{"names": {"f": ["B", "object"], "__builtins__": ["d", []]}}\\n')
    except OSError: pass
""",
    "import hooks": """
import builtins, json, sys
class Finder:
    def find_spec(self, *args): return None
sys.meta_path.insert(0, Finder())
sys.addaudithook(lambda *args: None)
json.dumps = lambda *args: '{"value": 4, "changed": {}, "passed": [true]}'
builtins.compile = lambda *args: (lambda: None).__code__
def f(x): return 5
""",
    "at the end": """
import atexit, os
for fd in range(64):
    atexit.register(lambda fd=fd: os.write(fd, b'[[true], ""]'))
def f(x): return 5
""",
    "stops its group": """
import os, signal
def f(x):
    for _ in range(1000):
        for target in (0, os.getppid()):
            for number in (signal.SIGUSR1, signal.SIGSTOP, signal.SIGALRM):
                try: os.kill(target, number)
                except OSError: pass
""",
    "a number that takes for ever to read": """
from decimal import Decimal
from fractions import Fraction
class F(Fraction):
    def __str__(self): return '1e99999999'
def f(x): return F(4)
""",
    "a deep answer on the pipe": """
import os
for fd in range(3, 64):
    try: os.write(fd, b'{"names": ' + b'[' * 60000 + b'\\n')
    except OSError: pass
""",
    "memory that outlives its process": """
import ctypes
libc = ctypes.CDLL(None)
libc.shmat.restype = ctypes.c_void_p
taken = 0
while taken < 1 << 30:
    segment = libc.shmget(0, ctypes.c_size_t(1 << 25), 0o1666)
    if segment < 0: raise MemoryError('no more')
    address = libc.shmat(segment, None, 0)
    ctypes.memset(ctypes.c_void_p(address), 1, 1 << 25)
    libc.shmdt(ctypes.c_void_p(address))
    taken += 1 << 25
def f(x): return 4
""",
    "rewrites the arguments of the tests": """
def f(x):
    import gc
    for o in gc.get_objects():
        if type(o) is dict and 'tests' in o: o['tests'] = []
    return 5
""",
    "kills its neighbours": """
import os, signal
os.kill(-1, signal.SIGKILL) if os.getpid() < 9 else None
def f(x): return 5
""",
}

# Programs that never end by themselves.
SLOW = {
    "endless loop": """
while True: pass
""",
    "endless loop in the call": """
def f(x):
    while True: pass
""",
    "ignores its limit": """
import signal
for s in range(1, 32):
    try: signal.signal(s, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass
""",
    "sleeps": """
import time
time.sleep(1000)
""",
    "endless output": """
while True: print('x' * 10000)
""",
    "fork bomb": """
import os
while True:
    try: os.fork()
    except OSError: pass
""",
    "threads": """
import threading, time
while True:
    try: threading.Thread(target=time.sleep, args=(99,)).start()
    except RuntimeError: pass
""",
    "leaves children behind": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0: time.sleep(1000)
    os._exit(0)
time.sleep(1000)
""",
}
