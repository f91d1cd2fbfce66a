"""Stage 3: teacher and student answer the same held-out problems at every decode setting."""

import sys
from collections.abc import Iterator
from contextlib import closing

from t3d.blocks import check_blocks
from t3d.config import Recipe
from t3d.embedded import checkpoint
from t3d.engine import make_engine
from t3d.errors import T3DError
from t3d.evaluation import EvalRow, evaluate, read_summary, write_results, write_summary
from t3d.evaluation.oracle import TPF, add_oracle
from t3d.evaluation.rows import row_name, setting
from t3d.evaluation.scoring import Scorer, load_scorer
from t3d.evaluation.text import add_text_quality, check_libraries
from t3d.log import log
from t3d.models import load_model
from t3d.models.load import require_tokenizer
from t3d.pipeline.folder import RunFolder
from t3d.pipeline.inputs import Inputs, check_prompts
from t3d.pipeline.versions import versions


def evaluation(run: RunFolder, recipe: Recipe, inputs: Inputs) -> None:
    """Answers go to RUN/eval, where those of an earlier attempt are kept, a row for each setting to summary.json.

    Rows that are there already stay beside the new ones where they are of the same problems.
    """
    rows = []
    if not run.complete("train"):
        log.info("eval: %s has no student, so only the teacher and eval.checkpoints are evaluated", run.path)
    for name, objective, model, tokenizer in _models(run, recipe, inputs):
        settings = recipe.eval.settings(recipe.seed)
        with closing(make_engine(model, tokenizer, **vars(recipe.engine))) as engine:
            of = (model, tokenizer, inputs.eval_task, inputs.eval_problems)
            about = {
                "engine": engine,
                "output": run / "eval",
                "name": name,
                "objective": objective,
                "versions": versions(),
                "progress": sys.stderr.isatty(),
            }
            found = evaluate(*of, settings, **about)
            if recipe.eval.oracle:
                found = add_oracle(found, *of, settings[0], **about)
                known = dict.fromkeys(f"{row.extra[TPF]:.2f}" for row in found)
                log.info("eval: %s, oracle: %s tokens per forward", name, ", ".join(known))
        for row in found:
            accuracy = "not verified" if row.accuracy is None else f"{row.accuracy:.1%} correct"
            log.info("eval: %s, %s: %s, %.2f tokens per forward", name, setting(row.to_dict()), accuracy, row.tpf)
        rows += found
    rows = with_earlier(run, rows)
    if recipe.eval.text:
        rows = add_text_quality(rows, run / "eval", _scorer(recipe))
    write_results(run / "eval", rows, task=recipe.task.name, seed=recipe.seed, versions=versions())
    write_summary(
        run / "summary.json",
        task=recipe.task.name,
        seed=recipe.seed,
        versions=versions(),
        wall_seconds=run.seconds(),
        rows=rows,
        dropped_prompts=inputs.dropped["evaluation"],
    )


def with_earlier(run: RunFolder, rows: list[EvalRow]) -> list[EvalRow]:
    """`rows`, and of those in summary.json the ones of other settings on as many problems and samples."""
    if not (run / "summary.json").exists():
        return rows
    new, size = {row.results for row in rows}, (rows[0].num_problems, rows[0].samples)
    earlier = [EvalRow(**values) for values in read_summary(run / "summary.json")["rows"]]
    kept = []
    for row in (row for row in earlier if row.results not in new):
        if (row.num_problems, row.samples) == size and (run / "eval" / row.results).is_dir():
            kept.append(row)
        else:
            log.info(
                "eval: no longer among the results, which are of other problems or samples: %s", row_name(row.to_dict())
            )
    models = list(dict.fromkeys(row.model for row in (*rows, *kept)))
    places = list(dict.fromkeys(row.results for row in (*earlier, *rows)))
    return sorted((*rows, *kept), key=lambda row: (models.index(row.model), places.index(row.results)))


def check_evaluation(recipe: Recipe, inputs: Inputs) -> None:
    """Raises T3DError for settings that the model cannot decode with, prompts that do not fit it, and checkpoints (the
    scorer too) that are none."""
    if recipe.eval.text:
        check_libraries()
        _scorer(recipe)
    model, tokenizer = inputs.teacher
    if recipe.eval.oracle:
        check_blocks(model.config, "eval.oracle")
    prompts = [inputs.eval_task.prompt(problem, tokenizer) for problem in inputs.eval_problems]
    names = [problem.id for problem in inputs.eval_problems]
    settings = [inputs.eval_task.guided(decoding, tokenizer) for decoding in recipe.eval.settings(recipe.seed)]
    check_prompts(recipe, model, tokenizer, prompts, names, settings)
    for path in recipe.eval.checkpoints:
        require_tokenizer(load_model(checkpoint(path), dtype=recipe.model.dtype, device="cpu")[1], path)
    _names(recipe.eval.checkpoints)


def _scorer(recipe: Recipe) -> Scorer | None:
    name = recipe.eval.scorer
    return None if name is None else load_scorer(str(checkpoint(name)), recipe.model.device)


def _names(checkpoints: tuple[str, ...]) -> dict[str, str]:
    """What each checkpoint is called in rows and folders: the end of its path, as long as it takes to be unique."""
    found: dict[str, str] = {}
    for path in dict.fromkeys(path.rstrip("/") for path in checkpoints):
        parts = [part for part in path.split("/") if part not in ("", ".", "..")]
        names = ("-".join(parts[-n:]) for n in range(1, len(parts) + 1))
        name = next((name for name in names if name not in {"teacher", "student", *found}), None)
        if name is None:
            raise T3DError(f"eval.checkpoints: {path} cannot be told from the others by its name; rename it")
        found[name] = path
    return found


def _models(run: RunFolder, recipe: Recipe, inputs: Inputs) -> Iterator[tuple]:
    """(name, objective, model, tokenizer) of each model to evaluate, one in memory at a time."""
    quantize, suffix = recipe.model.quantize, recipe.model.suffix
    if recipe.eval.teacher and recipe.model.architecture is None:  # random weights have nothing to show
        yield f"teacher{suffix}", None, *(inputs.load(quantize=quantize) if quantize else inputs.teacher)
        inputs.release()
    places = {"student": run / "student"} if run.complete("train") else {}
    for name, path in (places | _names(recipe.eval.checkpoints)).items():
        objective = recipe.objective if name == "student" else None
        yield name + suffix, objective, *load_model(checkpoint(path), **recipe.model.loading)
