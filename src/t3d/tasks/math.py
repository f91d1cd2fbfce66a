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
from fractions import Fraction
from pathlib import Path

SECONDS = 5.0  # CPU time for one comparison, after which the answers count as different
LONGEST = 2000  # characters of an answer that are still parsed; longer ones must be equal strings

# `\\.` eats escaped characters, so that `\{` and `\}` do not count as braces.
_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_NUMBER = re.compile(r"[-+]?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?|[-+]?\$?\.\d+")
_PLAIN = re.compile(r"([-+]?)(?:\\?\$)?((?:\d{1,3}(?:,\d{3})+|\d{1,60})(?:\.\d{0,60})?|\.\d{1,60})(e[-+]?\d\d?)?")
_RATIO = re.compile(r"([-+]?\d{1,60})/(\d{1,60})")
_REPEATING = re.compile(r"(-?)(\d{0,30})\.(\d{0,30})\\overline\{?(\d{1,30})\}?")
_BASED = re.compile(r"([0-9A-Za-z]+)_\{?(\d+)\}?")
_MULTIPLES = r"dozen|hundred|thousand|million|billion|trillion|percent|k\b|m\b"
_WORDS = re.compile(r"\\(?:text|mathrm|mbox)\{([^{}]*)\}(?:\^\{?\d\}?)?\s*$|(?<=\d)\s+([a-z ]+)$", re.IGNORECASE)
_SAME_UNIT = """mm millimeter millimetre; cm centimeter centimetre; m meter metre; km kilometer kilometre;
in inch inche; ft foot feet; yd yard; mi mile; mg milligram; g gram; kg kilogram; oz ounce; lb pound;
s sec second; min minute; h hr hour; day; week; month; year; cent; dollar usd; euro; degree; radian; percent"""
_UNIT_OF = {word: group.split()[0] for group in _SAME_UNIT.split(";") for word in group.split()}
_UNITS = re.compile(rf"(.*\d)\s+(?!{_MULTIPLES})[a-z][a-z ]*\.?", re.IGNORECASE)


def last_boxed(text: str) -> str | None:
    r"""The content of the last complete `\boxed{...}`, or None; braces may nest. Linear in the text's length."""
    start, found, opened = -1, None, []
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
    r"""The final answer of a response: the last `\boxed{}`, else what follows the last `####`, else the last number.

    With `boxed_only`, or where a `\boxed{` was begun and never closed, there is no fallback.
    """
    boxed = last_boxed(response)
    if boxed is not None or boxed_only or "\\boxed" in response:
        return boxed
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
    """Whether two answers (LaTeX or plain text) are equal: as strings, as numbers, or by `math-verify`."""
    units = {_unit(answer), _unit(gold)} - {None}
    answer, gold = _normal(answer), _normal(gold)
    if len(units) == 2:  # math-verify ignores units: an answer may leave it out, but not give another
        return False
    if not answer or not gold:
        return False
    if answer == gold:
        return True
    numbers = [_number(text) for text in (answer, gold)]
    if None not in numbers:
        return numbers[0] == numbers[1]
    if max(len(answer), len(gold)) > LONGEST:
        return False
    bases = [_BASED.fullmatch(text) for text in (answer, gold)]
    if all(bases):  # math-verify reads 101_2 as 101
        return bases[0].groups() == bases[1].groups()
    return _worker.ask(gold, answer)


def _unit(text: str) -> str | None:
    """The unit that ends an answer (`5\\text{ cm}^2`, `18 dollars`), in one spelling; None if there is none we know."""
    if text.lstrip("$ ").startswith("\\$"):
        return "dollar"
    match = _WORDS.search(text[-100:].rstrip(". $"))
    words = (match[1] or match[2] or "").lower().split() if match else []
    return next((_UNIT_OF[w] for word in words for w in (word, word.removesuffix("s")) if w in _UNIT_OF), None)


def _normal(text: str) -> str:
    """`text` without what never matters: dollars around it, spacing commands, a final stop, a unit in words."""
    text = text[: LONGEST * 10].strip().removeprefix("$").removesuffix("$")
    text = re.sub(r"(?<=\d)(?:\{,\}|,\\!|\\[,;:])(?=\d{3})", ",", text)
    text = re.sub(r"\\[!,;:]|\\(?:left|right)(?![a-zA-Z])|(?<!\\)\\\s|\\displaystyle", " ", text)
    text = re.sub(r"\s+", " ", text).strip().rstrip(".").strip()
    unit = _UNITS.fullmatch(text)
    text = unit.group(1) if unit else text
    repeating = _REPEATING.fullmatch(text)
    return str(_repeating(*repeating.groups())) if repeating else text


def _number(text: str) -> Fraction | None:
    """The value of a plain decimal or a fraction of integers, thousands commas allowed; None for anything else."""
    if match := _PLAIN.fullmatch(text):
        return Fraction("".join(match.groups("")).replace(",", ""))
    if (match := _RATIO.fullmatch(text)) and int(match[2]):
        return Fraction(int(match[1]), int(match[2]))
    return None


def _repeating(sign: str, whole: str, fixed: str, cycle: str) -> Fraction:
    """The value of `whole.fixed` followed by `cycle` for ever."""
    value = int(whole + fixed + cycle) - int(whole + fixed or 0)
    return Fraction(-value if sign else value, 10 ** len(fixed) * (10 ** len(cycle) - 1))


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
