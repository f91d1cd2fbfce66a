"""Ctrl-C against code that drops it, each program in a process of its own."""

import signal
import subprocess
import sys

import pytest

from t3d.cli.interrupt import insistent_interrupts

BEFORE = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest's workers may ignore it
from t3d.cli import app, main
from t3d.cli.interrupt import insistent_interrupts
from t3d.errors import T3DError
def press(): os.kill(os.getpid(), signal.SIGINT)
class Dropping:
    def __del__(self): press(); time.sleep(0.01)
"""
PROGRAMS = {
    "nothing is in the way": "press(); time.sleep(60)",
    "a destructor drops it": "Dropping(); time.sleep(60)",
    "it becomes another error": """
try: press(); time.sleep(60)
except KeyboardInterrupt: pass
raise TypeError("cannot compare")""",
    "it becomes a fault of what was given": """
try: press(); time.sleep(60)
except KeyboardInterrupt: pass
raise T3DError("cannot read")""",
    "it becomes an exit code": """
try: press(); time.sleep(60)
except KeyboardInterrupt: sys.exit(1)""",
    "cleaning up takes longer than the pause": """
try: press(); time.sleep(60)
finally: time.sleep(2.5); print("cleaned up", flush=True)""",
}


def run(body: str) -> subprocess.CompletedProcess:
    """`t3d act`, a command that does `body`."""
    lines = "".join(f"    {line}\n" for line in body.strip().splitlines())
    program = f'{BEFORE}@app.command("act")\ndef act():\n{lines}main(["act"])'
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize("name", PROGRAMS)
def test_an_interrupt_arrives(name):
    done = run(PROGRAMS[name])
    assert done.returncode == 130, done.stderr
    assert done.stderr.endswith("interrupted; the same command continues\n")
    assert ("cleaned up" in done.stdout) == ("cleaned up" in PROGRAMS[name])


def test_work_that_was_done_all_the_same_is_done():
    done = run("Dropping()")
    assert (done.returncode, done.stderr.count("interrupted;")) == (0, 0), done.stderr


def test_an_error_without_an_interrupt_stays_an_error():
    done = run('raise T3DError("cannot read")')
    assert (done.returncode, done.stderr) == (2, "error: cannot read\n")
    assert "TypeError: cannot compare" in run('raise TypeError("cannot compare")').stderr


def test_where_it_is_ignored_it_stays_ignored():
    done = run("signal.signal(signal.SIGINT, signal.SIG_IGN)\nwith insistent_interrupts(): press()")
    assert done.returncode == 0, done.stderr


def test_the_handlers_are_the_old_ones_afterwards():
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGALRM)]
    with insistent_interrupts():
        pass
    assert before == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGALRM)]
