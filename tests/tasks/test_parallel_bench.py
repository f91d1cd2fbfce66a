import json
from itertools import product
from math import perm, prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t3d.errors import T3DError
from t3d.tasks import TaskConfig, get_task
from t3d.tasks.base import split_of
from t3d.tasks.parallel_bench import KINDS, answers, draws_accuracy, expected_accuracy, latin_squares, problem
from t3d.tasks.tokenizer import pieces
from t3d.tasks.word_problems import build_tokenizer

TOKENIZER = build_tokenizer()
TASKS = {kind: get_task(TaskConfig(name="parallel_bench", kind=kind)) for kind in KINDS}
ONE_ANSWER = ("copy", "reverse", "sort", "replace")


@given(st.sampled_from(sorted(KINDS)), st.integers(0, 10**6), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_every_solution_is_valid_and_made_of_known_tokens(kind, index, rng):
    task = TASKS[kind]
    p = problem(kind, task.size, index, "dev", index)
    text = task.solution(p, rng)
    assert task.verify(text, p) is True
    assert task.verify(p.answer, p) is True
    changed = text.split()
    changed[0] = "Zoe" if changed[0] != "Zoe" else "Tom"
    assert task.verify(" ".join(changed), p) is False or kind == "words"
    assert task.verify(" ".join(text.split()[:-1]), p) is False
    assert task.verify(f"{text} Mia", p) is False
    assert task.verify("", p) is False
    for said in (p.question, text, task.telling(p, text)[1]):
        ids = TOKENIZER(said, add_special_tokens=False)["input_ids"]
        assert TOKENIZER.unk_token_id not in ids
        assert TOKENIZER.decode(ids) == said


@pytest.mark.parametrize(
    ("kind", "names", "right", "wrong"),
    [
        ("copy", ["Mia", "Tom", "Ana"], "Mia Tom Ana", "Mia Ana Tom"),
        ("reverse", ["Mia", "Tom", "Ana"], "Ana, Tom, Mia", "Mia Tom Ana"),
        ("sort", ["Mia", "Tom", "Ana"], "Ana\nMia\nTom\n", "Ana Tom Mia"),
        ("replace", ["Mia", "Tom", "Ana", "Tom", "Zoe"], "Mia Zoe Ana", "Mia Tom Ana"),
        ("shuffle", ["Mia", "Tom", "Ana"], "Tom Mia Ana", "Tom Mia Tom"),
        ("latin_square", ["Mia", "Tom"], "Tom Mia\nMia Tom", "Tom Mia\nTom Mia"),
        ("words", [["Mia", "Tom", "coins", "3"]], "Tom bought 3 coins from Mia.", "Mia bought 3 coins from Tom."),
        ("words", [["Mia", "Tom", "coins", "3"]], "Mia lost 3 coins to Tom.", "Mia lost 3 coins from Tom."),
    ],
)
def test_what_counts_as_valid(kind, names, right, wrong):
    task, p = TASKS[kind], problem(kind, KINDS[kind].size, 0, "test", 0)
    p.extra["given"] = names
    assert task.judge(right, p).correct is True
    found = task.judge(wrong, p)
    assert (found.correct, found.extracted) == (False, wrong)
    assert found.reason.startswith("expected" if kind in ONE_ANSWER else "none of")


@pytest.mark.parametrize("kind", KINDS)
def test_problems_depend_on_the_seed_alone_and_splits_are_disjoint(kind):
    task = TASKS[kind]
    first = task.problems("test", 5, seed=3)
    assert task.problems("test", 3, seed=3) == first[:3]
    assert task.problems("test", 5, seed=4) != first
    assert json.loads(json.dumps(first[0].extra)) == first[0].extra
    sets = [{p.question for p in task.problems(split, 100, seed=3)} for split in ("train", "dev", "test")]
    assert len(set.union(*sets)) == sum(map(len, sets))
    assert {split_of(question) for question in sets[0]} == {"train"}


@pytest.mark.parametrize(
    ("kind", "size", "per_step", "first"),
    [
        ("shuffle", 3, 2, None),
        ("shuffle", 4, 2, 1),
        ("shuffle", 4, 4, None),
        ("latin_square", 2, 2, None),
        ("latin_square", 2, 3, 1),
        ("words", 1, 4, None),
        ("words", 1, 7, None),
        ("reverse", 4, 4, None),
    ],
)
def test_accuracy_is_that_of_all_possible_draws(kind, size, per_step, first):
    """Every draw at every step, also those that leave the valid answers, weighed with its probability."""
    valid = [pieces(answer) for answer in answers(problem(kind, size, 0, "train", 0))]

    def outcomes(begun: tuple, alive: list, width: int) -> dict:
        if len(begun) == len(valid[0]):
            return {begun: 1.0}
        if not alive:
            return {begun: 1.0}  # not valid, however it goes on
        columns = [[answer[i] for answer in alive] for i in range(len(begun), min(len(begun) + width, len(valid[0])))]
        found = {}
        for drawn in product(*map(sorted, map(set, columns))):
            chance = prod(column.count(token) / len(alive) for column, token in zip(columns, drawn, strict=True))
            longer = (*begun, *drawn)
            agreeing = [answer for answer in alive if tuple(answer[: len(longer)]) == longer]
            found |= {text: chance * p for text, p in outcomes(longer, agreeing, per_step).items()}
        return found

    every = outcomes((), valid, first or per_step)
    assert sum(every.values()) == pytest.approx(1)
    expected = sum(p for text, p in every.items() if list(text) in valid)
    assert expected_accuracy(kind, size, per_step, first) == pytest.approx(expected)


def test_known_accuracies():
    for kind in ONE_ANSWER:
        assert expected_accuracy(kind, 6, 4) == 1
    for kind in ("shuffle", "latin_square", "words"):
        assert expected_accuracy(kind, 2, 1) == pytest.approx(1)
    groups = (2, 2, 1)  # a shuffle's draws differ if, of m that are left, g are: m! / (m - g)! / m^g
    left = (5, 3, 1)
    assert expected_accuracy("shuffle", 5, 2) == pytest.approx(
        prod(perm(m, g) / m**g for m, g in zip(left, groups, strict=True))
    )
    assert draws_accuracy(["ab", "cd"], 2) == 0.5
    assert [len(latin_squares(n)) for n in (2, 3, 4)] == [2, 12, 576]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "task.kind is one of copy, reverse, sort, replace, shuffle, latin_square, words, got None"),
        ({"kind": "shufle"}, "(did you mean 'shuffle'?)"),
        ({"kind": "latin_square", "size": 5}, "task.size of latin_square must lie in 2..4, got 5"),
        ({"kind": "copy", "size": 1}, "task.size of copy must lie in 2..11, got 1"),
    ],
)
def test_requests_that_make_no_sense(settings, said):
    with pytest.raises(T3DError) as error:
        get_task(TaskConfig(name="parallel_bench", **settings))
    assert said in str(error.value)
    with pytest.raises(T3DError, match="say how many to use"):
        TASKS["copy"].problems("train")
