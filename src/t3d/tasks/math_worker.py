"""The helper process of `math.py`: reads `[gold, answer, seconds]` as JSON lines, answers 1 or 0.

When a comparison is out of CPU time the kernel ends the process (SIGPROF is not handled, so nothing can hold it up);
too much memory is a MemoryError or the end of the process. The caller takes both for 0.
"""

import json
import os
import resource
import signal
import sys

import psutil

MEMORY = 2 << 30  # bytes for comparisons, beside what is mapped before: a CUDA build of torch alone takes more


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not look like a verdict
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; it ends this process itself
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    most = psutil.Process().memory_info().vms + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    from t3d.tasks.formulas.equal import compare

    compare("1", "1")  # caches, outside of the first pair's time
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        gold, answer, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            verdict = compare(gold, answer)
        except (Exception, MemoryError, RecursionError):
            verdict = False  # what math-verify cannot read is not equal
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(int(verdict), file=replies, flush=True)


if __name__ == "__main__":
    main()
