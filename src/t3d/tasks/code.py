"""`code`: programs judged by running their tests in a sandbox, from any file in Gen-Verse's form."""

import ast
import builtins
import os
import re
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from random import Random

from t3d.errors import T3DError, nearest
from t3d.tasks.base import Problem, Verdict, register
from t3d.tasks.files import FileTask, pick
from t3d.tasks.retrieval import fill
from t3d.tasks.sandbox import Sandbox

STDIO = (
    "This is the problem:\n{question}\n"
    "You should put your code in ```python ```. Use input() to read input and print() to produce output in your script."
)
_BLOCK = re.compile(r"```(?:python3?|py)\b[ \t]*\n?(.*?)```", re.DOTALL | re.IGNORECASE)
_BARE = re.compile(r"```[ \t]*\n(.*?)```", re.DOTALL)


def last_program(text: str) -> str | None:
    """The last ```` ```python ```` block of `text`, or else the last one without a language."""
    found = _BLOCK.findall(text) or _BARE.findall(text)
    return found[-1] if found else None


@register("code")
class CodeTask(FileTask):
    """`question`, `test_time_limit`, and by `test_method`: `function` with `test_list` and perhaps `prefix`, or `stdio`
    with `test_input` and `test_output`."""

    template = (
        "{question}\nPlace your code within a single Python code block ```python ```. "
        "Do not include more than one code block."
    )

    @cached_property
    def sandbox(self) -> Sandbox:
        return Sandbox(self.config.allow_unsandboxed)

    def problem(self, record: dict, id: str, where: str) -> Problem:
        method = record.get("test_method", "function")
        extra = {"method": method, "seconds": _seconds(record, where), "prefix": record.get("prefix") or ""}
        if method == "function":
            tests = _texts(record, "test_list", where)
            extra |= {"tests": tests, "setup": helpers(extra["prefix"]), "entry": _checked(tests)}
        elif method == "stdio":
            extra |= {"inputs": _texts(record, "test_input", where), "outputs": _texts(record, "test_output", where)}
            if len(extra["inputs"]) != len(extra["outputs"]):
                counts = f"{len(extra['inputs'])} test_input and {len(extra['outputs'])} test_output"
                raise T3DError(f"{where}: {counts}; every test needs both")
        else:
            known = ("function", "stdio")
            raise T3DError(f"{where}: test_method is {method!r}{nearest(str(method), known)}, not function or stdio")
        return Problem(id, self.question(record, where), None, extra)

    def prompt_text(self, problem: Problem) -> str:
        stdio = problem.extra["method"] == "stdio" and self.config.template is None
        return fill(STDIO if stdio else self.template, problem.question, self.documents)

    def answer_start(self, problem: Problem) -> str:
        return super().answer_start(problem) or problem.extra["prefix"]

    def judge(self, text: str, problem: Problem) -> Verdict:
        extra = problem.extra
        program = last_program(self.answer_start(problem) + text)
        if program is None:
            return Verdict(False, None, "no code block")
        seconds = extra["seconds"] * self.config.time_scale
        if extra["method"] == "stdio":
            outcome = self.sandbox.script(program, extra["inputs"], extra["outputs"], seconds)
        else:
            outcome = self.sandbox.function(program, extra["tests"], extra["setup"], extra["entry"], seconds)
        return Verdict(outcome.ok, program, outcome.reason)

    def judge_all(self, texts: Sequence[str], problems: Sequence[Problem]) -> list[Verdict]:
        _ = self.sandbox  # so that a system without isolation is one error, not one for each thread
        with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2) as pool:
            return list(pool.map(self.judge, texts, problems))

    def known_answer(self, problem: Problem) -> str | None:
        return problem.extra.get("solution")

    def solution(self, problem: Problem, rng: Random) -> str:
        """The reference program, as an answer that follows the prompt."""
        if "solution" not in problem.extra:
            return super().solution(problem, rng)
        prefix, code = self.answer_start(problem), problem.extra["solution"]
        if prefix and prefix == problem.extra["prefix"]:
            return problem.extra["completion"].strip("\n") + "\n```"
        return f"```python\n{code.strip()}\n```"


def helpers(prefix: str) -> str:
    """What the start of an answer defines besides the function to complete: the tests use these, not the program's."""
    text = prefix.rpartition("```python\n")[2]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in other people's strings
            body = ast.parse(text + "    pass\n").body
    except SyntaxError:
        return ""
    return ast.unparse(ast.Module(body[:-1], []))


def _checked(tests: list[str]) -> list[str]:
    """The names that the tests are about: `check(NAME)` at the end, or what the asserts call first."""
    names = re.findall(r"^check\((\w+)\)", "\n".join(tests), re.MULTILINE)
    return names or called(tests)


def called(tests: list[str]) -> list[str]:
    """Names that the tests call (`f` in `assert f(2) == 4`); builtins only where they call nothing else."""
    names = re.findall(r"(?<![\w.])([A-Za-z_]\w*)\(", "\n".join(tests))
    return sorted(set(names) - set(dir(builtins))) or sorted(set(names))


def _texts(record: dict, field: str, where: str) -> list[str]:
    value = pick(record, None, (field,), where)
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise T3DError(f"{where}: {field} must be a list of texts, with one at least")
    return value


def _seconds(record: dict, where: str) -> float:
    value = record.get("test_time_limit", 1)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 600:
        raise T3DError(f"{where}: test_time_limit must be a number of seconds up to 600, got {value!r}")
    return float(value)
