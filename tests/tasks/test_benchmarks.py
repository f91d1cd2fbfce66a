import json
from random import Random

import pytest

from t3d.errors import T3DError
from t3d.tasks import TaskConfig, get_task, task_names

MATH = {  # the schema of HuggingFaceH4/MATH-500
    "problem": "What is half of one?",
    "solution": "It is $\\boxed{\\frac{1}{2}}$.",
    "answer": "\\frac{1}{2}",
    "subject": "Prealgebra",
    "level": 1,
    "unique_id": "test/prealgebra/1.json",
}
GENVERSE = {"question": "What is half of one?", "ground_truth_answer": " 0.5 ", "level": 5, "subject": "Algebra"}


def load(tmp_path, name, *records, split="test", **settings):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records))
    task = get_task(TaskConfig(name=name, path=str(path), **settings))
    return task, task.problems(split)


def test_all_tasks_are_found():
    names = "word_problems prompts gsm8k math500 math_train mbpp humaneval primeintellect option code"
    assert set(task_names()) >= set(names.split())


@pytest.mark.parametrize("record", [MATH, GENVERSE])
def test_math500_in_both_forms(tmp_path, record):
    task, (problem,) = load(tmp_path, "math500", record)
    assert problem.question == "What is half of one?"
    assert problem.id == record.get("unique_id", "data:1")
    assert task.verify(r"so \boxed{\tfrac12}", problem)
    assert task.verify(r"so \boxed{2}", problem) is False
    assert task.verify("so 0.5", problem) is False  # not in a box
    assert task.prompt_text(problem).endswith(
        "\nPlease reason step by step, and put your final answer within \\boxed{}."
    )
    if record is MATH:
        assert task.solution(problem, Random(0)) == MATH["solution"]
        assert task.verify(task.solution(problem, Random(0)), problem)
    else:
        with pytest.raises(T3DError, match="no ground-truth responses"):
            task.solution(problem, Random(0))


COMPETITION = [  # answers in the forms that MATH-500 has, each with a right and a wrong one of a model
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)", r"(3, \pi/3)"),
    (r"[-2,7]", r"x \in [-2, 7]", r"(-2, 7)"),
    (r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}", r"\begin{bmatrix} -\tfrac13 \\ \tfrac23 \end{bmatrix}", r"\frac13"),
    (r"\text{Evelyn}", "Evelyn", "Carla"),
    (r"90^\circ", "90", "91"),
    (r"\$32,\!348", "32348", "32,384"),
    (r"10\%", "10", "100"),
    (r"52_8", "52_{8}", "52_9"),
    (r"13 \frac{1}{2}", r"\dfrac{27}{2}", r"\dfrac{1}{2}"),
    (r"11,\! 111,\! 111", "11111111", "1111111"),
    ("3, 5, 7", r"\{7, 5, 3\}", "3, 5"),
    (r"1 \pm \sqrt{19}", r"1+\sqrt{19}, 1-\sqrt{19}", r"1+\sqrt{19}"),
    (r"\text{(C)}", "C", "D"),
    (r"15\mbox{ cm}^2", r"15 \text{ cm}^2", "16"),
]


def test_a_file_in_math500s_schema(tmp_path):
    """JSON lines with `problem, solution, answer, subject, level, unique_id`, as the hub's file is."""
    records = [
        {
            "problem": f"Problem {i}?",
            "solution": f"First $\\boxed{{0}}$ seems right, but it is $\\boxed{{{answer}}}$.",
            "answer": answer,
            "subject": "Algebra",
            "level": 1 + i % 5,
            "unique_id": f"test/algebra/{i}.json",
        }
        for i, (answer, _, _) in enumerate(COMPETITION)
    ]
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    task = get_task(TaskConfig(name="math500", path=str(path)))
    problems = task.problems("test")
    assert [(p.id, p.question, p.answer) for p in problems] == [
        (r["unique_id"], r["problem"], r["answer"]) for r in records
    ]
    for problem, record, (_, right, wrong) in zip(problems, records, COMPETITION, strict=True):
        assert task.verify(record["solution"], problem)
        assert task.verify(f"So it is $\\boxed{{{right}}}$.", problem), right
        assert task.verify(f"So it is $\\boxed{{{wrong}}}$.", problem) is False, wrong
        assert task.verify(f"So it is {right}.", problem) is False  # not in a box


