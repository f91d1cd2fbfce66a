"""The command line: `t3d COMMAND [RECIPE] [section.key=value ...]`. Heavy imports wait until a command needs them."""

import os
import sys
from typing import Annotated

import typer

from t3d.cli.interrupt import insistent_interrupts
from t3d.errors import T3DError

app = typer.Typer(
    name="t3d",
    help="Distil a block-diffusion language model's own decoding trajectories into a few-step student.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Exit code 0; 1 for a fault of the program, 2 for one in what it was given, 130 for Ctrl-C."""
    code = 0
    try:
        with insistent_interrupts():
            app(arguments)
    except T3DError as error:
        if os.environ.get("RANK", "0") == "0":  # of several processes one says it
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except SystemExit as done:
        code = done.code
    if code == 130:
        print("interrupted; the same command continues", file=sys.stderr)
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # the reader (`| head`) has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)


def _version(wanted: bool) -> None:
    if wanted:
        from t3d import __version__

        print(f"t3d {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="show the version")
    ] = False,
) -> None:
    pass
