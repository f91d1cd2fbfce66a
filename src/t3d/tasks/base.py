"""What a task is: problems, the one place where a prompt becomes ids, and a verifier."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from random import Random

from t3d.errors import T3DError, nearest

SPLITS = ("train", "dev", "test")


def _help(text: str, **kwargs):
    return field(metadata={"help": text}, **kwargs)


@dataclass(frozen=True)
class Problem:
    """One thing to answer. `id` is stable: the same data give the same ids in every run."""

    id: str
    question: str
    answer: str | None = None  # reference answer; None where there is nothing to verify
    extra: dict = field(default_factory=dict)  # what the task needs besides (tests, story, ...)


@dataclass
class TaskConfig:
    """Which problems to use and how to ask them."""

    name: str = _help("task: word_problems, prompts, ...", default="word_problems")
    path: str | None = _help(
        "local file to read problems from (JSONL, JSON or Parquet; .gz too)", default=None
    )
    eval_path: str | None = _help("local file for evaluation; default: `path`", default=None)
    question_field: str | None = _help("field of the question; default: the task's own", default=None)
    answer_field: str | None = _help("field of the reference answer; default: the task's own", default=None)
    id_field: str | None = _help(
        "field of the problem's id; default: 'id' if present, else the record number", default=None
    )
    template: str | None = _help("prompt text around {question}; default: the task's own", default=None)
    num_train: int | None = _help("problems used for rollouts; default: all", default=None)
    num_eval: int | None = _help("problems used for evaluation; default: all", default=None)
    data_seed: int = _help("seed of generated problems and of subsampling", default=0)


class Task:
    """A source of problems. A task is one file: a subclass of this with `@register(name)`."""

    name = ""
    template = "{question}"  # visible prompt text; the tokenizer's chat template goes around it

    def __init__(self, config: TaskConfig):
        self.config = config
        self.template = self.template if config.template is None else config.template
        if "{question}" not in self.template:
            raise T3DError(f"task.template must contain {{question}}, got {self.template!r}")

    def problems(self, split: str, n: int | None = None, seed: int | None = None) -> list[Problem]:
        """The first `n` problems of "train", "dev" or "test" (all if None); `seed`: `data_seed`."""
        raise T3DError(f"task {self.name!r} has no problems of its own")

    def prompt_text(self, problem: Problem) -> str:
        """The user's message: the question inside the task's template (other braces stay as they are)."""
        return self.template.replace("{question}", problem.question)

    def prompt(self, problem: Problem, tokenizer) -> list[int]:
        """Prompt ids: template, then the tokenizer's chat template (if any) up to the answer's start."""
        text = self.prompt_text(problem)
        if getattr(tokenizer, "chat_template", None):
            message = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def verify(self, text: str, problem: Problem) -> bool | None:
        """Whether the response `text` answers `problem`; None if the problem has no reference."""
        raise T3DError(f"task {self.name!r} cannot verify answers")

    def solution(self, problem: Problem, rng: Random) -> str:
        """A ground-truth response, where the task can write one."""
        raise T3DError(f"task {self.name!r} has no ground-truth responses; use word_problems or rollouts")


_TASKS: dict[str, type[Task]] = {}


def register(name: str) -> Callable[[type[Task]], type[Task]]:
    """Class decorator: makes the task known as `name`."""

    def add(cls: type[Task]) -> type[Task]:
        cls.name = name
        _TASKS[name] = cls
        return cls

    return add


def task_names() -> Iterable[str]:
    return sorted(_TASKS)


def get_task(config: TaskConfig) -> Task:
    """The task called `config.name`; raises `T3DError` with the nearest name if there is none."""
    if config.name not in _TASKS:
        raise T3DError(
            f"unknown task {config.name!r}{nearest(config.name, _TASKS)}; known: {', '.join(task_names())}"
        )
    return _TASKS[config.name](config)


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise T3DError(f"unknown split {split!r}{nearest(split, SPLITS)}; splits are {', '.join(SPLITS)}")
