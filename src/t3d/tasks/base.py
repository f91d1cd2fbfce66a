"""What a task is: problems, the one place where a prompt becomes ids, and a verifier."""

import hashlib
import importlib.util
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

from t3d.chat_template import render
from t3d.components import check_values, setting
from t3d.decoding.config import DecodingConfig
from t3d.errors import T3DError, nearest
from t3d.tasks.retrieval import Documents, Passage, check_template, fill

SPLITS = ("train", "dev", "test")
STOP, DROP = "stop", "drop"  # what to do about prompts that cannot be decoded
DATASET_KEYS = ("dataset_config", "dataset_train_split", "dataset_test_split")
THINK = "<think>\n"


@dataclass(frozen=True)
class Problem:
    """One thing to answer. `id` is stable: the same data give the same ids in every run."""

    id: str
    question: str
    answer: str | None = None  # reference answer; None where there is nothing to compare with
    extra: dict = field(default_factory=dict)  # what the task needs besides (tests, story, ...)
    messages: list[dict] | None = None  # a chat (role, content) up to the user's last message; `question` tells it


@dataclass(frozen=True)
class Verdict:
    """What a verifier found in one response."""

    correct: bool | None  # None: the problem has nothing to verify against
    extracted: str | None = None  # the answer or the program that was judged; None if there was none
    reason: str = ""  # why it is not correct, one line


@dataclass
class TaskConfig:
    """Which problems to use and how to ask them."""

    name: str = setting("word_problems", "task, or a Python file that registers one")
    eval_name: str | None = setting(None, "another task for evaluation; default: `name`")
    path: str | None = setting(None, "local file to read problems from: JSONL, JSON, CSV, TSV, Parquet, gzipped or not")
    eval_path: str | None = setting(None, "local file for evaluation; default: `path`")
    dataset: str | None = setting(
        None, "dataset on the hub instead of the task's own, e.g. Gen-Verse/GSM8K, or a folder with one"
    )
    dataset_config: str | None = setting(None, "configuration (subset) of `dataset`")
    dataset_train_split: str | None = setting(None, "split of `dataset` for rollouts; default: train")
    dataset_test_split: str | None = setting(
        None, "split of `dataset` for evaluation, e.g. train[90%:]; default: test, or validation for dev"
    )
    question_field: str | None = setting(None, "field of the question; default: the task's own")
    answer_field: str | None = setting(None, "field of the reference answer; default: the task's own")
    id_field: str | None = setting(None, "field of the id; default: 'id' where present, else file and line")
    kind: str | None = setting(None, "of parallel_bench: which kind of problem, e.g. copy or shuffle")
    size: int | None = setting(None, "of parallel_bench: how many names, rows or sentences; default: the kind's own")
    template: str | None = setting(None, "prompt text around {question}; default: the task's own")
    retrieve: str | None = setting(
        None,
        "folder or file of documents (txt, md, jsonl with `text`): their best passages fill {context} of the template",
    )
    retrieve_passages: int = setting(3, "of retrieve: most passages for a question", low=1)
    retrieve_words: int = setting(128, "of retrieve: most words in a passage", low=1)
    start_with_think: bool = setting(False, "begin the answer with <think>")
    num_train: int | None = setting(None, "problems used for rollouts; default: all")
    num_eval: int | None = setting(None, "problems used for evaluation; default: all")
    bad_prompts: str = setting(
        STOP,
        "prompts that are too long or contain the mask token: 'stop' the run or 'drop' them",
        choices=(STOP, DROP),
    )
    data_seed: int = setting(0, "seed of generated problems and of the choice among more than asked for")
    time_scale: float = setting(1.0, "factor on the time limits of programs, for a slow machine")
    allow_unsandboxed: bool = setting(False, "run generated code even where the system offers no isolation")

    def __post_init__(self):
        check_values(self, "task.{}")
        if self.dataset is None:
            for name in DATASET_KEYS:
                if getattr(self, name) is not None:
                    raise T3DError(f"task.{name} is of a dataset; set task.dataset, too")
        elif self.path is not None:
            raise T3DError("task.path and task.dataset both say where the problems are; set one of them")


