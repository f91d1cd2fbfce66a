r"""Checking mathematical answers: the last `\boxed{}`, compared by `math-verify` under a hard time limit.

sympy can hang, or eat all memory, on a short expression (`9^{9^{9^9}}`), inside C code that a Python signal handler
never interrupts. So it runs in one helper process that dies by itself when its CPU time is over; plain numbers and
equal strings, the common case, never get there.
"""

import atexit
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

from t3d.errors import T3DError
from t3d.tasks.latex import LONGEST, as_intervals, differ, differing_units, normal, number, unclear, words

SECONDS = 5.0  # CPU time for one comparison, after which the answers count as different
GRACE = 10.0  # seconds for a helper that has died to be gone
TRIES = 3

# `\\.` eats escaped characters, so that `\{` and `\}` do not count as braces.
_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
# An answer and nothing else behind `####`: `18`, `$1,200.50`, `-3/4 of the cake`; no `#### 2. Compute`, `#### Step 1`.
_MARKED = re.compile(
    r"####[ \t*]*([-+]?(?:\\?\$)?[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?[ \t]*%?(?:[ \t]+[a-zA-Z]+){0,3})"
    r"[.*]*[ \t\r]*$",
    re.MULTILINE,
)
_NUMBER = re.compile(r"[-+]?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?|[-+]?\$?\.\d+")


def last_boxed(text: str) -> str | None:
    r"""The content of the last complete `\boxed{...}`, or None; braces may nest. Linear in the text's length."""
    start, found = -1, None
    opened: list[int] = []
    for match in _BRACES.finditer(text):
        token = match.group()
        if token == "}":
            begin = opened.pop() if opened else -1
            if begin > start:
                start, found = begin, text[begin : match.start()]
        elif token == "{":
            opened.append(-1)
        elif token.endswith("{") and len(token) > 2:
            opened.append(match.end())
    return found


def extract_answer(response: str, boxed_only: bool = False) -> str | None:
    r"""The final answer of a response: the last `\boxed{}`, else what follows `####`, else the last number.

    Of several `####` it is the first that has a number and nothing else in its line, since a model that runs on writes
    further questions and their answers; where there is none, the last. With `boxed_only`, or where a `\boxed{` was
    begun and never closed, there is no fallback.
    """
    boxed = last_boxed(response)
    if boxed is not None or boxed_only or "\\boxed" in response:
        return boxed
    if marked := _MARKED.search(response):
        return marked[1]
    _, mark, tail = response.rpartition("####")
    if mark and tail.strip():
        return tail.strip().split("\n", 1)[0]
    numbers = _NUMBER.findall(response[-100_000:])
    return numbers[-1] if numbers else None


def reference_answer(reference: str) -> str:
    r"""The answer itself, where a reference is a whole solution: after GSM8K's `####`, or in the last `\boxed{}`."""
    _, mark, tail = reference.rpartition("####")
    if mark and tail.strip():
        return tail.strip()
    boxed = last_boxed(reference)
    return reference.strip() if boxed is None else boxed.strip()


def verify_math(response: str, reference: str, boxed_only: bool = False) -> bool:
    r"""Whether the final answer of `response` is mathematically equal to `reference`.

    response: model output of any length; its answer is found by `extract_answer`.
    reference: the answer, or a solution that ends in `\boxed{...}` or `#### ...`.
    A comparison that takes longer than `SECONDS` of CPU time is False. Safe in threads.
    Raises T3DError where the process that compares cannot be started.
    """
    answer, gold = extract_answer(response, boxed_only), reference_answer(reference)
    return answer is not None and equal(answer, gold)


def equal(answer: str, gold: str) -> bool:
    """Whether two answers (LaTeX or plain text) are equal: as texts, as numbers, or as formulas read whole."""
    if not differing_units(answer, gold):  # math-verify ignores units: an answer may leave it out, but not give another
        answer, gold = normal(answer), normal(gold)
        if not answer or not gold:
            return False
        if answer == gold or words(answer) == words(gold):
            return True
        numbers = [number(text) for text in (answer, gold)]
        if None not in numbers:
            return numbers[0] == numbers[1]
        if max(len(answer), len(gold)) > LONGEST or unclear(answer) or unclear(gold):
            return False  # they are not the same text
        if not differ(answer, gold):
            return _worker.ask(*as_intervals(gold, answer))
    return False


class _Worker:
    """The helper process (`math_worker.py`), started at the first hard pair and again after one that killed it."""

    def __init__(self):
        self.lock, self.process, self.owner = threading.Lock(), None, None

    def ask(self, gold: str, answer: str) -> bool:
        """Raises T3DError where no helper can be started."""
        with self.lock:
            for _ in range(TRIES):
                if self.process is None or self.owner != os.getpid() or self.process.poll() is not None:
                    self._start()
                verdict = self._reply(json.dumps([gold, answer, SECONDS]))
                if verdict in ("0\n", "1\n"):
                    return verdict == "1\n"
                if self._ended() != -signal.SIGKILL:  # that is another's doing; its own limits end it otherwise
                    break
            return False

    def _reply(self, line: str) -> str:
        """What the helper prints; nothing if it died."""
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            return self.process.stdout.readline()
        except OSError:
            return ""

    def _start(self) -> None:
        for _ in range(TRIES):
            self._open()
            if self.process.stdout.readline() == "ready\n":
                return
            code = self._ended()
        raise T3DError(
            f"the process that compares formulas did not start (exit code {code}); "
            f"{sys.executable} -m t3d.tasks.math_worker shows why"
        )

    def _open(self) -> None:
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        self.owner = os.getpid()  # a forked child must not share the pipe
        self.process = subprocess.Popen(
            [sys.executable, "-m", "t3d.tasks.math_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            cwd="/",
            env={**os.environ, "PYTHONPATH": path},
        )

    def _ended(self) -> int | None:
        """The exit code of the helper, which answers no more (negative: the signal); None if it had to be ended."""
        try:
            code = self.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            code = None
        self.stop()
        return code

    def stop(self) -> None:
        if self.process is not None and self.owner == os.getpid():
            self.process.kill()
            self.process.communicate()
        self.process = None


_worker = _Worker()
atexit.register(_worker.stop)
