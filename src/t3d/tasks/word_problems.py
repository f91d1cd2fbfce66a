"""The embedded task: grade-school word problems with a chain of thought, generated from a seed.

Every sentence is drawn from several paraphrases of different lengths, independently of the question. So the
text is multi-modal: given the start of a response, the next tokens depend on each other, and a model that
commits several of them in one step, each from its own marginal, mixes the paraphrases up. That is what breaks
few-step decoding in real models, here at a size that a laptop trains in minutes.

A problem's content (story, names, item, numbers; not its wording) decides by hash whether it is a train, dev
or test problem, so the splits are disjoint for all seeds.
"""

from collections.abc import Iterator
from itertools import product
from random import Random

from t3d.errors import T3DError
from t3d.tasks.base import Problem, Task, Verdict, check_split, register, split_of
from t3d.tasks.math import equal, last_boxed
from t3d.tasks.tokenizer import word_tokenizer

NAMES = ("Mia", "Tom", "Ana", "Ben", "Lily", "Sam", "Zoe", "Max", "Emma", "Leo", "Nora", "Jack")
ITEMS = ("apples", "pears", "books", "coins", "stamps", "marbles", "cards", "shells", "pencils", "buttons")
BOXES = ("bags", "boxes", "baskets")
LOW, HIGH = 2, 99  # every number lies in here; never 1, so that every noun is plural

# Slots: {n} {f} {g} three people, {S}/{s}/{o} who acts ("They"/"they"/"them" or a name), {i} the item, {u} what
# is counted (the item or dollars), {x} the kind of box, {a} {b} the two numbers of a sentence, {c} the result.
QUESTION = {
    "had": ("{n} had {a} {u}.", "{n} started with {a} {u}.", "At first, {n} had {a} {u}."),
    "gain": ("{S} got {b} more.", "Then {s} found {b} more {u}.", "Then {g} gave {o} {b} more {u}."),
    "loss": (
        "{S} lost {b} {u}.",
        "Then {s} gave {b} {u} to {g}.",
        "After that, {s} gave away {b} of the {u}.",
    ),
    "groups": ("{n} had {a} {x} with {b} {u} in each.", "{n} filled {a} {x} with {b} {u} each."),
    "more": ("{f} had {b} more {u} than {n}.", "{f} had {b} more than that."),
    "fewer": ("{f} had {b} fewer {u} than {n}.", "{f} had {b} fewer than that."),
    "times": ("{f} had {a} times as many {u} as {n}.", "{f} had {a} times as many."),
    "pool": ("{n} had {a} {u} and {f} had {b}.", "{n} brought {a} {u}, and {f} brought {b} more."),
    "shop": ("{n} bought {a} {i} for {b} dollars each.", "Then {n} paid {b} dollars each for {a} {i}."),
    "ask": (
        "How many {u} did {s} have then?",
        "How many {u} did {s} have in the end?",
        "Find how many {u} {s} had.",
    ),
    "ask both": ("How many {u} did they have together?", "How many {u} did {n} and {f} have in all?"),
}
OPENING = (
    "Let us think.",
    "We go step by step.",
    "First, we look at what {n} had.",
    "To find the number of {u}, we go step by step.",
)
STEPS = {
    "gain": (
        "{S} got {b} more, so {a} + {b} = {c}.",
        "Adding {b} makes {a} + {b} = {c} {u}.",
        "Now there were {a} + {b} = {c}.",
        "With {b} more {u}, {s} had {a} + {b} = {c}.",
    ),
    "loss": (
        "That left {a} - {b} = {c} {u}.",
        "Taking away {b} makes {a} - {b} = {c}.",
        "Without those {b} {u}, {s} had {a} - {b} = {c}.",
        "Then {a} - {b} = {c} were left.",
    ),
    "groups": (
        "The {x} held {a} × {b} = {c} {u}.",
        "In all there were {a} × {b} = {c}.",
        "With {b} in each, {n} had {a} × {b} = {c} {u}.",
        "Since there were {a} {x} of {b}, we get {a} × {b} = {c}.",
    ),
    "shop": (
        "The {i} cost {a} × {b} = {c} dollars.",
        "In all, {n} paid {a} × {b} = {c}.",
        "With {b} dollars for each, that is {a} × {b} = {c} dollars.",
        "Since {n} bought {a} {i}, we get {a} × {b} = {c}.",
    ),
    "more": (
        "{f} had {b} more, so {a} + {b} = {c}.",
        "For {f} this makes {a} + {b} = {c} {u}.",
        "So {f} had {a} + {b} = {c}.",
        "Adding {b} to what {n} had, we get {a} + {b} = {c} {u}.",
    ),
    "fewer": (
        "{f} had {b} fewer, so {a} - {b} = {c}.",
        "For {f} this makes {a} - {b} = {c} {u}.",
        "So {f} had {a} - {b} = {c}.",
        "Taking {b} from what {n} had, we get {a} - {b} = {c} {u}.",
    ),
    "times": (
        "{f} had {a} times as many, so {a} × {b} = {c}.",
        "For {f} this makes {a} × {b} = {c} {u}.",
        "So {f} had {a} × {b} = {c}.",
        "With {a} times what {n} had, we get {a} × {b} = {c} {u}.",
    ),
    "total": (
        "Together they had {a} + {b} = {c} {u}.",
        "Adding both makes {a} + {b} = {c}.",
        "In all, {n} and {f} had {a} + {b} = {c}.",
        "The sum is {a} + {b} = {c} {u}.",
    ),
}
CLOSING = (
    "The answer is \\boxed{{{c}}}.",
    "So {s} had \\boxed{{{c}}} {u}.",
    "In the end, there were \\boxed{{{c}}} {u}.",
    "So the number of {u} in the end is \\boxed{{{c}}}.",
)
_SIGN = {
    "gain": "+",
    "more": "+",
    "total": "+",
    "loss": "-",
    "fewer": "-",
    "groups": "×",
    "shop": "×",
    "times": "×",
}


