"""Choosing a decode setting from the command line, for a target accuracy or a target speed."""

from pathlib import Path

from t3d.config import Recipe
from t3d.decoding import DecodingConfig, calibrate, save_decoding
from t3d.embedded import checkpoint
from t3d.engine import Engine
from t3d.errors import T3DError
from t3d.evaluation.metrics import wilson
from t3d.log import log
from t3d.models import load_model
from t3d.pipeline.inputs import Inputs, check_prompts
from t3d.trajectories import Trajectory


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
        T3DError: no or two targets, one that even the end of the strategy's range misses, or nothing to verify.
    """
    if (accuracy is None) == (tpf is None):
        raise T3DError("give either --accuracy or --tpf")
    inputs = Inputs(recipe)
    problems = inputs.eval_task.problems(split, recipe.task.num_eval)
    if not problems:
        raise T3DError(f"task {inputs.eval_task.name!r} has no {split} problems; choose another --split")
    path = checkpoint(name or Path(recipe.run_dir) / "student")
    model, tokenizer = load_model(path, dtype=recipe.model.dtype, device=recipe.model.device)
    prompts = [inputs.eval_task.prompt(problem, tokenizer) for problem in problems]
    config = DecodingConfig(strategy=strategy, max_tokens=recipe.eval.max_tokens, seed=recipe.seed)
    check_prompts(recipe, model, tokenizer, prompts, [problem.id for problem in problems], [config])

    def share_correct(trajectories: list[Trajectory]) -> float:
        verdicts = inputs.eval_task.judge_all([t.text for t in trajectories], problems)
        verified = [verdict.correct for verdict in verdicts if verdict.correct is not None]
        if not verified:
            raise T3DError(f"task {inputs.eval_task.name!r} verifies nothing here; use --tpf")
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
