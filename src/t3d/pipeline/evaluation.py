"""Stage 3: teacher and student answer the same held-out problems at every decode setting."""

import sys
from collections.abc import Iterator
from contextlib import closing

from t3d.config import Recipe
from t3d.embedded import checkpoint
from t3d.engine import make_engine
from t3d.evaluation import evaluate, write_results, write_summary
from t3d.evaluation.rows import setting
from t3d.evaluation.scoring import load_scorer
from t3d.evaluation.text import add_text_quality, check_libraries
from t3d.log import log
from t3d.models import load_model
from t3d.pipeline.folder import RunFolder
from t3d.pipeline.inputs import Inputs, check_prompts
from t3d.pipeline.versions import versions


def evaluation(run: RunFolder, recipe: Recipe, inputs: Inputs) -> None:
    """Answers go to RUN/eval, where those of an earlier attempt are kept, a row for each setting to summary.json."""
    rows = []
    for name, objective, model, tokenizer in _models(run, recipe, inputs):
        with closing(make_engine(model, tokenizer, **vars(recipe.engine))) as engine:
            found = evaluate(
                model,
                tokenizer,
                inputs.eval_task,
                inputs.eval_problems,
                recipe.eval.settings(recipe.seed),
                engine=engine,
                output=run / "eval",
                name=name,
                objective=objective,
                versions=versions(),
                progress=sys.stderr.isatty(),
            )
        for row in found:
            accuracy = "not verified" if row.accuracy is None else f"{row.accuracy:.1%} correct"
            log.info("eval: %s, %s: %s, %.2f tokens per forward", name, setting(row.to_dict()), accuracy, row.tpf)
        rows += found
    if recipe.eval.text:
        scorer = recipe.eval.scorer and load_scorer(recipe.eval.scorer, recipe.model.device)
        rows = add_text_quality(rows, run / "eval", scorer)
    write_results(run / "eval", rows, task=recipe.task.name, seed=recipe.seed, versions=versions())
    write_summary(
        run / "summary.json",
        task=recipe.task.name,
        seed=recipe.seed,
        versions=versions(),
        wall_seconds=run.seconds(),
        rows=rows,
    )


def check_evaluation(recipe: Recipe, inputs: Inputs) -> None:
    """Raises T3DError for settings that the model cannot decode with, or prompts that do not fit it."""
    if recipe.eval.text:
        check_libraries()
    model, tokenizer = inputs.teacher
    prompts = [inputs.eval_task.prompt(problem, tokenizer) for problem in inputs.eval_problems]
    names = [problem.id for problem in inputs.eval_problems]
    check_prompts(recipe, model, tokenizer, prompts, names, recipe.eval.settings(recipe.seed))


def _models(run: RunFolder, recipe: Recipe, inputs: Inputs) -> Iterator[tuple]:
    """(name, objective, model, tokenizer) of each model to evaluate, one in memory at a time."""
    if recipe.model.architecture is None:  # random weights have nothing to show
        yield "teacher", None, *inputs.teacher
        inputs.release()
    places = {"student": run / "student"}
    for path in recipe.eval.checkpoints:
        parts = path.rstrip("/").split("/")
        taken = parts[-1] in {"teacher", *places}
        places["-".join(parts[-2:]) if taken else parts[-1]] = path
    for name, path in places.items():
        objective = recipe.objective if name == "student" else None
        yield name, objective, *load_model(checkpoint(path), dtype=recipe.model.dtype, device=recipe.model.device)
