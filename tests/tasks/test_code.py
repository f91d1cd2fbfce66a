import json
import os
from random import Random

import pytest

from t3d.errors import T3DError
from t3d.tasks import TaskConfig, get_task, sandbox
from t3d.tasks.code import STDIO, last_program
from t3d.tasks.records import read_records
from t3d.tasks.word_problems import build_tokenizer

pytestmark = pytest.mark.skipif(sandbox._isolation()[0] == "none", reason=f"no isolation: {sandbox._isolation()[1]}")
EVERY = 1 if os.environ.get("T3D_ALL") else 40  # all canonical solutions take minutes: `T3D_ALL=1 pytest ...`
SLOW_MACHINE = 4.0

FUNCTION = {
    "question": "Write f that squares.",
    "test_method": "function",
    "test_list": ["def check(candidate):\n    assert candidate(3) == 9\n\ncheck(f)"],
    "test_time_limit": 1,
    "prefix": "Here is the completed code:\n```python\ndef helper(x): return x\n\ndef f(x):\n    '''squares'''\n\n",
}
SCRIPT = {
    "question": "Read two integers and print their sum.",
    "test_method": "stdio",
    "test_input": ["2 3\n", "10 20\n"],
    "test_output": ["5\n", "30\n"],
    "test_time_limit": 1,
}


def load(tmp_path, *records, name="code", **settings):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    task = get_task(TaskConfig(name=name, path=str(path), **settings))
    return task, task.problems("test")


def test_both_methods_in_one_file(tmp_path):
    task, (function, script) = load(tmp_path, FUNCTION, SCRIPT, name="primeintellect")
    texts = ["    return x * x\n```", "```python\na, b = map(int, input().split())\nprint(a + b)\n```"]
    assert [v.correct for v in task.judge_all(texts, [function, script])] == [True, True]
    assert [v.correct for v in task.judge_all(texts[::-1], [function, script])] == [False, False]
    verdict = task.judge("    return x + x\n```", function)
    assert verdict.correct is False
    assert verdict.reason == "test 1: AssertionError"
    assert "return x + x" in verdict.extracted
    assert task.judge("print(5)", script).reason == "no code block"
    assert task.verify("    exit(0)\n```", function) is False
    assert task.verify("    return helper(x * x)\n```", function)


def test_prompts(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "U:{{ messages[0]['content'] }}|A:"
    task, (function, script) = load(tmp_path, FUNCTION, SCRIPT)
    assert task.prompt_text(function).startswith(
        "Write f that squares.\nPlace your code within a single Python code block"
    )
    assert task.prompt_text(script) == STDIO.replace("{question}", SCRIPT["question"])
    ids = task.prompt(function, tokenizer)
    assert ids == tokenizer(f"U:{task.prompt_text(function)}|A:{FUNCTION['prefix']}")["input_ids"]
    thinking, (function, _) = load(tmp_path, FUNCTION, SCRIPT, start_with_think=True)
    assert thinking.answer_start(function) == "<think>\n"  # the prefix would end the thought before it began
    assert thinking.verify("Square it.</think>\n```python\ndef f(x):\n    return x * x\n```", function)
    other, (_, script) = load(tmp_path, FUNCTION, SCRIPT, template="Q: {question}")
    assert other.prompt_text(script) == "Q: " + SCRIPT["question"]


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("```python\na\n```", "a\n"),
        ("```python\na\n```\nor\n```python\nb\n```\nprose", "b\n"),
        ("```py\na\n``` then ```\nb\n```", "a\n"),
        ("```\na\n```", "a\n"),
        ("```Python3\na\n```", "a\n"),
        ("```python a```", "a"),
        ("```python\na", None),
        ("a", None),
        ("```json\n{}\n```", None),
    ],
)
def test_where_the_program_is(text, program):
    assert last_program(text) == program


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test_method": "functions"}, r"test_method is 'functions' \(did you mean 'function'\?\)"),
        ({"test_list": None}, "test_list must be a list of texts"),
        ({"test_list": []}, "with one at least"),
        ({"test_time_limit": 0}, "test_time_limit must be a number of seconds"),
        ({"test_time_limit": "1"}, "got '1'"),
        ({"test_method": "stdio"}, "no field 'test_input'.*did you mean 'test_list'"),
        ({"test_method": "stdio", "test_input": ["1"], "test_output": []}, "test_output must be"),
        ({"test_method": "stdio", "test_input": ["1", "2"], "test_output": ["1"]}, "2 test_input and 1 test_output"),
        ({"question": ""}, "the question is empty"),
    ],
)
def test_bad_records(tmp_path, change, message):
    with pytest.raises(T3DError, match=r"data\.jsonl, line 2: .*" + message):
        load(tmp_path, FUNCTION, FUNCTION | change)


