"""A task whose problems are records of a local file, or of a dataset in a folder or on the Hugging Face hub."""

from collections.abc import Iterable
from pathlib import Path
from random import Random

from t3d.errors import T3DError, characters, either, nearest
from t3d.tasks.base import Problem, Task, check_split
from t3d.tasks.records import read_dataset, read_records

HUB_SPLITS = {"train": "train", "dev": "validation", "test": "test"}


class FileTask(Task):
    """Reads `path` (`eval_path` for dev and test), else a dataset; subclasses say what a record's fields mean.

    A local file is used for whatever stage asks for it, whole: with only `path` set, training and evaluation see
    the same problems (`held_out` says so). `n` of more records is a choice by seed, in the file's order; a larger
    `n` contains every smaller one.
    """

    question_fields: tuple[str, ...] = ("question",)  # the first that a record has
    answer_fields: tuple[str, ...] = ()
    id_fields: tuple[str, ...] = ("id",)
    hub: dict[str, tuple[str, str | None, str]] = {}  # noqa: RUF012  our split: dataset, configuration, its split

    def problems(self, split: str, n: int | None = None, seed: int | None = None) -> list[Problem]:
        check_split(split)
        seen: dict[str, str] = {}
        problems = []
        source, name, records = self._source(split)
        for where, record in records:
            if not self.belongs(record, split):
                continue
            problem = self.problem(record, self._id(record, name, where, source), f"{source}, {where}")
            first = seen.setdefault(problem.id, where)
            if first is not where:
                raise T3DError(f"{source}, {where}: id {problem.id!r} was already used in {first}")
            problems.append(problem)
        if not problems:
            raise T3DError(f"{source} holds no {split} problems of {self.name}")
        if n is None or n >= len(problems):
            return problems
        order = list(range(len(problems)))
        Random(self.config.data_seed if seed is None else seed).shuffle(order)
        return [problems[i] for i in sorted(order[:n])]

    def held_out(self) -> bool:
        """Whether training and evaluation read different data."""
        if self.config.path is not None:
            return self.config.eval_path not in (None, self.config.path)
        return self.config.eval_path is not None or self._dataset("train") != self._dataset("test")

    def problem(self, record: dict, id: str, where: str) -> Problem:
        """The problem that `record` describes. Raises `T3DError`, which begins with `where`, if it cannot."""
        return Problem(id, self.question(record, where), self.answer(record, where))

    def belongs(self, record: dict, split: str) -> bool:
        """Whether the record is a problem of that split: for files that hold several, or records to leave out."""
        return True

    def question(self, record: dict, where: str) -> str:
        text = pick(record, self.config.question_field, self.question_fields, where)
        if not isinstance(text, str):
            raise T3DError(f"{where}: the question is {type(text).__name__}, not text")
        if not text.strip():
            raise T3DError(f"{where}: the question is empty")
        return text

    def answer(self, record: dict, where: str) -> str | None:
        answer = pick(record, self.config.answer_field, self.answer_fields, where, optional=True)
        if answer is None or isinstance(answer, str):
            return answer or None
        if isinstance(answer, (int, float)) and not isinstance(answer, bool):
            return str(answer)
        raise T3DError(f"{where}: the answer is {type(answer).__name__}, not text or a number")

    def _id(self, record: dict, name: str, where: str, source: str) -> str:
        names = (self.config.id_field,) if self.config.id_field is not None else self.id_fields
        if self.config.id_field is None and all(record.get(field) is None for field in names):
            return f"{name}:{where.split()[-1]}"
        value = pick(record, self.config.id_field, self.id_fields, f"{source}, {where}")
        if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
            raise T3DError(f"{source}, {where}: the id is {value!r}, not text or a whole number")
        return str(value)

    def _source(self, split: str) -> tuple[str, str, Iterable[tuple[str, dict]]]:
        """What to call the source in a message, in an id, and its records."""
        path = self.config.path if split == "train" else self.config.eval_path or self.config.path
        if path is not None:
            return path, Path(path).name.split(".")[0], read_records(path)
        found = self._dataset(split)
        if found is None and not self.hub:
            raise T3DError(
                f"task {self.name!r} needs a file or a dataset: set task.path=FILE (JSONL, JSON, CSV, TSV or Parquet), "
                "or task.dataset to a hub id or a folder"
            )
        if found is None:
            other = ", ".join(sorted(self.hub))
            raise T3DError(
                f"{self.name} has no {split} problems on the hub, only {other}; set task.path or another task"
            )
        return found[0], f"{found[0]}/{found[2]}", read_dataset(*found)

    def _dataset(self, split: str) -> tuple[str, str | None, str] | None:
        """Dataset, configuration and its split that have the problems of our split."""
        config, own = self.config, self.hub.get(split)
        if config.dataset is None or (own is None and self.hub):
            return own
        chosen = config.dataset_train_split if split == "train" else config.dataset_test_split
        return config.dataset, config.dataset_config, chosen or (own[2] if own else HUB_SPLITS[split])


def pick(record: dict, chosen: str | None, usual: tuple[str, ...], where: str, optional: bool = False):
    """The value of field `chosen`, or of the first of `usual` that the record has, one with a value if there is."""
    names = (chosen,) if chosen is not None else usual
    for name in sorted(names, key=lambda name: record.get(name) is None):  # tables have every field in every row
        if name in record:
            value = record[name]
            return characters(value, f"{where}: {name}") if isinstance(value, str) else value
    if optional and chosen is None:
        return None
    wanted = either(map(repr, names))
    found = ", ".join(map(str, record)) or "none"
    raise T3DError(f"{where}: no field {wanted}{nearest(names[0], map(str, record))}; fields found: {found}")
