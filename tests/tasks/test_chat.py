"""Chats and prompts as TRL's datasets have them, in files, tables and datasets."""

import copy
import csv
import gzip
import io
import json

import pytest

from t3d.errors import T3DError
from t3d.tasks import Problem, TaskConfig, get_task
from t3d.tasks.tokenizer import word_tokenizer


def say(*texts: str) -> list[dict]:
    """system:..., user:..., assistant:... as messages."""
    return [dict(zip(("role", "content"), text.split(":", 1), strict=True)) for text in texts]


CHAT = say("system:Be brief.", "user:How many legs has a cat?", "assistant:4", "user:And two?", "assistant:#### 8")
WORDS = (
    "system",
    "Be brief.",
    "How many legs has a cat?",
    "4",
    "8",
    "And two?",
    "Q: And two?",
    "Reference Answer: 4 8",
)
TOKENIZER = word_tokenizer([*WORDS, "[system]", "[user]And", "[assistant]4"])
TOLD = "System: Be brief.\n\nUser: How many legs has a cat?\n\nAssistant: 4\n\nUser: And two?"


@pytest.fixture
def of(tmp_path):
    """The task of these records, and their problems."""

    def make(*records, name="prompts", **settings):
        path = tmp_path / "mine.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        task = get_task(TaskConfig(name=name, path=str(path), **settings))
        return task, task.problems("train")

    return make


@pytest.mark.parametrize(
    ("record", "asked", "reply"),
    [
        ({"messages": CHAT}, CHAT[:4], "#### 8"),
        ({"messages": CHAT[:4]}, CHAT[:4], None),
        ({"prompt": CHAT[:4], "completion": CHAT[4:]}, CHAT[:4], "#### 8"),
        ({"prompt": CHAT[:2], "completion": CHAT[2:]}, CHAT[:4], "#### 8"),
        ({"prompt": CHAT[:4], "completion": "#### 8"}, CHAT[:4], "#### 8"),
        ({"prompt": CHAT[1:2]}, CHAT[1:2], None),
        ({"prompt": "How many?", "completion": "#### 8"}, say("user:How many?"), "#### 8"),
        ({"prompt": "How many?", "completion": CHAT[4:]}, say("user:How many?"), "#### 8"),
        ({"prompt": "How many?", "messages": None}, say("user:How many?"), None),
        (
            {
                "conversations": [
                    {"from": "system", "value": "Be brief."},
                    {"from": "human", "value": "How many?"},
                    {"from": "gpt", "value": "#### 8"},
                ]
            },
            say("system:Be brief.", "user:How many?"),
            "#### 8",
        ),
    ],
)
def test_what_is_asked_and_what_is_replied(of, record, asked, reply):
    task, (problem,) = of(record)
    assert problem.messages == asked
    assert problem.answer == (reply and "8")
    told = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in asked)
    assert TOKENIZER.decode(task.prompt(problem, TOKENIZER)) == told + "<|im_start|>assistant\n"
    if reply:
        assert task.solution(problem, None) == reply
        assert task.verify("#### 8", problem) is True
        assert task.verify("#### 9", problem) is False
    else:
        assert task.verify("#### 8", problem) is None
        with pytest.raises(T3DError, match="no ground-truth responses for mine:1"):
            task.solution(problem, None)


def test_the_question_tells_the_whole_chat(of):
    _, problems = of({"messages": CHAT}, {"messages": CHAT[1:3]}, {"messages": say("system:", "user:Hi")})
    assert [p.question for p in problems] == [TOLD, "How many legs has a cat?", "Hi"]


def test_a_reply_in_words_is_a_response_to_learn_from_and_judges_none(of):
    chat = say("user:Hi!", "assistant:#### Hello\nHow are you?")
    task, (problem,) = of({"messages": chat})
    assert problem.answer is None
    assert task.verify("Good day", problem) is None
    assert task.solution(problem, None) == chat[1]["content"]
    task, (problem,) = of({"messages": chat}, name="text")
    assert problem.answer == chat[1]["content"]  # for BLEU and ROUGE


def test_an_answer_beside_the_chat_goes_first(of):
    task, problems = of({"prompt": CHAT[:2], "answer": 4}, {"messages": CHAT, "answer": "7"})
    assert [p.answer for p in problems] == ["4", "7"]
    assert task.solution(problems[1], None) == "#### 8"


def test_fields_of_other_names(of):
    task, problems = of(
        {"input": CHAT, "gold": "7", "prompt": "no"},
        {"input": "Two and two?", "gold": 4},
        question_field="input",
        answer_field="gold",
    )
    assert [(p.question, p.answer) for p in problems] == [(TOLD, "7"), ("Two and two?", "4")]
    assert task.prompt_text(problems[1]).startswith("Two and two?\nPlease reason step by step")
    _, (problem,) = of({"messages": CHAT, "prompt": "One?"}, question_field="messages")
    assert problem.question == TOLD