def _result(kind: str, a: int, b: int) -> int:
    return {"+": a + b, "-": a - b, "×": a * b}[_SIGN[kind]]


# A story draws its numbers and returns the facts [(kind of sentence, a, b)] of the question and the steps of
# the answer in the same form. `problem` draws again where a number is out of range.
def _events(rng: Random, total: int, count: int) -> list[tuple[str, int, int]]:
    steps = []
    for _ in range(count):
        kind, amount = rng.choice(("gain", "loss")), rng.randint(2, 20)
        steps.append((kind, total, amount))
        total = _result(kind, total, amount)
    return steps


def _change(rng: Random):
    start = rng.randint(5, 40)
    events = _events(rng, start, rng.choice((2, 2, 3)))
    return [("had", start, 0), *events], events


def _groups(rng: Random):
    group = ("groups", rng.randint(2, 9), rng.randint(2, 9))
    events = _events(rng, _result(*group), rng.choice((1, 2)))
    return [group, *events], [group, *events]


def _compare(rng: Random):
    compare = (rng.choice(("more", "fewer")), rng.randint(5, 40), rng.randint(2, 20))
    return [("had", compare[1], 0), compare], [compare, ("total", compare[1], _result(*compare))]


def _times(rng: Random):
    times = ("times", rng.randint(2, 4), rng.randint(2, 15))
    return [("had", times[2], 0), times], [times, ("total", times[2], _result(*times))]


def _pool(rng: Random):
    pool = (rng.randint(5, 40), rng.randint(5, 40))
    events = _events(rng, sum(pool), 1)
    return [("pool", *pool), *events], [("total", *pool), *events]


def _shop(rng: Random):
    start, shop = rng.randint(10, 90), ("shop", rng.randint(2, 9), rng.randint(2, 9))
    spend = ("loss", start, _result(*shop))
    events = _events(rng, _result(*spend), rng.choice((0, 1)))
    return [("had", start, 0), shop, *events], [shop, spend, *events]


STORIES = {
    "change": _change,
    "groups": _groups,
    "compare": _compare,
    "times": _times,
    "pool": _pool,
    "shop": _shop,
}


