import gzip
import json
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from t3d.errors import T3DError
from t3d.tasks import TaskConfig, get_task
from t3d.tasks.word_problems import build_tokenizer

RECORDS = [
    {"question": "What is 2+2?", "answer": "2+2=<<2+2=4>>4\n#### 4"},
    {"question": "Half of one?", "answer": r"\frac{1}{2}"},
    {"question": "Say\u2028hello", "answer": None},
]


def lines(records) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def task(path, **settings):
    return get_task(TaskConfig(name="prompts", path=str(path), **settings))


@pytest.fixture
def file(tmp_path):
    def write(text: str | bytes, name: str = "mine.jsonl"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_jsonl(file):
    mine = task(file(lines(RECORDS)))
    problems = mine.problems("train")
    assert [p.id for p in problems] == ["mine:1", "mine:2", "mine:3"]
    assert [p.answer for p in problems] == ["4", r"\frac{1}{2}", None]
    assert problems[2].question == "Say\u2028hello"
    assert mine.problems("test") == problems
    assert mine.verify(r"so \boxed{4}", problems[0]) is True
    assert mine.verify("so 5", problems[0]) is False
    assert mine.verify(r"\boxed{0.5}", problems[1]) is True
    assert mine.verify("anything", problems[2]) is None
    verdict = mine.judge("so 5", problems[0])
    assert (verdict.extracted, verdict.reason) == ("5", "expected 4")
    assert mine.judge("hm", problems[0]).reason == "no answer found"


@pytest.mark.parametrize("form", ["array", "pretty", "jsonl.gz", "array.gz", "parquet", "bom", "blank lines"])
def test_every_form_gives_the_same_problems(file, tmp_path, form):
    expected = [(p.question, p.answer) for p in task(file(lines(RECORDS))).problems("train")]
    if form == "parquet":
        path = tmp_path / "mine.parquet"
        pq.write_table(pa.Table.from_pylist(RECORDS), path)
    else:
        text = {
            "array": json.dumps(RECORDS),
            "array.gz": json.dumps(RECORDS),
            "pretty": json.dumps(RECORDS, indent=2),
            "jsonl.gz": lines(RECORDS),
            "bom": "\ufeff" + lines(RECORDS),
            "blank lines": "\n" + lines(RECORDS).replace("\n", "\n\n"),
        }[form].encode()
        path = file(gzip.compress(text) if form.endswith(".gz") else text, "data.any")
    assert [(p.question, p.answer) for p in task(path).problems("train")] == expected


def test_fields_and_ids(file):
    records = [{"q": "one?", "a": 1, "name": "x", "id": 7}, {"q": "two?", "a": 2.5, "name": "y", "id": 8}]
    path = file(lines(records))
    problems = task(path, question_field="q", answer_field="a").problems("train")
    assert [(p.id, p.answer) for p in problems] == [("7", "1"), ("8", "2.5")]
    assert [p.id for p in task(path, question_field="q", id_field="name").problems("train")] == ["x", "y"]


def test_splits(file):
    train, held = file(lines(RECORDS)), file(lines(RECORDS[:1]), "held.jsonl")
    assert len(task(train, eval_path=str(held)).problems("train")) == 3
    for split in ("dev", "test"):
        assert [p.id for p in task(train, eval_path=str(held)).problems(split)] == ["held:1"]
    assert task(train, eval_path=str(held)).held_out()
    assert not task(train).held_out()


def test_a_choice_by_seed(file):
    mine = task(file(lines([{"question": f"q{i}"} for i in range(50)])))
    few, more = mine.problems("train", 10, seed=1), mine.problems("train", 20, seed=1)
    assert len(few) == 10
    assert mine.problems("train", 10, seed=1) == few
    assert mine.problems("train", 10, seed=2) != few
    assert {p.id for p in few} < {p.id for p in more}
    assert more == [p for p in mine.problems("train") if p in more]  # in the file's order
    assert len(mine.problems("train", 999)) == 50


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"question": "a"}\n{"question": \n', r"line 2: not JSON"),
        ('{"query": "a", "answer": "b"}\n', r"line 1: no field 'question'.*fields found: query, answer"),
        ('{"questions": "a"}\n', r"did you mean 'questions'"),
        ("{}\n", r"fields found: none"),
        ("", "holds no records"),
        ("\n\n", "holds no records"),
        ("[]", "holds no records"),
        ('{"question": 7}\n', "line 1: the question is int, not text"),
        ('{"question": null}\n', "the question is NoneType"),
        ('{"question": "a"}\n{"question": "  "}\n', "line 2: the question is empty"),
        ('{"question": "a"}\n{"question": "b\\ud800"}\n', r"line 2: question holds U\+D800, half of a surrogate pair"),
        ('{"question": "a", "answer": "\\udfff"}\n', "line 1: answer holds U.DFFF"),
        ('{"question": "a", "id": "\\udc00"}\n', "line 1: id holds U.DC00"),
        ('{"question": "a", "answer": ["x"]}\n', "the answer is list"),
        ('{"question": "a", "answer": true}\n', "the answer is bool"),
        ('{"question": "a", "id": 1}\n{"question": "b", "id": "1"}\n', r"line 2: id '1' was already used in line 1"),
        ('{"question": "a", "id": [1]}\n', r"the id is \[1\]"),
        ('["a"]', "record 1: expected an object with fields, got str"),
        ('"a"\n', "line 1: expected an object with fields, got str"),
        ('[{"question": "a"}', "not a JSON array"),
        ("[" * 100_000, "not a JSON array"),
        ('{"question": ' + "[" * 100_000 + "\n", "line 1: not JSON"),
        (b"\xff\xfe\x00\x01 binary", "not UTF-8 text"),
        (gzip.compress(b'{"question": "a"}\n' * 1000, mtime=0)[:-20], "damaged gzip"),
        (b"\x1f\x8bnonsense", "cannot read"),
        (b"PAR1nonsense", "damaged Parquet"),
    ],
)
def test_bad_files(file, text, message):
    path = file(text)
    with pytest.raises(T3DError, match=message) as caught:
        task(path).problems("train")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_bad_requests(file, tmp_path):
    path = file(lines(RECORDS))
    with pytest.raises(T3DError, match=r"needs a file or a dataset: set task\.path"):
        get_task(TaskConfig(name="prompts")).problems("train")
    with pytest.raises(T3DError, match="does not exist"):
        task(tmp_path / "none.jsonl").problems("train")
    with pytest.raises(T3DError, match="is a folder"):
        task(tmp_path).problems("train")
    with pytest.raises(T3DError, match=r"no field 'ansver'.*did you mean 'answer'"):
        task(path, answer_field="ansver").problems("train")
    with pytest.raises(T3DError, match="no field 'key'"):
        task(path, id_field="key").problems("train")
    with pytest.raises(T3DError, match="has no ground-truth responses"):
        task(path).solution(task(path).problems("train")[1], None)