def test_humaneval_canonical_solutions(shared_data):
    original = get_task(TaskConfig(name="humaneval", path=str(shared_data / "humaneval" / "humaneval.jsonl")))
    theirs = get_task(TaskConfig(name="humaneval", path=str(shared_data / "genverse" / "humaneval.jsonl")))
    ours, same = original.problems("test"), theirs.problems("test")
    assert [p.id for p in ours] == [f"HumanEval/{i}" for i in range(164)]
    for a, b in zip(ours, same, strict=True):
        assert (a.question, a.extra["prefix"], a.extra["setup"]) == (b.question, b.extra["prefix"], b.extra["setup"])
        assert a.extra["entry"] == b.extra["entry"]
    chosen = ours if EVERY == 1 else [*ours[::EVERY], ours[32], ours[38], ours[50]]  # with helpers in the prompt
    texts = [original.solution(p, Random(0)) for p in chosen]
    assert [p.id for p, v in zip(chosen, original.judge_all(texts, chosen), strict=True) if not v.correct] == []
    chosen = [same[int(p.id.split("/")[1])] for p in chosen]
    assert [p.id for p, v in zip(chosen, theirs.judge_all(texts, chosen), strict=True) if not v.correct] == []
    wrong = [original.judge("    return None\n```", p) for p in ours[:3]]
    assert [v.correct for v in wrong] == [False] * 3


@pytest.mark.parametrize("file", ["mbpp.jsonl", "sanitized.jsonl"])
def test_mbpp_reference_code(shared_data, file):
    task = get_task(TaskConfig(name="mbpp", path=str(shared_data / "mbpp" / file), time_scale=SLOW_MACHINE))
    splits = {split: task.problems(split) for split in ("train", "dev", "test")}
    if file == "mbpp.jsonl":
        assert {split: len(problems) for split, problems in splits.items()} == {"train": 384, "dev": 90, "test": 500}
    else:
        assert sum(map(len, splits.values())) == 427
    problems = sorted((p for found in splits.values() for p in found), key=lambda p: int(p.id))
    special = ("367", "927", "126", "533", "596")  # classes, a name that hides a builtin, a type as argument, sys
    chosen = [p for i, p in enumerate(problems) if i % EVERY == 0 or p.id in special]
    verdicts = task.judge_all([task.solution(p, Random(0)) for p in chosen], chosen)
    assert [(p.id, v.reason) for p, v in zip(chosen, verdicts, strict=True) if not v.correct] == []


@pytest.mark.parametrize(("file", "impossible"), [("mbpp_test", 2), ("mbpp_train", 2)])
def test_genverse_mbpp(shared_data, file, impossible):
    code = {r["test_list"][0].strip(): r["code"] for _, r in read_records(shared_data / "mbpp" / "mbpp.jsonl")}
    path = str(shared_data / "genverse" / f"{file}.jsonl")
    task = get_task(TaskConfig(name="mbpp", path=path, time_scale=SLOW_MACHINE))
    problems = task.problems("train")
    named_check = [p for p in problems if "assert check(" in p.extra["tests"][0]]  # hidden by the tests' own
    assert len(named_check) == impossible
    chosen = [*problems[::EVERY], *named_check] if EVERY > 1 else problems
    texts = [f"    pass\n```\n```python\n{code[p.question.split('the test:')[1].strip()]}\n```" for p in chosen]
    failed = [p for p, v in zip(chosen, task.judge_all(texts, chosen), strict=True) if not v.correct]
    assert {p.id for p in failed} == {p.id for p in named_check}
