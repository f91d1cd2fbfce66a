"""The progress bar of whatever takes long."""

from tqdm import tqdm


class Bar(tqdm):
    """A bar on stderr that is told how far the work is; with `disable=None` only where that is a terminal."""

    def at(self, count: int, stats=None) -> None:
        """`count` are done. stats: an `EngineStats`, to show beside it how fast it decodes and what is in flight."""
        if self.disable:
            return
        if stats is not None:
            self.set_postfix_str(stats.line(self.format_dict["elapsed"]), refresh=False)
        self.update(count - self.n)