def test_prompt_is_template_and_chat_form(file):
    tokenizer = build_tokenizer()
    path = file(lines([{"question": "How many?"}]))
    mine = task(path, template="First, {question} {x} \\boxed{}")
    problem = mine.problems("train")[0]
    assert mine.prompt_text(problem) == "First, How many? {x} \\boxed{}"
    text = "<|im_start|>user\nFirst, How many? {x} \\boxed{}<|im_end|>\n<|im_start|>assistant\n"
    assert mine.prompt(problem, tokenizer) == tokenizer(text)["input_ids"]
    thinking = task(path, template="{question}", start_with_think=True)
    assert (
        thinking.prompt(problem, tokenizer)
        == tokenizer("<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n<think>\n")["input_ids"]
    )
    tokenizer.chat_template = None
    assert mine.prompt(problem, tokenizer) == tokenizer(mine.prompt_text(problem))["input_ids"]


def test_real_questions_with_the_real_tokenizer(shared_data):
    from transformers import Qwen2TokenizerFast

    tokenizer = Qwen2TokenizerFast.from_pretrained(shared_data / "sdar-4b-chat")
    mine = task(shared_data / "gsm8k" / "test.jsonl")
    problems = mine.problems("test")
    assert len(problems) == len({p.id for p in problems}) == 1319
    assert all(p.answer and p.answer.replace(",", "").lstrip("-").isdigit() for p in problems)
    ids = mine.prompt(problems[0], tokenizer)
    assert all(isinstance(i, int) for i in ids)
    assert tokenizer.decode(ids) == (
        f"<|im_start|>user\n{problems[0].question}\nPlease reason step by step, and put your final answer within "
        "\\boxed{}.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_hundred_thousand_prompts(file):
    asked = (
        '{{"question": "What is {i}+1?", "answer": "{i}"}}\n',
        ('{{"messages": [{{"role": "user", "content": "{i}?"}}, {{"role": "assistant", "content": "Yes"}}]}}\n'),
    )
    path = file("".join(asked[i % 2].format(i=i) for i in range(100_000)))
    start = time.perf_counter()
    assert len(task(path).problems("train", 50_000)) == 50_000
    assert time.perf_counter() - start < 60  # about 2 s; anything quadratic takes hours


def test_a_task_of_ones_own(file, tmp_path):
    file(
        "from t3d.tasks import Problem, Task, register\n\n\n"
        "@register('echo')\nclass Echo(Task):\n"
        "    def problems(self, split, n=None, seed=None):\n        return [Problem('1', 'Say hi')]\n",
        "echo.py",
    )
    mine = get_task(TaskConfig(name=str(tmp_path / "echo.py")))
    assert mine.problems("test")[0].question == "Say hi"
    assert mine.verify("hi", mine.problems("test")[0]) is None
    with pytest.raises(T3DError, match="must register exactly one task"):
        get_task(TaskConfig(name=str(file("x = 1\n", "none.py"))))
    with pytest.raises(T3DError, match="does not exist"):
        get_task(TaskConfig(name="nowhere.py"))


def test_another_task_for_evaluation(file):
    path = file(lines(RECORDS))
    config = TaskConfig(name="word_problems", eval_name="prompts", eval_path=str(path), data_seed=3)
    assert get_task(config).name == "word_problems"
    assert len(get_task(config, evaluation=True).problems("test")) == 3
