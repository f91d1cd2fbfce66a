"""Commands that take a recipe: its stages, and what is asked about it."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from t3d.cli.app import app
from t3d.errors import T3DError

RECIPE = Annotated[Path, typer.Argument(help="a YAML file", metavar="RECIPE", show_default=False)]
OVERRIDES = Annotated[
    list[str] | None,
    typer.Argument(help="values that replace the recipe's", metavar="section.key=value", show_default=False),
]
FORCE = Annotated[bool, typer.Option("--force", help="do the stage and those after it again, removing their output")]


@app.command("run")
def run_command(recipe: RECIPE, overrides: OVERRIDES = None, force: FORCE = False) -> None:
    """Run all stages: rollout, train, eval, report. A complete stage is skipped, and a killed one continues."""
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
def report_command(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="run folders, shown together; or a recipe and section.key=value, for the recipe's run",
            metavar="RUN_DIR... | RECIPE",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="default: RUN_DIR/report.html, or report.html for several")
    ] = None,
    title: Annotated[str, typer.Option(help="heading; default: the names of the runs")] = "",
    problems: Annotated[int, typer.Option(help="problems in the trajectory viewer")] = 24,
) -> None:
    """Write one HTML file about one or several runs, from what their evaluations kept."""
    first = Path(sources[0])
    if not first.is_dir() and first.suffix in (".yaml", ".yml"):
        if output or title or problems != 24:
            raise T3DError("--output, --title and --problems are for run folders; a recipe has report.title, ...")
        return _stages(first, sources[1:], False, "report")
    from t3d.report import ReportConfig, write_report

    for source in sources:
        if not Path(source).is_dir():
            raise T3DError(f"{source} is not a run folder, nor a recipe (a file that ends in .yaml)")
    if output is None:
        output = first / "report.html" if len(sources) == 1 else Path("report.html")
    print(f"report: {write_report(sources, output, ReportConfig(title=title, problems=problems))}")


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


@app.command("study")
def study_command(
    study: Annotated[Path, typer.Argument(help="a YAML file", metavar="STUDY", show_default=False)],
    overrides: OVERRIDES = None,
    plan: Annotated[bool, typer.Option("--plan", help="only list the runs, and which are complete")] = False,
    results: Annotated[
        bool, typer.Option("--results", help="only write the results of the runs that are complete")
    ] = False,
) -> None:
    """Run many variants of a recipe over several seeds and write a table; what is complete is skipped."""
    from t3d.log import to_terminal
    from t3d.study import load_study, run_study, write_study_results
    from t3d.study.runner import complete

    to_terminal()
    loaded = load_study(study, overrides or ())
    if plan:
        for job in loaded.jobs:
            print(f"{'complete' if complete(job) else 'to do   '}  {job.recipe.run_dir}")
        return
    if results:
        if not any(map(complete, loaded.jobs)):
            raise T3DError(f"{study}: no run is complete yet; leave out --results to start them")
        write_study_results(loaded)
    else:
        run_study(loaded)
    print(f"results: {Path(loaded.folder) / 'results.md'}")


@app.command("config")
def config_command(
    recipe: Annotated[
        Path | None, typer.Argument(help="show this recipe, resolved", metavar="RECIPE", show_default=False)
    ] = None,
    overrides: OVERRIDES = None,
    everything: Annotated[
        bool, typer.Option("--all", help="also show what `train` inherits from transformers")
    ] = False,
) -> None:
    """Show every key with its default, type and meaning, as a recipe; or a recipe as the stages will see it."""
    from t3d.config import describe, load_recipe

    print(describe(everything) if recipe is None else load_recipe(recipe, overrides or ()).to_yaml(), end="")


shipped = typer.Typer(help="List or copy the recipes that come with t3d.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(shipped, name="recipes")


@shipped.command("list")
def list_command() -> None:
    """List the recipes that come with t3d, and what each is for."""
    from t3d.recipes import recipes

    found = recipes()
    for name, text in found.items():
        print(f"{name:{max(map(len, found))}}  {text}")


@shipped.command("copy")
def copy_command(
    name: Annotated[str, typer.Argument(help="as `t3d recipes list` has it", metavar="NAME", show_default=False)],
    folder: Annotated[Path, typer.Argument(help="where to", metavar="FOLDER")] = Path("recipes"),
    force: Annotated[bool, typer.Option("--force", help="replace files that are there")] = False,
) -> None:
    """Copy a recipe, with those it builds on, to use and change: FOLDER/NAME.yaml."""
    from t3d.recipes import copy

    for path in copy(name, folder, force):
        print(path)


@app.command("plan")
def plan_command(
    recipe: RECIPE,
    overrides: OVERRIDES = None,
    gpus: Annotated[int, typer.Option(help="GPUs that train together")] = 1,
    sharding: Annotated[str, typer.Option(help="ddp, fsdp2, zero1, zero2 or zero3")] = "ddp",
) -> None:
    """Show the memory a run needs per GPU, part by part, and how each is computed. Loads no weights."""
    from rich.console import Console

    from t3d.config import load_recipe
    from t3d.log import to_terminal
    from t3d.plan import plan, table

    to_terminal()
    parts = plan(load_recipe(recipe, overrides or ()), gpus, sharding)
    Console(width=None if sys.stdout.isatty() else 150).print(table(parts, gpus, sharding))


@app.command("calibrate")
def calibrate_command(
    recipe: RECIPE,
    overrides: OVERRIDES = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="file for the settings")] = Path("decoding.json"),
    model: Annotated[
        str | None, typer.Option(help="checkpoint folder, hub id or 'embedded'; default: RUN/student")
    ] = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            help="strategy whose own setting is chosen (adaptive); with --alpha any number of them or 'all'; without "
            "any, --alpha takes eval.grid"
        ),
    ] = None,
    accuracy: Annotated[float | None, typer.Option(help="find the fastest setting with at least this accuracy")] = None,
    tpf: Annotated[
        float | None, typer.Option(help="find the slowest setting with this many tokens per forward")
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            help="find the fastest setting certified to get at most this share of all problems wrong that careful "
            "decoding gets right"
        ),
    ] = None,
    delta: Annotated[
        float | None, typer.Option(help="with --alpha: chance that the certificate is wrong", show_default="0.05")
    ] = None,
    blocks_in_flight: Annotated[
        list[int] | None,
        typer.Option(help="with --alpha and --strategy: blocks decoded at once", show_default="1, 2 and 4"),
    ] = None,
    split: Annotated[str, typer.Option(help="problems to calibrate on: dev, train or test")] = "dev",
) -> None:
    """Choose a decode setting for a target accuracy or speed, or with a guarantee; `t3d generate --decoding FILE` and
    eval use it."""
    from t3d.calibrate import calibrate_promise, calibrate_setting
    from t3d.config import load_recipe
    from t3d.decoding.policy import POLICIES
    from t3d.log import to_terminal

    to_terminal()
    if sum(target is not None for target in (accuracy, tpf, alpha)) != 1:
        raise T3DError("give either --accuracy or --tpf or --alpha")
    loaded = load_recipe(recipe, overrides or ())
    if alpha is not None:
        if blocks_in_flight and not strategy:
            raise T3DError("--blocks-in-flight goes with --strategy; in eval.grid it is a key")
        strategies = list(POLICIES) if "all" in (strategy or ()) else strategy
        blocks, delta = blocks_in_flight or [1, 2, 4], 0.05 if delta is None else delta
        calibrate_promise(loaded, model, strategies, blocks, alpha, delta, split, output)
        return
    if delta is not None or blocks_in_flight:
        raise T3DError("--delta and --blocks-in-flight go with --alpha")
    if strategy and len(strategy) > 1:
        raise T3DError("--accuracy and --tpf calibrate one --strategy; several go with --alpha")
    calibrate_setting(loaded, model, strategy[0] if strategy else "adaptive", accuracy, tpf, split, output)
