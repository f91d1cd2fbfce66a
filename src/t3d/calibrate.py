"""Choosing a decode setting from the command line: for a target accuracy or speed, or with a guarantee."""

import sys
from collections.abc import Iterable
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path

from t3d.config import Recipe
from t3d.decoding import DecodingConfig, calibrate, save_decoding
from t3d.decoding.guarantee import (
    candidates,
    certified,
    check_promise,
    distinct,
    p_value,
    problems_needed,
    reference_setting,
)
from t3d.embedded import checkpoint
from t3d.engine import Engine, make_engine
from t3d.errors import T3DError
from t3d.evaluation import EvalRow, evaluate
from t3d.evaluation.metrics import wilson
from t3d.evaluation.rows import setting
from t3d.log import log
from t3d.models import load_model
from t3d.pipeline.folder import CALIBRATION, RunFolder
from t3d.pipeline.inputs import Inputs, check_prompts
from t3d.pipeline.versions import versions
from t3d.tasks import Problem
from t3d.trajectories import Trajectory, TrajectoryDataset
from t3d.trajectories.fingerprint import model_fingerprint


def calibrate_setting(
    recipe: Recipe,
    name: str | None,
    strategy: str,
    accuracy: float | None,
    tpf: float | None,
    split: str,
    output: Path,
) -> None:
    """Calibrate `strategy` of checkpoint `name` (default: the run's student) on problems of `split`; write `output`.

    Raises:
        T3DError: a target that even the end of the strategy's range misses, or nothing to verify.
    """
    inputs = Inputs(recipe)
    problems = _problems(inputs, split)
    path = checkpoint(name or Path(recipe.run_dir) / "student")
    model, tokenizer = load_model(path, **recipe.model.loading)
    config = DecodingConfig(strategy=strategy, max_tokens=recipe.eval.max_tokens, seed=recipe.seed)
    problems = inputs.usable(problems, inputs.eval_task, [config], split, model.config)
    prompts = [inputs.eval_task.prompt(problem, tokenizer) for problem in problems]
    check_prompts(recipe, model, tokenizer, prompts, [problem.id for problem in problems], [config])

    def share_correct(trajectories: list[Trajectory]) -> float:
        verdicts = inputs.eval_task.judge_all([t.text for t in trajectories], problems)
        verified = [verdict.correct for verdict in verdicts if verdict.correct is not None]
        if not verified:
            raise T3DError(f"task {inputs.eval_task.name!r} cannot verify answers here; use --tpf")
        return sum(verified) / len(verified)

    engine = Engine(model, tokenizer, **recipe.engine.local)
    chosen, trials = calibrate(
        engine,
        prompts,
        config,
        target_tpf=tpf,
        target_quality=accuracy,
        quality=None if accuracy is None else share_correct,
        tried=lambda trial: log.info("calibrate: %s", describe(strategy, trial)),
    )
    reached = next(trial for trial in reversed(trials) if trial["value"] == getattr(chosen, trial["knob"]))
    about = {"checkpoint": str(path), "task": inputs.eval_task.name, "split": split, "num_problems": len(problems)}
    save_decoding(chosen, output, target={"accuracy": accuracy, "tpf": tpf}, reached=reached, trials=trials, **about)
    interval = ""
    if accuracy is not None:
        low, high = wilson(round(reached["quality"] * len(problems)), len(problems))
        interval = f" (95%: {low:.1%} to {high:.1%})"
    print(f"{output}: {describe(strategy, reached)}{interval} on {len(problems)} {split} problems")


def describe(strategy: str, trial: dict) -> str:
    quality = "" if trial["quality"] is None else f", {trial['quality']:.1%} correct"
    return f"{strategy}, {trial['knob']} {trial['value']:.4g}: {trial['tpf']:.2f} tokens per forward{quality}"