class Task:
    """A source of problems. A task is one file: a subclass of this with `@register(name)`."""

    name = ""
    template = "{question}"  # visible prompt text; the tokenizer's chat template goes around it

    def __init__(self, config: TaskConfig):
        self.config = config
        self.template = self.template if config.template is None else config.template
        check_template(self.template, "task.template", config.retrieve is not None)

    @cached_property
    def documents(self) -> Documents | None:
        """Those of `task.retrieve`, read when first asked for."""
        c = self.config
        return None if c.retrieve is None else Documents(c.retrieve, c.retrieve_passages, c.retrieve_words)

    def problems(self, split: str, n: int | None = None, seed: int | None = None) -> list[Problem]:
        """`n` problems of "train", "dev" or "test" (all if None); `seed` defaults to the config's `data_seed`."""
        raise T3DError(f"task {self.name!r} has no problems")

    def held_out(self) -> bool:
        """Whether the evaluation problems are known to be others than the training problems."""
        return True

    def prompt_text(self, problem: Problem) -> str:
        """The user's message: the question inside the task's template (other braces stay as they are).

        A chat's last message is whole without the task's own template; `task.template` goes around it.
        """
        if problem.messages is None:
            return fill(self.template, problem.question, self.documents)
        return fill(self.config.template or "{question}", problem.messages[-1]["content"], self.documents)

    def retrieved(self, question: str) -> list[Passage]:
        """What `task.retrieve` finds for a question, the best first; nothing without it."""
        return [] if self.documents is None else self.documents.search(question)

    def messages(self, problem: Problem, text: str) -> list[dict]:
        """The chat that ends with `text`, the user's message."""
        return [*(problem.messages or ())[:-1], {"role": "user", "content": text}]

    def answer_start(self, problem: Problem) -> str:
        """What the answer is made to begin with; it counts as prompt."""
        return THINK if self.config.start_with_think else ""

    def prompt(self, problem: Problem, tokenizer) -> list[int]:
        """Prompt ids: template, the tokenizer's chat template (if any) up to the answer, and the answer's start.

        Raises:
            T3DError: the chat template refuses the messages, or is missing where there are several.
        """
        messages = self.messages(problem, self.prompt_text(problem))
        text = _rendered(messages, tokenizer, problem.id) + self.answer_start(problem)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def known_answer(self, problem: Problem) -> str | None:
        """What a model that may know the answer is told; None where there is nothing to tell."""
        return problem.answer

    def answered_prompt(self, problem: Problem, tokenizer) -> list[int]:
        """As `prompt`, with the reference answer in a system message before it (TAD, arXiv 2605.09536).

        Raises:
            T3DError: if there is no answer, or the chat template shows no system messages.
        """
        answer = self.known_answer(problem)
        if answer is None:
            raise T3DError(
                f"train.reference_sees: task {self.name!r} has no reference answer to {problem.id!r}; give it one, or "
                "set reference_sees=prompt"
            )
        system, message = self.telling(problem, answer)
        text = _told(system, self.messages(problem, message), tokenizer, problem.id) + self.answer_start(problem)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def telling(self, problem: Problem, answer: str) -> tuple[str | None, str]:
        """The system message, if any, and the user's of a prompt that tells the answer."""
        return f"Reference Answer: {answer}", self.prompt_text(problem)

    def guided(self, decoding: DecodingConfig, tokenizer) -> DecodingConfig:
        """The settings with the negative prompt, if there is one, as a question of the task: in the same templates."""
        if decoding.negative_prompt is None:
            return decoding
        text = fill(self.template, decoding.negative_prompt, self.documents)
        text = _rendered([{"role": "user", "content": text}], tokenizer, "negative_prompt")
        return replace(decoding, negative_prompt=text + Task.answer_start(self, Problem("", "")))

    def judge(self, text: str, problem: Problem) -> Verdict:
        """What is to be said about the response `text`, which begins where the prompt ends. Safe in threads."""
        return Verdict(None)

    def judge_all(self, texts: Sequence[str], problems: Sequence[Problem]) -> list[Verdict]:
        """`judge` for many, in order."""
        return [self.judge(text, problem) for text, problem in zip(texts, problems, strict=True)]

    def verify(self, text: str, problem: Problem) -> bool | None:
        """Whether the response `text` answers `problem`; None if there is nothing to verify against."""
        return self.judge(text, problem).correct

    def solution(self, problem: Problem, rng: Random) -> str:
        """A ground-truth response (one of several at random, where there are several)."""
        raise T3DError(f"task {self.name!r} has no ground-truth responses for {problem.id}; train on rollouts")


