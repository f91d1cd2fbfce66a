"""Checks and measures t3d on a GPU, phase by phase; what has a result is not done again.

    python benchmarks/gpu/run.py PHASE... [--seconds N] [--json DIR] [--rehearse]

Phases: correct, decode, train, real. Each writes DIR/PHASE.json after every cell. `--seconds`: for all phases together;
each takes its share of what is left. A cell that fails is one line in the file, and is tried again by the next call.
`--rehearse`: every line at tiny shapes on a CPU.
"""

import argparse
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
PHASES = ("correct", "decode", "train", "real")
GRACE = 20  # seconds for a cell that does not hear the alarm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("phases", nargs="+", choices=PHASES, metavar="PHASE", help=", ".join(PHASES))
    parser.add_argument("--seconds", type=float, default=86400.0, help="for all phases together")
    parser.add_argument("--json", type=Path, help="folder of the results; default: build/gpu, or build/gpu-rehearsal")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on a CPU")
    parser.add_argument("--call", type=float, help=argparse.SUPPRESS)  # in a child: when the call began
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    name = "gpu-rehearsal" if options.rehearse else "gpu"
    folder = options.json or HERE.parents[1] / "build" / name
    if options.until is not None:
        run_phase(options.phases[0], folder, options)
        return
    call = time.time()
    end = call + options.seconds
    for number, phase in enumerate(options.phases):
        left = end - time.time()
        until = time.time() + left / (len(options.phases) - number)
        run_children(phase, folder, call, until, options.rehearse)


def run_children(phase: str, folder: Path, call: float, until: float, rehearse: bool) -> None:
    """The phase in a process of its own; in another one if that dies of a cell, which is then left out."""
    command = [sys.executable, "-u", __file__, phase, "--json", str(folder), "--call", str(call), "--until", str(until)]
    path = folder / f"{phase}.json"
    while time.time() < until:
        before = path.read_bytes() if path.exists() else b""
        try:
            code = subprocess.run(
                [*command, "--rehearse"] if rehearse else command, timeout=until + GRACE - time.time()
            ).returncode
        except subprocess.TimeoutExpired:
            print(f"{phase}: stopped", flush=True)
            return
        if code == 0:
            return
        if not path.exists() or path.read_bytes() == before:
            raise SystemExit(f"{phase} cannot begin (exit status {code})")


def run_phase(name: str, folder: Path, options: argparse.Namespace) -> None:
    sys.path.insert(0, str(HERE.parent))  # the other benchmarks
    import torch
    import transformers
    from cells import OutOfTime, Place, Results

    if not options.rehearse and not torch.cuda.is_available():
        raise SystemExit("no GPU is visible; --rehearse runs tiny shapes on the CPU")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    place, parent = Place(options.rehearse, folder.resolve()), os.getppid()

    def stop(*_):
        raise OutOfTime

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})  # cells alone hear it
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(options.until - time.time(), 0.001))
    try:
        results = Results(folder / f"{name}.json", options.call, place)
        cells = importlib.import_module(name).cells(place)
        for cell in results.left(cells):
            results.run(cell, cells[cell])
            found = results.cells[cell]
            print(f"{name}: {cell}: {found.get('error') or found}", flush=True)
            place.wait()  # raises if an error has spoiled the GPU for this process
            place.clean()
            if os.getppid() != parent:  # whoever asked is gone
                return
    except OutOfTime:
        print(f"{name}: out of time", flush=True)
        os._exit(0)  # without waiting for the compiler's workers
    print(f"{name}: done", flush=True)


if __name__ == "__main__":
    main()