def calibrate_promise(
    recipe: Recipe,
    name: str | None,
    strategies: Iterable[str] | None,
    blocks: Iterable[int],
    alpha: float,
    delta: float,
    split: str,
    output: Path,
) -> None:
    """Write to `output` the fastest setting certified to lose at most `alpha` of what the reference solves.

    The grid is each strategy at the values of its own setting (or of steps), times the blocks in flight; without
    strategies, the recipe's `eval.grid`. The reference is one token a step. The rule is `t3d.decoding.guarantee`'s.
    Answers are kept in RUN/calibrate, by the weights' fingerprint, so that a killed calibration continues.

    Raises:
        T3DError: too few problems for any setting to pass, nothing to verify, or no setting that is certified.
    """
    check_promise(alpha, delta)
    inputs = Inputs(recipe)
    task, problems = inputs.eval_task, _problems(inputs, split)
    path = checkpoint(name or Path(recipe.run_dir) / "student")
    model, tokenizer = load_model(path, **recipe.model.loading)
    base = DecodingConfig(max_tokens=recipe.eval.max_tokens, seed=recipe.seed).at(model.config.window)
    reference = reference_setting(base)
    if strategies is None:
        grid = distinct([replace(c, n=1, seed=recipe.seed) for c in recipe.eval.settings(recipe.seed)], base)
    else:
        grid = candidates(base, strategies, blocks)
    if not grid:
        raise T3DError("nothing to choose: the only setting is the reference; add to eval.grid, or a --strategy")
    problems = inputs.usable(problems, task, [reference, *grid], split, model.config)
    _check_enough(len(problems), len(grid), alpha, delta)
    prompts = [task.prompt(problem, tokenizer) for problem in problems]
    check_prompts(recipe, model, tokenizer, prompts, [problem.id for problem in problems], [reference, *grid])

    with RunFolder(recipe.run_dir) as run, closing(make_engine(model, tokenizer, **vars(recipe.engine))) as engine:
        folder = run / CALIBRATION / model_fingerprint(model)
        about = {"engine": engine, "output": folder, "name": Path(path).name, "versions": versions()}

        def decoded(config: DecodingConfig) -> tuple[EvalRow, dict[str, bool | None]]:
            [row] = evaluate(model, tokenizer, task, problems, [config], **about, progress=sys.stderr.isatty())
            answers = TrajectoryDataset(folder / row.results)
            return row, dict(zip(answers.column("prompt_id"), answers.column("correct"), strict=True))

        plain, verdicts = decoded(reference)
        n = plain.num_verified
        solved = [problem.id for problem in problems if verdicts[problem.id]]
        log.info("calibrate: reference: %s, %.1f%% correct", described(plain), 100 * (plain.accuracy or 0.0))
        if not n:
            raise T3DError(f"task {task.name!r} cannot verify answers here; use --tpf")
        _check_enough(n, len(grid), alpha, delta)
        rows, losses = [], []
        for config in grid:
            row, verdicts = decoded(config)
            rows.append(row)
            losses.append(sum(verdicts[id] is not True for id in solved))
            p = p_value(losses[-1], n, alpha)
            log.info("calibrate: %s, %d of %d lost (p = %.2g)", described(row), losses[-1], n, p)

    passed = certified(losses, n, alpha, delta)
    if not any(passed):
        raise T3DError(_none_passed(rows, losses, n, alpha, delta))
    best = max((i for i in range(len(grid)) if passed[i]), key=lambda i: (rows[i].tpf, -losses[i]))
    trials = [
        {
            "setting": setting(row.to_dict()),
            "decoding": config.differing(f.name for f in fields(config)),
            "tpf": row.tpf,
            "accuracy": row.accuracy,
            "losses": lost,
            "p_value": p_value(lost, n, alpha),
            "certified": ok,
        }
        for config, row, lost, ok in zip(grid, rows, losses, passed, strict=True)
    ]
    save_decoding(
        grid[best],
        output,
        target={"alpha": alpha, "delta": delta},
        reference={"setting": setting(plain.to_dict()), "tpf": plain.tpf, "accuracy": plain.accuracy},
        reached=trials[best],
        trials=trials,
        checkpoint=str(path),
        task=task.name,
        split=split,
        num_problems=n,
    )
    print(
        f"{output}: {described(rows[best])} ({plain.tpf:.2f} at {setting(plain.to_dict())}, the reference); "
        f"with {100 * (1 - delta):g}% confidence it loses at most {100 * alpha:g}% of all problems to the reference "
        f"({losses[best]} of {n} {split} problems; {sum(passed)} of {len(grid)} settings are certified)"
    )


def described(row: EvalRow) -> str:
    return f"{setting(row.to_dict())}: {row.tpf:.2f} tokens per forward"


def _problems(inputs: Inputs, split: str) -> list[Problem]:
    problems = inputs.eval_task.problems(split, inputs.recipe.task.num_eval)
    if not problems:
        raise T3DError(f"task {inputs.eval_task.name!r} has no {split} problems; choose another --split")
    return problems


def _check_enough(n: int, tests: int, alpha: float, delta: float) -> None:
    """Raises T3DError if with so few problems not even a setting without losses is certified."""
    if p_value(0, n, alpha) > delta / tests:
        needed = problems_needed(alpha, delta, tests)
        many = f"at least {needed:,}; set task.num_eval" if needed else "too many; raise --alpha"
        raise T3DError(
            f"{n:,} problems are too few for alpha {alpha:g} and delta {delta:g}: to certify one of {tests} settings "
            f"takes {many}"
        )


def _none_passed(rows: list[EvalRow], losses: list[int], n: int, alpha: float, delta: float) -> str:
    best = min(range(len(rows)), key=losses.__getitem__)
    p, needed = p_value(losses[best], n, alpha), problems_needed(alpha, delta, len(rows), losses[best] / n)
    more = f"at this rate it takes about {needed:,} problems (task.num_eval)" if needed else "raise --alpha"
    return (
        f"none of {len(rows)} settings is certified: the best, {setting(rows[best].to_dict())}, loses {losses[best]} "
        f"of {n:,} (p = {p:.2g}, {delta / len(rows):.2g} is needed); {more}"
    )