def test_only_a_question_is_put_into_the_template(of):
    records = {"question": "One?"}, {"prompt": "One?"}, {"messages": CHAT}
    task, problems = of(*records)
    assert [task.prompt_text(p) for p in problems[1:]] == ["One?", "And two?"]
    assert task.prompt_text(problems[0]).startswith("One?\nPlease reason")
    task, problems = of(*records, template="Q: {question}")
    assert [task.prompt_text(p) for p in problems] == ["Q: One?", "Q: One?", "Q: And two?"]
    text = TOKENIZER.decode(task.prompt(problems[2], TOKENIZER))
    assert text.count("Q:") == 1
    assert text.endswith("user\nQ: And two?<|im_end|>\n<|im_start|>assistant\n")


def test_chat_templates_that_do_not_fit(of):
    task, problems = of({"messages": CHAT}, {"messages": CHAT[1:3]})
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = "{{ raise_exception('no system\nmessages') }}"
    with pytest.raises(T3DError, match=r"^mine:1: the tokenizer's chat template refuses it: no system messages$"):
        task.prompt(problems[0], tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(T3DError, match=r"^mine:1: 4 messages need a chat template.*add chat_template\.jinja"):
        task.prompt(problems[0], tokenizer)
    assert task.prompt(problems[1], tokenizer) == tokenizer("How many legs has a cat?")["input_ids"]


def test_the_reference_answer_joins_the_system_message(of):
    task, problems = of({"messages": CHAT}, {"messages": CHAT[1:3], "answer": "4"})
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    assert [tokenizer.decode(task.answered_prompt(problem, tokenizer)) for problem in problems] == [
        "[system]Be brief.\n\nReference Answer: 8[user]How many legs has a cat?[assistant]4[user]And two?",
        "[system]Reference Answer: 4[user]How many legs has a cat?",
    ]


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": []}, "messages holds no messages"),
        ({"messages": "Hi"}, "messages is str, not a list of messages"),
        ({"messages": ["Hi"]}, "message 1 of messages is str, not an object with role and content"),
        ({"messages": say("robot:Hi")}, "message 1 of messages has the role 'robot'; roles are system, user, assist"),
        ({"messages": say("users:Hi")}, r"role 'users' \(did you mean 'user'\?\)"),
        ({"messages": [{"content": "Hi"}]}, "has the role None"),
        ({"messages": [{"role": ["user"], "content": "Hi"}]}, r"has the role \['user'\]"),
        ({"messages": [*CHAT[:2], CALL]}, "message 3 of messages calls a tool"),
        ({"messages": CHAT[:2], "tools": [{}]}, "a prompt with tools cannot be asked"),
        ({"messages": [*CHAT[:2], {"role": "assistant", "content": None}]}, "message 3 .*: the content is NoneType"),
        ({"messages": [{"role": "user", "content": [{"text": "Hi"}]}]}, "message 1 .*: the content is list, not text"),
        ({"messages": say("user:a\ud800")}, r"message 1 of messages holds U\+D800"),
        ({"messages": say("user: ", "assistant:Hi")}, "the user's last message is empty"),
        ({"messages": say("assistant:Hi")}, "before the answer comes nothing, not the user's"),
        ({"messages": CHAT[:1]}, "before the answer comes the system's message"),
        ({"messages": say("user:a", "assistant:b", "assistant:c")}, "before the answer comes the assistant's message"),
        ({"conversations": [{"from": "bot", "value": "Hi"}]}, "has the role 'bot'"),
        ({"prompt": CHAT[:2], "completion": []}, "completion holds no messages"),
        ({"prompt": CHAT[:2], "completion": CHAT[1:2]}, "completion ends with the user's message, not the assistant's"),
        ({"prompt": "Hi", "completion": CHAT[:3]}, "completion of a prompt that is text must be text, or one message"),
        ({"prompt": "Hi", "completion": 7}, "completion is int, not a list of messages"),
        ({"prompt": {"role": "user"}}, "the question is dict, not text"),
        ({"prompt": "Hi", "messages": CHAT}, "may be in 'messages' and 'prompt'; choose one with task.question_field"),
    ],
)
def test_bad_records(of, record, message):
    with pytest.raises(T3DError, match=rf"mine\.jsonl, line 2: .*{message}") as caught:
        of({"messages": CHAT}, record)
    assert "\n" not in str(caught.value)


def test_a_missing_field_says_which_there_are(of):
    with pytest.raises(T3DError, match=r"line 1: no field 'inputs' .*'input'\?\); fields found: input, gold"):
        of({"input": "a", "gold": "b"}, question_field="inputs")