def _draw(rng: Random) -> tuple[str, list, dict]:
    """Content (all that the question always states), facts of the question, and what a solution needs."""
    story = rng.choice(tuple(STORIES))
    facts, steps = STORIES[story](rng)
    n, f, g = rng.sample(NAMES, 3)
    item = rng.choice(ITEMS)
    both = story in ("compare", "times", "pool")
    slots = {
        "n": n,
        "f": f,
        "g": g,
        "S": "They" if both else n,
        "s": "they" if both else n,
        "o": "them" if both else n,
        "i": item,
        "u": "dollars" if story == "shop" else item,
        "x": rng.choice(BOXES),
    }
    content = "|".join(map(str, [story, n, f if both else "", item, *(x for fact in facts for x in fact)]))
    return content, facts, {"story": story, "slots": slots, "steps": [list(step) for step in steps]}


def problem(seed: int, split: str, index: int) -> Problem:
    """Problem `index` of `split`, a function of its arguments alone."""
    check_split(split)
    rng = Random(f"word_problems/{seed}/{split}/{index}")
    while True:
        content, facts, extra = _draw(rng)
        numbers = [x for kind, a, b in extra["steps"] for x in (a, b, _result(kind, a, b))]
        if split_of(content) == split and min(numbers) >= LOW and max(numbers) <= HIGH:
            break
    ask = "ask both" if extra["steps"][-1][0] == "total" else "ask"
    question = " ".join(
        rng.choice(QUESTION[kind]).format(a=a, b=b, **extra["slots"]) for kind, a, b in [*facts, (ask, 0, 0)]
    )
    extra["content"] = content
    return Problem(f"word_problems/{split}/{seed}/{index:06d}", question, str(numbers[-1]), extra)


def _sentences(problem: Problem) -> list[list[str]]:
    """The paraphrases of each sentence of the response, in order."""
    slots, steps = problem.extra["slots"], problem.extra["steps"]
    said = [[text.format(**slots) for text in OPENING]]
    for kind, a, b in steps:
        said.append([text.format(a=a, b=b, c=_result(kind, a, b), **slots) for text in STEPS[kind]])
    said.append([text.format(c=problem.answer, **slots) for text in CLOSING])
    return said


def solution(problem: Problem, rng: Random) -> str:
    """A correct response: for each sentence one of its paraphrases, at random."""
    return " ".join(rng.choice(paraphrases) for paraphrases in _sentences(problem))


def all_solutions(problem: Problem) -> Iterator[str]:
    """Every response that `solution` can write; all are equally likely."""
    return (" ".join(sentences) for sentences in product(*_sentences(problem)))


def build_tokenizer():
    """The task's tokenizer (a `PreTrainedTokenizerFast`): every word that its texts can hold."""
    people = [text for name in NAMES for text in (name, " " + name)]
    words = [" " + word for word in (*ITEMS, *BOXES, "dollars", "They", "they", "them")]
    digits = [text for digit in range(10) for text in (f"{digit}", f" {digit}")]
    filled = {"S": "They", "s": "they", "o": "them", "i": "apples", "u": "apples", "x": "bags"}
    filled |= dict.fromkeys("nfg", "Mia") | dict.fromkeys("abc", 22)
    first = [*OPENING, *QUESTION["had"], *QUESTION["groups"], *QUESTION["pool"]]
    later = [*CLOSING, *(text for kinds in (QUESTION, STEPS) for texts in kinds.values() for text in texts)]
    return word_tokenizer(
        [
            *people,
            *words,
            *digits,
            *(t.format(**filled) for t in first),
            *(" " + t.format(**filled) for t in later),
        ]
    )


@register("word_problems")
class WordProblems(Task):
    """Unlimited generated problems; see the module."""

    def problems(self, split: str, n: int | None = None, seed: int | None = None) -> list[Problem]:
        if n is None:
            raise T3DError("word_problems are unlimited; say how many to use (task.num_train, task.num_eval)")
        seed = self.config.data_seed if seed is None else seed
        return [problem(seed, split, index) for index in range(n)]

    def judge(self, text: str, problem: Problem) -> Verdict:
        answer = last_boxed(text)
        if answer is None:
            return Verdict(False, None, "no \\boxed{} answer")
        correct = equal(answer, problem.answer)
        return Verdict(correct, answer, "" if correct else f"expected {problem.answer}")

    def telling(self, problem: Problem, answer: str) -> tuple[str | None, str]:
        """In words that the task's tokenizer has, where they stand in its texts: behind others."""
        return None, f"{self.prompt_text(problem)} The answer is \\boxed{{{answer}}}."

    def solution(self, problem: Problem, rng: Random) -> str:
        return solution(problem, rng)
