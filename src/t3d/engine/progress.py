"""The progress bar of a call: tokens/s, tokens per forward, who runs and who waits, and how full the cache is."""

import time

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress


class Progress:
    """A context manager that shows an `EngineStats` while it changes; does nothing unless enabled."""

    def __init__(self, stats, enabled: bool):
        self.stats, self.enabled = stats, enabled

    def __enter__(self) -> "Progress":
        if self.enabled:
            columns = (TextColumn("decoding"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self.bar = RichProgress(*columns, TextColumn("{task.fields[state]}"), refresh_per_second=4)
            self.bar.start()
            self.task = self.bar.add_task("decoding", total=self.stats.sequences, state="")
            self.start = time.perf_counter()
        return self

    def update(self) -> None:
        if self.enabled:
            state = self.stats.line(time.perf_counter() - self.start)
            self.bar.update(self.task, completed=self.stats.finished, state=state)

    def __exit__(self, *error) -> None:
        if self.enabled:
            self.bar.stop()