ROWS = [["question", "answer"], ['What is 2,\nor "two"?', "2"], ["Say hi", ""], ["x" * 200_000, "1"]]


def table(delimiter: str, rows=ROWS) -> bytes:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows(rows)
    return text.getvalue().encode()


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "A.CSV", "a.csv.gz", "a.tsv.gz", "bom.csv"])
def test_tables(tmp_path, name):
    data = table("\t" if ".tsv" in name else ",")
    data = b"\xef\xbb\xbf" + data if "bom" in name else data
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    problems = get_task(TaskConfig(name="prompts", path=str(tmp_path / name))).problems("train")
    assert [[p.question, p.answer or ""] for p in problems] == ROWS[1:]
    assert [p.id.rpartition(":")[2] for p in problems] == ["2", "4", "5"]  # lines


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "holds no records"),
        (b"question,answer\n", "holds no records"),
        (b"question,answer\na,b\nc\n", "line 3: 1 fields, where the first row names 2"),
        (b'question,answer\n"a\nb",1\nc,d,e\n', "line 4: 3 fields, where the first row names 2"),
        (b'question\na\n"b\n', r"line 3: not \.csv \(unexpected end of data\)"),
        (b"question,question\na,b\n", "line 1: two fields have the name 'question'"),
        (b"text,answer\na,b\n", "line 2: no field 'question'.*fields found: text, answer"),
        (b"question\n\xff\xfe\n", "not UTF-8"),
    ],
)
def test_bad_tables(tmp_path, data, message):
    path = tmp_path / "mine.csv"
    path.write_bytes(data)
    with pytest.raises(T3DError, match=message) as caught:
        get_task(TaskConfig(name="prompts", path=str(path))).problems("train")
    assert "mine.csv" in str(caught.value)


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield datasets
    datasets.enable_progress_bars()


def test_saved_datasets(datasets, tmp_path):
    records = [{"messages": say(f"user:{i}?", f"assistant:#### {i}")} for i in range(10)]
    data = datasets.Dataset.from_list(records)
    data.save_to_disk(tmp_path / "whole")
    datasets.DatasetDict(train=data.select(range(8)), test=data.select([8, 9])).save_to_disk(tmp_path / "splits")

    def task(name, **settings):
        return get_task(TaskConfig(name="prompts", dataset=str(tmp_path / name), **settings))

    assert len(task("whole").problems("train")) == len(task("whole").problems("test")) == 10
    train, test = (task("splits").problems(split) for split in ("train", "test"))
    assert [p.answer for p in train + test] == [str(i) for i in range(10)]
    assert train[0] == Problem(
        f"{tmp_path}/splits/train:1", "0?", "0", {"reply": "#### 0"}, [{"role": "user", "content": "0?"}]
    )
    assert task("splits").held_out()
    assert not task("splits", dataset_test_split="train").held_out()
    assert len(task("splits", dataset_test_split="train").problems("dev")) == 8
    with pytest.raises(T3DError, match=r"\(validation\) from its folder: its splits are train, test; choose with task"):
        task("splits").problems("dev")


def test_folders_of_data_files(datasets, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for split in ("train", "test"):
        lines = [json.dumps({"prompt": f"{split} {i}?", "completion": "yes"}) + "\n" for i in range(4)]
        (folder / f"{split}.jsonl").write_text("".join(lines))

    def asked(split, **settings):
        task = get_task(TaskConfig(name="prompts", dataset=str(folder), **settings))
        return [p.question for p in task.problems(split)]

    assert asked("train") == [f"train {i}?" for i in range(4)]
    assert asked("test") == [f"test {i}?" for i in range(4)]
    assert asked("train", dataset_train_split="train[:50%]") == ["train 0?", "train 1?"]
    assert asked("test", dataset_test_split="train[50%:]") == ["train 2?", "train 3?"]
    with pytest.raises(T3DError, match=r"Unknown split .*choose with task\.dataset_train_split and"):
        asked("test", dataset_test_split="held_out")
    with pytest.raises(T3DError, match=r"cannot load .* from its folder: BuilderConfig 'other' not found"):
        asked("train", dataset_config="other")


def test_keys_that_contradict(tmp_path):
    with pytest.raises(T3DError, match=r"task\.dataset_config is of a dataset; set task\.dataset, too"):
        TaskConfig(name="prompts", dataset_config="main")
    with pytest.raises(T3DError, match=r"task\.path and task\.dataset both say where the problems are"):
        TaskConfig(name="prompts", path="a", dataset="b")
    with pytest.raises(T3DError, match=rf"is a folder; .*or task.dataset={tmp_path}"):
        get_task(TaskConfig(name="prompts", path=str(tmp_path))).problems("train")
