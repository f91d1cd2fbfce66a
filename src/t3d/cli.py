"""The command line: `t3d COMMAND [RECIPE] [section.key=value ...]`. Heavy imports wait until a command needs them."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from t3d.errors import T3DError

app = typer.Typer(
    name="t3d",
    help="Distil a block-diffusion language model's own decoding trajectories into a few-step student.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
RECIPE = Annotated[Path, typer.Argument(help="a YAML file", metavar="RECIPE", show_default=False)]
OVERRIDES = Annotated[
    list[str] | None,
    typer.Argument(help="values that replace the recipe's", metavar="section.key=value", show_default=False),
]
FORCE = Annotated[bool, typer.Option("--force", help="do the stage and those after it again, removing their output")]


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Exit code 0; 1 for a fault of the program, 2 for one in what it was given, 130 for Ctrl-C."""
    code = 0
    try:
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


@app.command("run")
def run_command(recipe: RECIPE, overrides: OVERRIDES = None, force: FORCE = False) -> None:
    """All stages: rollout, train, eval, report. What is complete is skipped, what was killed continues."""
    _stages(recipe, overrides, force, None)


@app.command("rollout")
def rollout_command(recipe: RECIPE, overrides: OVERRIDES = None, force: FORCE = False) -> None:
    """Record how the teacher answers the training prompts: RUN/rollout."""
    _stages(recipe, overrides, force, "rollout")


@app.command("train")
def train_command(recipe: RECIPE, overrides: OVERRIDES = None, force: FORCE = False) -> None:
    """Distil the trajectories into a student: RUN/student."""
    _stages(recipe, overrides, force, "train")


@app.command("eval")
def eval_command(recipe: RECIPE, overrides: OVERRIDES = None, force: FORCE = False) -> None:
    """Evaluate teacher and student at every decode setting: RUN/summary.json."""
    _stages(recipe, overrides, force, "eval")


@app.command("report")
def report_command(recipe: RECIPE, overrides: OVERRIDES = None, force: FORCE = False) -> None:
    """Write RUN/report.html from what the evaluation kept."""
    _stages(recipe, overrides, force, "report")


def _stages(recipe: Path, overrides: list[str] | None, force: bool, stage: str | None) -> None:
    from t3d.config import load_recipe
    from t3d.pipeline import STAGES, run_stages, to_terminal

    to_terminal()
    run = run_stages(load_recipe(recipe, overrides or ()), (stage,) if stage else STAGES, force)
    if os.environ.get("RANK", "0") != "0":
        return
    if stage in (None, "eval"):
        from rich.console import Console

        from t3d.evaluation import EvalRow, read_summary
        from t3d.evaluation.rows import print_table

        rows = [EvalRow(**row) for row in read_summary(run / "summary.json")["rows"]]
        print_table(rows, Console(width=None if sys.stdout.isatty() else 120))
    if stage in (None, "report"):
        print(f"report: {run / 'report.html'}")


@app.command("show")
def show_command(
    folder: Annotated[Path, typer.Argument(help="RUN/rollout or RUN/eval/MODEL/SETTING", metavar="FOLDER")],
    number: Annotated[int, typer.Option("--number", "-n", help="how many")] = 3,
    prompt_id: Annotated[str | None, typer.Option("--id", help="only this problem's")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="checkpoint whose tokenizer made them")] = None,
) -> None:
    """Show trajectories, each token in the colour of the step that committed it."""
    from itertools import islice

    from t3d.embedded import checkpoint
    from t3d.models import load_tokenizer
    from t3d.report.terminal import show
    from t3d.trajectories import TrajectoryDataset

    found = TrajectoryDataset(folder)
    name = tokenizer or found.metadata.get("recipe", {}).get("model.path")
    words = load_tokenizer(checkpoint(name)) if name or "recipe" in found.metadata else None
    wanted = (t for t in found if prompt_id in (None, t.prompt_id))
    shown = [show(trajectory, words) for trajectory in islice(wanted, number)]
    if not shown:
        raise T3DError(f"{folder} has no trajectory of problem {prompt_id!r}")


@app.command("config")
def config_command(
    recipe: Annotated[
        Path | None, typer.Argument(help="show this recipe, resolved", metavar="RECIPE", show_default=False)
    ] = None,
    overrides: OVERRIDES = None,
    everything: Annotated[bool, typer.Option("--all", help="also what `train` inherits from transformers")] = False,
) -> None:
    """Show every key with its default, type and meaning, as a recipe; or a recipe as the stages will see it."""
    from t3d.config import describe, load_recipe

    print(describe(everything) if recipe is None else load_recipe(recipe, overrides or ()).to_yaml(), end="")


@app.command("generate")
def generate_command(
    model: Annotated[
        str, typer.Argument(help="checkpoint folder, hub id or 'embedded'", metavar="MODEL", show_default=False)
    ],
    prompt: Annotated[
        str, typer.Argument(help="the user's message; - reads it from stdin", metavar="PROMPT", show_default=False)
    ],
    steps: Annotated[int | None, typer.Option(help="denoising steps per block; default: the block size")] = None,
    max_tokens: Annotated[int, typer.Option(help="most tokens of the answer")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
    top_k: Annotated[int, typer.Option(help="sample among the k likeliest tokens; 0 is off")] = 0,
    top_p: Annotated[float, typer.Option(help="sample among the likeliest with this total probability")] = 1.0,
    strategy: Annotated[str, typer.Option(help="unmasking strategy")] = "low_confidence_static",
    threshold: Annotated[float, typer.Option(help="confidence above which a dynamic strategy commits")] = 0.9,
    block_size: Annotated[int | None, typer.Option(help="tokens per block; default: the model's own")] = None,
    seed: Annotated[int, typer.Option(help="seed of the sampling")] = 0,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...; default: the checkpoint's")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: cuda if there is one")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="no chat template: the prompt is continued as it is")] = False,
    color: Annotated[
        bool | None, typer.Option("--color/--no-color", help="colour tokens by commit step; default: on a terminal")
    ] = None,
) -> None:
    """Answer one prompt; the tokens, forwards and time go to stderr."""
    from t3d.decoding import DecodingConfig
    from t3d.generate import generate
    from t3d.log import to_terminal

    to_terminal()
    text = sys.stdin.read() if prompt == "-" else prompt
    decoding = DecodingConfig(
        block_size=block_size,
        steps=steps,
        strategy=strategy,
        threshold=threshold,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        max_tokens=max_tokens,
        seed=seed,
    )
    generate(model, text, decoding, dtype, device, raw, sys.stdout.isatty() if color is None else color)