def _rendered(messages: list[dict], tokenizer, name: str) -> str:
    """The messages in the tokenizer's chat template, up to the answer; without a template, the only one's text."""
    if not getattr(tokenizer, "chat_template", None):
        if len(messages) == 1:
            return messages[0]["content"]
        raise T3DError(
            f"{name}: {len(messages)} messages need a chat template, which the tokenizer does not have; add "
            "chat_template.jinja to the model's folder"
        )
    try:
        return render(tokenizer, messages, add_generation_prompt=True)
    except T3DError as error:
        raise T3DError(f"{name}: {error}") from error


def _told(system: str | None, messages: list[dict], tokenizer, name: str) -> str:
    """The messages as `_rendered`, with `system` in the system message."""
    if system is None:
        return _rendered(messages, tokenizer, name)
    if not getattr(tokenizer, "chat_template", None):
        return f"{system}\n\n" + _rendered(messages, tokenizer, name)
    content = system
    if messages[0]["role"] == "system":
        content, messages = f"{messages[0]['content']}\n\n{system}", messages[1:]
    try:
        found = _rendered([{"role": "system", "content": content}, *messages], tokenizer, name)
    except T3DError:
        found = ""
    if system.strip() not in found:
        raise T3DError(
            "train.reference_sees: the tokenizer's chat template shows no system message, where the reference answer "
            "would stand; set reference_sees=prompt"
        )
    return found


_TASKS: dict[str, type[Task]] = {}


def register(name: str) -> Callable[[type[Task]], type[Task]]:
    """Class decorator: makes the task known as `name`."""

    def add(cls: type[Task]) -> type[Task]:
        cls.name = name
        _TASKS[name] = cls
        return cls

    return add


def task_names() -> list[str]:
    """All known tasks: every module beside this one is imported, so a new file is a new task."""
    folder = Path(__file__).parent
    for module in pkgutil.iter_modules([str(folder)]):
        importlib.import_module(f"{__package__}.{module.name}")
    return sorted(_TASKS)


def get_task(config: TaskConfig, evaluation: bool = False) -> Task:
    """The task that `config` describes; with `evaluation`, the one of `eval_name` (on `eval_path`) if that is set.

    `config.name` is a registered name or the path of a Python file that registers one task.
    """
    if evaluation and config.eval_name is not None:
        others: dict[str, Any] = dict.fromkeys(("dataset", *DATASET_KEYS))
        config = replace(config, name=config.eval_name, path=config.eval_path, **others)
    if config.name.endswith(".py"):
        return _from_file(config.name)(config)
    names = task_names()
    if config.name not in names:
        raise T3DError(f"unknown task {config.name!r}{nearest(config.name, names)}; known: {', '.join(names)}")
    return _TASKS[config.name](config)


def _from_file(path: str) -> type[Task]:
    if not Path(path).is_file():
        raise T3DError(f"task file {path} does not exist")
    known = dict(_TASKS)
    unique = "t3d_task_" + hashlib.sha256(str(Path(path).resolve()).encode()).hexdigest()[:12]
    spec = importlib.util.spec_from_file_location(unique, path)
    assert spec is not None  # every .py file has both
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    added = [cls for name, cls in _TASKS.items() if known.get(name) is not cls]
    if len(added) != 1:
        raise T3DError(f"task file {path} must register exactly one task with @register(name), found {len(added)}")
    return added[0]


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise T3DError(f"unknown split {split!r}{nearest(split, SPLITS)}; splits are {', '.join(SPLITS)}")


def split_of(content: str) -> str:
    """The split a generated problem belongs to, decided by its content alone: 90% train, 5% dev, 5% test."""
    bucket = int.from_bytes(hashlib.blake2b(content.encode(), digest_size=4).digest(), "big") % 100
    return "train" if bucket < 90 else "dev" if bucket < 95 else "test"
