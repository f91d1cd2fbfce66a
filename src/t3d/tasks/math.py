r"""Checking mathematical answers: the last `\boxed{}`, compared by `math-verify` under a hard time limit.

sympy can hang, or eat all memory, on a short expression (`9^{9^{9^9}}`), inside C code that a Python signal handler
never interrupts. So it runs in one helper process that dies by itself when its CPU time is over; plain numbers and
equal strings, the common case, never get there.
"""

import atexit
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

from t3d.tasks.latex import LONGEST, as_intervals, differ, differing_units, normal, number, unclear, words

SECONDS = 5.0  # CPU time for one comparison, after which the answers count as different

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
    A comparison that takes longer than `SECONDS` of CPU time is False. Never raises, safe in threads.
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
        with self.lock:
            if self.process is None or self.owner != os.getpid() or self.process.poll() is not None:
                self._start()
            try:
                self.process.stdin.write(json.dumps([gold, answer, SECONDS]) + "\n")
                self.process.stdin.flush()
                verdict = self.process.stdout.readline()
            except OSError:
                verdict = ""
            if verdict not in ("0\n", "1\n"):  # it died: out of time or memory
                self.stop()
            return verdict == "1\n"

    def _start(self):
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
        if self.process.stdout.readline() != "ready\n":
            raise RuntimeError("the math-verify helper did not start: python -m t3d.tasks.math_worker")

    def stop(self):
        if self.process is not None and self.owner == os.getpid():
            self.process.kill()
            self.process.communicate()
        self.process = None


_worker = _Worker()
atexit.register(_worker.stop)
