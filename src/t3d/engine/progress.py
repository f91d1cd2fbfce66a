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
            self.bar.update(self.task, completed=self.stats.finished, state=self.line())

    def line(self) -> str:
        s = self.stats
        rate = s.tokens / max(time.perf_counter() - self.start, 1e-9)
        per_forward = s.tokens / max(s.sequence_forwards, 1)
        use = s.kv_tokens / max(s.kv_budget_tokens, 1)
        return f"{rate:,.0f} tok/s  TPF {per_forward:.2f}  running {s.running}  waiting {s.waiting}  KV {use:.0%}"

    def __exit__(self, *error) -> None:
        if self.enabled:
            self.bar.stop()
