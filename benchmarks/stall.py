"""Runs a command and stops one of its processes after another for a moment, as a machine that is too busy would.

    python benchmarks/stall.py --most 3 -- make test

Finds tests, and code, that rely on who comes first. The exit code is the command's.
"""

import argparse
import contextlib
import random
import signal
import subprocess
import sys
import time

import psutil


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--most", type=float, default=3.0, help="seconds that a process is stopped at most")
    parser.add_argument("--pause", type=float, default=0.5, help="seconds between two stops at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("command", nargs="+")
    args = parser.parse_args()
    draw = random.Random(args.seed)
    running = subprocess.Popen(args.command)
    stops, stopped = 0, 0.0
    while running.poll() is None:
        time.sleep(draw.uniform(0, args.pause))
        with contextlib.suppress(psutil.Error):
            found = [p for p in psutil.Process(running.pid).children(recursive=True) if p.status() != "stopped"]
            if found:
                victim, seconds = draw.choice(found), args.most * draw.random() ** 2  # short ones are more frequent
                victim.send_signal(signal.SIGSTOP)
                try:
                    time.sleep(seconds)
                finally:
                    victim.send_signal(signal.SIGCONT)
                stops, stopped = stops + 1, stopped + seconds
    print(f"{stops} stops, {stopped:.0f} s in all", file=sys.stderr)
    sys.exit(running.returncode if running.returncode >= 0 else 128 - running.returncode)


if __name__ == "__main__":
    main()
