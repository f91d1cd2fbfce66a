"""What tokens decided together get wrong: the kinds of task of ParallelBench (arXiv 2510.04767), generated from a seed.

A question is written in the words of the embedded tokenizer, so that its models can learn every kind; one word is one
token there. All valid answers to a question are as long as each other and equally likely. Where there is one (copy,
reverse, sort, replace), its tokens can be decided in any number. Where there are several (shuffle, latin_square,
words), tokens depend on each other, and a model that knows all probabilities but draws several tokens at once, each by
itself, mixes the answers up. How often is known exactly: `expected_accuracy`.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations, product
from math import prod
from random import Random

from t3d.errors import T3DError, nearest
from t3d.tasks.base import Problem, Task, Verdict, check_split, register, split_of
from t3d.tasks.tokenizer import pieces
from t3d.tasks.word_problems import ITEMS, NAMES


@dataclass(frozen=True)
class Kind:
    """One kind of problem. What is `given` is a list that JSON can hold."""

    draw: Callable[[Random, int], list]  # what is given in a problem of this size
    question: Callable[[list], str]
    answers: Callable[[list], Iterable[str]]  # all that are valid
    sizes: range
    size: int = 6


def _names(rng: Random, size: int) -> list[str]:
    return rng.sample(NAMES, size)


def _asking(how: str) -> Callable[[list[str]], str]:
    return lambda given: f"At first there were {' '.join(given)}. {how.format(size=len(given))}"


def _replace_question(given: list[str]) -> str:
    *names, old, new = given
    return _asking(f"Find them as they were, with {new} for {old}.")(names)


def _replaced(given: list[str]) -> list[str]:
    *names, old, new = given
    return [" ".join(new if name == old else name for name in names)]


def _draw_replacement(rng: Random, size: int) -> list[str]:
    *names, new = _names(rng, size + 1)
    return [*names, rng.choice(names), new]


@cache
def latin_squares(size: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """All squares of `size` rows in which every row and every column has each of 0 .. size-1 once."""
    squares = [()]
    for _ in range(size):
        squares = [
            (*rows, new)
            for rows in squares
            for new in permutations(range(size))
            if all(a != b for row in rows for a, b in zip(row, new, strict=True))
        ]
    return tuple(squares)


def _latin(given: list[str]) -> Iterator[str]:
    for square in latin_squares(len(given)):
        yield "\n".join(" ".join(given[i] for i in row) for row in square)


def _transfers(rng: Random, size: int) -> list[list[str]]:
    return [[*rng.sample(NAMES, 2), rng.choice(ITEMS), str(rng.randint(2, 9))] for _ in range(size)]


def _words_question(given: list[list[str]]) -> str:
    told = (f"At first {a} had {number} {item}. Then {b} had them." for a, b, item, number in given)
    return f"{' '.join(told)} Find how."


def _sentences(given: list[list[str]]) -> Iterator[str]:
    """For each fact, that the one gave (lost) it to the other, or that the other got (bought) it from the one."""
    said = [
        [f"{a} {verb} {what} to {b}." for verb in ("gave", "lost")]
        + [f"{b} {verb} {what} from {a}." for verb in ("got", "bought")]
        for a, b, what in ((a, b, f"{number} {item}") for a, b, item, number in given)
    ]
    return map(" ".join, product(*said))


LIST = range(2, 12)  # more names than these there are not, with one to replace another
KINDS = {
    "copy": Kind(_names, _asking("Find them as they were."), lambda given: [" ".join(given)], LIST),
    "reverse": Kind(
        _names, _asking("Find them from the end to the first."), lambda given: [" ".join(given[::-1])], LIST
    ),
    "sort": Kind(_names, _asking("Find them from Ana to Zoe."), lambda given: [" ".join(sorted(given))], LIST),
    "replace": Kind(_draw_replacement, _replace_question, _replaced, LIST),
    "shuffle": Kind(
        _names, _asking("Find all of them."), lambda given: map(" ".join, permutations(given)), range(2, 8)
    ),
    "latin_square": Kind(
        _names, _asking("Find all of them {size} times, with each of them at each number."), _latin, range(2, 5), 3
    ),
    "words": Kind(_transfers, _words_question, _sentences, range(1, 5), 2),
}


def problem(kind: str, size: int, seed: int, split: str, index: int) -> Problem:
    """Problem `index` of `split`, a function of its arguments alone. `extra` has its kind and what is given."""
    check_split(split)
    name = f"parallel_bench/{kind}{size}/{split}/{seed}/{index:06d}"
    rng = Random(name)
    while True:
        given = KINDS[kind].draw(rng, size)
        question = KINDS[kind].question(given)
        if split_of(question) == split:
            break
    return Problem(name, question, rng.choice(list(KINDS[kind].answers(given))), {"kind": kind, "given": given})


def answers(problem: Problem) -> Iterable[str]:
    """Every valid answer; all are equally likely."""
    return KINDS[problem.extra["kind"]].answers(problem.extra["given"])


def draws_accuracy(answers: Sequence[Sequence[str]], per_step: int, first: int | None = None) -> float:
    """Probability that independent draws from the exact marginals make one of the answers: in 0..1, no percentage.

    Tokens are decided from left to right, S_1 first, S_2 then, ..., those of one step at once. Each is drawn from its
    marginal among the `answers` Y (all equally likely) that agree with the steps before, so that this is

        sum over y in Y of the product over steps t and places i in S_t of p(y_i | y_{S_1}, ..., y_{S_{t-1}}).

    answers: different sequences of tokens, all of one length.
    per_step: tokens in a step, but for what is left to the last one.
    first: tokens in the first step: in the block that the prompt has begun there may be fewer places.
    """
    width = min(per_step if first is None else first, len(answers[0]))
    if not width:
        return 1.0
    marginals = [Counter(answer[i] for answer in answers) for i in range(width)]
    agreeing = defaultdict(list)
    for answer in answers:
        agreeing[tuple(answer[:width])].append(answer[width:])
    return sum(
        prod(marginal[token] / len(answers) for marginal, token in zip(marginals, drawn, strict=True))
        * draws_accuracy(rest, per_step)
        for drawn, rest in agreeing.items()
    )


@cache
def expected_accuracy(kind: str, size: int, per_step: int, first: int | None = None) -> float:
    """`draws_accuracy` of a problem of this kind and size in tokens of the embedded tokenizer; 1 where one answer is
    valid. The same for all problems of the kind and size, since they differ only in names."""
    return draws_accuracy([pieces(answer) for answer in answers(problem(kind, size, 0, "train", 0))], per_step, first)


@register("parallel_bench")
class ParallelBench(Task):
    """Unlimited problems of `task.kind`; see the module."""

    def __init__(self, config):
        super().__init__(config)
        if config.kind not in KINDS:
            known = ", ".join(KINDS)
            raise T3DError(f"task.kind is one of {known}, got {config.kind!r}{nearest(str(config.kind), KINDS)}")
        kind = KINDS[config.kind]
        self.size = kind.size if config.size is None else config.size
        if self.size not in kind.sizes:
            raise T3DError(f"task.size of {config.kind} must lie in {kind.sizes[0]}..{kind.sizes[-1]}, got {self.size}")

    def problems(self, split: str, n: int | None = None, seed: int | None = None) -> list[Problem]:
        if n is None:
            raise T3DError("parallel_bench is unlimited; say how many to use (task.num_train, task.num_eval)")
        seed = self.config.data_seed if seed is None else seed
        return [problem(self.config.kind, self.size, seed, split, index) for index in range(n)]

    def judge(self, text: str, problem: Problem) -> Verdict:
        """Whether the words and numbers of the response, all of them, are those of a valid answer, in order."""
        found = _words(text)
        valid = [_words(answer) for answer in answers(problem)]
        if found in valid:
            return Verdict(True, text.strip())
        reason = f"expected {problem.answer!r}" if len(valid) == 1 else f"none of {len(valid):,} valid answers"
        return Verdict(False, text.strip(), reason)

    def telling(self, problem: Problem, answer: str) -> tuple[str | None, str]:
        """In words that the embedded tokenizer has, where they stand in its texts: behind others."""
        return None, f"{self.prompt_text(problem)} The answer is {answer.rstrip('.')}."

    def solution(self, problem: Problem, rng: Random) -> str:
        return rng.choice(list(answers(problem)))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text)
