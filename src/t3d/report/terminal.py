"""A trajectory in the terminal, coloured as in the report."""

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from t3d.report.tokens import step_colour, token_texts
from t3d.trajectories.record import Trajectory


class Shown:
    """A rich renderable: header, coloured answer, legend."""

    def __init__(self, trajectory: Trajectory, tokenizer=None):
        self.trajectory, self.texts = trajectory, token_texts(trajectory, tokenizer)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        t = self.trajectory
        tail, steps = len(t.prompt_ids) % t.block_size, max(t.step_map) + 1
        verdict = {True: ("correct", "green"), False: ("wrong", "red"), None: ("not verified", "dim")}[t.correct]
        head = Text.assemble((t.prompt_id or "trajectory", "bold"), f"  sample {t.sample}  " if t.sample else "  ")
        head.append(verdict[0], verdict[1])
        ended = "" if t.finish_reason == "stop" else ", cut at the token limit"
        head.append(f"  {t.length} tokens, {t.nfe.total} forwards{ended}", "dim")
        yield head
        if t.question:
            yield Text(t.question, "italic")
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


def _colour(step: int, steps: int) -> str:
    return f"#1d2127 on rgb({','.join(map(str, step_colour(step, steps, dark=False)))})"


def _style(t: Trajectory, j: int, steps: int) -> str:
    style = "dim" if j >= t.length else _colour(t.step_map[j], steps)
    return style + (" underline" if t.confidence[j] < 0.5 and j < t.length else "")
