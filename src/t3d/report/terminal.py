"""Trajectories in the terminal, coloured as in the report."""

from itertools import islice
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from t3d.embedded import checkpoint
from t3d.errors import T3DError
from t3d.models import load_tokenizer
from t3d.report.tokens import step_colour, token_texts
from t3d.trajectories import CONTEXT, Trajectory, TrajectoryDataset

BESIDE = 100  # columns from which two answers stand side by side


class Shown:
    """A rich renderable: header, coloured answer, legend. `label` replaces the problem's id and text."""

    def __init__(self, trajectory: Trajectory, tokenizer=None, label: str | None = None):
        self.trajectory, self.texts, self.label = trajectory, token_texts(trajectory, tokenizer), label

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        t = self.trajectory
        tail, steps = t.tail, max(t.step_map) + 1
        if self.label is None:
            yield from _about(t)
        verdict = {True: ("correct", "green"), False: ("wrong", "red"), None: ("not verified", "dim")}[t.correct]
        head = Text.assemble((self.label, "bold"), "  ") if self.label is not None else Text()
        head.append(verdict[0], verdict[1])
        ended = "" if t.finish_reason == "stop" else ", cut at the token limit"
        head.append(f"  {t.length} tokens, {t.nfe.total} forwards{ended}", "dim")
        yield head
        body = Text()
        for i, text in enumerate(self.texts):
            if i and i % t.block_size == 0:
                body.append("│", "dim")
            j = i - tail
            # what a terminal would obey, it is shown instead
            printable = "".join(c if c.isprintable() else "↵\n" if c == "\n" else "·" for c in text) or "·"
            body.append(printable, "dim" if j < 0 else _style(t, j, steps))
        yield body
        legend = Text("step ", "dim")
        for step in range(steps):
            legend.append(f" {step + 1} ", _colour(step, steps))
        yield legend


def show(trajectory: Trajectory, tokenizer=None, console: Console | None = None) -> None:
    """Print a trajectory: tokens coloured by commit step, `│` between blocks, low confidence underlined, dim what does
    not count. Token texts are those kept with the trajectory, else `tokenizer`'s, else the ids."""
    (console or Console()).print(Shown(trajectory, tokenizer), "")


def show_folders(
    paths: list[Path],
    number: int = 3,
    prompt_id: str | None = None,
    tokenizer: str | None = None,
    console: Console | None = None,
) -> None:
    """Print the first `number` trajectories of a folder (or those of one problem); of several folders, their answers to
    the same problems, two of them side by side where the console is wide enough.

    paths: folders of trajectories, or folders that hold some. tokenizer: checkpoint, for token texts that are not kept.

    Raises:
        T3DError: if there are no trajectories, or none of that problem, or no problem is in all folders.
    """
    console = console or Console()
    folders = [folder for path in paths for folder in _folders(Path(path))]
    datasets = [TrajectoryDataset(folder) for folder in folders]
    words = [tokenizer_of(dataset, tokenizer) for dataset in datasets]
    places = [{key: place for place, key in enumerate(dataset.keys())} for dataset in datasets]
    keys = [key for key in places[0] if prompt_id in (None, key[0]) and all(key in found for found in places)]
    if not keys:
        which = "no trajectory" if prompt_id is None else f"no trajectory of problem {prompt_id!r}"
        raise T3DError(f"{which} in {folders[0]}" + (" and all the others" if len(folders) > 1 else ""))
    labels = _labels(folders) if len(folders) > 1 else [None]
    for key in islice(keys, number):
        found = [dataset[place[key]] for dataset, place in zip(datasets, places, strict=True)]
        shown = [Shown(t, w, label) for t, w, label in zip(found, words, labels, strict=True)]
        if len(shown) > 1:
            console.print(*_about(found[0]), sep="\n")
        if len(shown) == 2 and console.width >= BESIDE:
            grid = Table.grid(padding=(0, 3), expand=True)
            for _ in shown:
                grid.add_column(ratio=1)
            grid.add_row(*shown)
            shown = [grid]
        console.print(*shown, "", sep="\n")


def _about(t: Trajectory) -> list[Text]:
    head = Text.assemble((t.prompt_id or "trajectory", "bold"), f"  sample {t.sample}" if t.sample else "")
    asked = [Text(t.question, "italic")] if t.question else []
    found = [Text(f"retrieved, {passage['source']}: {passage['text']}", "dim") for passage in t.extra.get(CONTEXT, ())]
    return [head, *asked, *found]


def _folders(path: Path) -> list[Path]:
    """`path`, or the folders below it that hold trajectories."""
    if not path.is_dir() or any(path.glob("*.parquet")):
        return [path]
    found = {file.parent for file in path.rglob("*.parquet")}
    return sorted(found, key=lambda folder: (folder.parent.name != "teacher", folder)) or [path]


def _labels(folders: list[Path]) -> list[str]:
    """The parts of the paths in which they differ."""
    parts = [folder.resolve().parts for folder in folders]
    same = {part for part in parts[0] if all(part in other for other in parts)}
    return ["/".join(part for part in each if part not in same) or each[-1] for each in parts]


def tokenizer_of(dataset: TrajectoryDataset, name: str | None = None):
    """The tokenizer of the checkpoint `name`, by default of the one that made the trajectories; None if unknown."""
    name = name or dataset.metadata.get("tokenizer") or dataset.metadata.get("recipe", {}).get("model.path")
    return load_tokenizer(checkpoint(name)) if name or "recipe" in dataset.metadata else None


def _colour(step: int, steps: int) -> str:
    return f"#1d2127 on rgb({','.join(map(str, step_colour(step, steps, dark=False)))})"


def _style(t: Trajectory, j: int, steps: int) -> str:
    style = "dim" if j >= t.length else _colour(t.step_map[j], steps)
    return style + (" underline" if t.confidence[j] < 0.5 and j < t.length else "")