def test_math_train_leaves_out_answers_that_are_none(tmp_path):
    _, problems = load(tmp_path, "math_train", GENVERSE, GENVERSE | {"ground_truth_answer": "None"}, split="train")
    assert [p.id for p in problems] == ["data:1"]


def test_gsm8k_forms_agree(shared_data):
    forms = {"gsm8k/test.jsonl": 1319, "genverse/gsm8k_test.jsonl": 1319}
    problems = {}
    for path, count in forms.items():
        task = get_task(TaskConfig(name="gsm8k", path=str(shared_data / path)))
        problems[path] = task.problems("test")
        assert len(problems[path]) == count
    for ours, theirs in zip(*problems.values(), strict=True):
        assert ours.question == theirs.question
        assert ours.answer.replace(",", "") == theirs.answer.replace(",", "")
    task = get_task(TaskConfig(name="gsm8k", path=str(shared_data / "gsm8k" / "test.jsonl")))
    for problem in problems["gsm8k/test.jsonl"]:
        text = task.solution(problem, Random(0))
        assert "<<" not in text
        assert "####" not in text
        assert text.endswith(f"The answer is \\boxed{{{problem.answer}}}.")
        assert task.verify(text, problem)


@pytest.mark.parametrize(
    ("record", "response", "correct"),
    [
        ({"question": "A. x\nB. y", "answer": "B"}, r"\boxed{B}", True),
        ({"question": "A. x\nB. y", "answer": "B"}, r"\boxed{A}", False),
        ({"question": "?", "answer": "(b)"}, r"\boxed{\text{(B)}}", True),
        ({"question": "?", "ground_truth_answer": "C"}, r"\boxed{C. because}", True),
        ({"question": "?", "choices": ["x", "y"], "answer": 1}, r"\boxed{b}", True),
        ({"question": "?", "options": ["x", "y"], "answer": 0}, r"\boxed{B}", False),
        ({"question": "?", "answer": "A"}, "A", False),
        ({"question": "?", "answer": "A"}, r"\boxed{And}", False),
        ({"question": "?"}, r"\boxed{A}", None),
    ],
)
def test_option(tmp_path, record, response, correct):
    task, (problem,) = load(tmp_path, "option", record)
    assert task.verify(response, problem) is correct
    for i, choice in enumerate(record.get("choices", [])):
        assert f"\n{'ABCD'[i]}. {choice}" in problem.question


def test_option_with_an_answer_that_is_none_of_them(tmp_path):
    with pytest.raises(T3DError, match="record 1: the answer '7' is not the letter"):
        load(tmp_path, "option", {"question": "?", "choices": ["x", "y"], "answer": 7})


@pytest.mark.parametrize("name", ["gsm8k", "math500", "mbpp", "humaneval", "option"])
def test_without_network_one_line_says_what_to_do(name, monkeypatch, tmp_path):
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(T3DError, match=r"cannot load .*HF_HUB_OFFLINE.*set task\.path=FILE") as caught:
        get_task(TaskConfig(name=name)).problems("test")
    assert "\n" not in str(caught.value)


def test_splits_that_are_not_there():
    with pytest.raises(T3DError, match="math500 has no train problems on the hub, only test"):
        get_task(TaskConfig(name="math500")).problems("train")
    with pytest.raises(T3DError, match="math_train has no test problems"):
        get_task(TaskConfig(name="math_train")).problems("test")


def test_datasets_of_the_hub_kind(tmp_path, monkeypatch):
    """`datasets` reads a folder as it reads the hub."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "MATH500"
    folder.mkdir()
    (folder / "test.jsonl").write_text(json.dumps(MATH) + "\n" + json.dumps(MATH | {"unique_id": "2"}) + "\n")
    task = get_task(TaskConfig(name="math500", dataset=str(folder)))
    assert [p.id for p in task.problems("test")] == ["test/prealgebra/1.json", "2"]
    assert task.problems("test")[0].answer == "\\frac{1}{2}"


def test_train_on_one_task_and_evaluate_on_another(tmp_path):
    path = tmp_path / "math.json"
    path.write_text(json.dumps([MATH]))
    config = TaskConfig(name="math_train", path=str(path), eval_name="math500", eval_path=str(path))
    assert get_task(config).name == "math_train"
    assert get_task(config, evaluation=True).problems("test")[0].answer == "\\frac{1}{2}"
