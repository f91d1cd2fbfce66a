"""The helper process of `math.py`: reads `[gold, answer, seconds]` as JSON lines, answers 1 or 0.

When a comparison is out of CPU time the kernel ends the process (SIGPROF is not handled, so nothing can hold it up);
too much memory is a MemoryError or the end of the process. The caller takes both for 0.
"""

import json
import os
import resource
import signal
import sys

MEMORY = 2 << 30  # bytes


def compare(gold: str, answer: str) -> bool:
    """In either order, since math-verify looks at relations and sets in one of the two only."""
    from math_verify import parse, verify

    golds, answers = (parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (gold, answer))
    return any(
        verify(*pair, timeout_seconds=None, allow_set_relation_comp=True)
        for pair in ((golds, answers), (answers, golds))
    ) or _same_complex(golds, answers)


def _same_complex(golds: list, answers: list) -> bool:
    """Whether both are the same complex number, which math-verify compares as an expression in a variable i."""
    import sympy

    found = [parsed[0] for parsed in (golds, answers) if parsed and isinstance(parsed[0], sympy.Expr)]
    symbols = {symbol for value in found for symbol in value.free_symbols}
    if len(found) < 2 or {symbol.name for symbol in symbols} - {"i"}:
        return False
    if not symbols and not any(value.has(sympy.I) for value in found):
        return False
    gold, answer = (value.subs(dict.fromkeys(symbols, sympy.I)) for value in found)
    return abs(complex(sympy.N(gold - answer, 30))) <= 1e-12 * (1 + abs(complex(gold)))


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not look like a verdict
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; it ends this process itself
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    compare("1", "1")  # imports and caches, outside of the first pair's time
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
