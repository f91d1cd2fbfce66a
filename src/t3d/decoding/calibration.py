"""Adaptive steps, calibrated: the fastest setting that still meets a target on a calibration set."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from t3d.decoding.config import DecodingConfig
from t3d.decoding.policy import POLICIES
from t3d.errors import T3DError, nearest

if TYPE_CHECKING:
    from t3d.trajectories.record import Trajectory


def tokens_per_forward(trajectories: list["Trajectory"]) -> float:
    """TPF: tokens through the first stop token, divided by the forwards that predicted (denoised or verified)."""
    return sum(t.length for t in trajectories) / sum(t.nfe.predicting for t in trajectories)


def calibrate(
    engine,
    prompts: list,
    config: DecodingConfig,
    *,
    target_tpf: float | None = None,
    target_quality: float | None = None,
    quality: Callable[[list["Trajectory"]], float] | None = None,
    rounds: int = 8,
    tried: Callable[[dict], None] = lambda trial: None,
) -> tuple[DecodingConfig, list[dict]]:
    """Set the strategy's own knob (`adaptive`: risk; dynamic: threshold; ...) by bisection on the prompts.

    With `target_tpf`, the slowest setting found whose tokens per forward reach it; with `target_quality` and `quality`
    (a function of the trajectories, more is better, e.g. accuracy), the fastest found that reaches it. Returns the
    settings and one `{"knob", "value", "tpf", "quality"}` per trial; `tried` is called with each. Raises T3DError if
    even the knob's end misses the target.
    """
    knob = POLICIES[config.strategy].speed()
    if knob is None:
        known = ", ".join(name for name, p in POLICIES.items() if p.speed())
        raise T3DError(f"strategy {config.strategy!r} has nothing to calibrate; use one of {known}")
    if (target_tpf is None) == (target_quality is None) or (target_quality is not None) != (quality is not None):
        raise T3DError("give either target_tpf, or target_quality with a quality function")
    trials: list[dict] = []

    def meets(value: float) -> bool:
        trajectories = engine.generate(prompts, replace(config, **{knob.name: value}))
        trial = {"knob": knob.name, "value": value, "tpf": tokens_per_forward(trajectories)}
        trial["quality"] = quality(trajectories) if quality else None
        trials.append(trial)
        tried(trial)
        return trial["tpf"] >= target_tpf if quality is None else trial["quality"] >= target_quality

    slow, fast = knob.metadata["slow"], knob.metadata["fast"]
    # `good` always meets the target, `bad` does not; the answer lies between them
    good, bad = (fast, slow) if quality is None else (slow, fast)
    if not meets(good):
        measure, target = ("tpf", target_tpf) if quality is None else ("quality", target_quality)
        raise T3DError(
            f"{config.strategy} reaches at best {measure} = {trials[0][measure]:.3g} on these prompts (at "
            f"{knob.name} = {good}), less than the target {target}"
        )
    if meets(bad):
        good = bad
    else:
        for _ in range(rounds):
            middle = _between(good, bad)
            good, bad = (middle, bad) if meets(middle) else (good, middle)
    return replace(config, **{knob.name: good}), trials


def _between(a: float, b: float) -> float:
    """Halfway: in ratio where the range is wide (knobs that go up to 64 matter most near 0), else in difference."""
    low, high = min(a, b), max(a, b)
    return (max(low, 1e-3) * high) ** 0.5 if high > 1 else (low + high) / 2


def save_decoding(config: DecodingConfig, path: str | os.PathLike, **notes) -> None:
    """Write settings as JSON, with any notes (target, trials, data) beside them."""
    path = Path(path)
    temporary = path.with_name(path.name + ".partial")
    try:
        temporary.write_text(json.dumps({"decoding": asdict(config), "notes": notes}, indent=1) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        raise T3DError(f"cannot write {path}: {error.strerror}") from error


def load_decoding(path: str | os.PathLike) -> DecodingConfig:
    """Read settings that `save_decoding` wrote."""
    try:
        settings = json.loads(Path(path).read_text())["decoding"]
    except OSError as error:
        raise T3DError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise T3DError(f"{path} does not hold decoding settings; write them with save_decoding") from error
    known = {f.name for f in fields(DecodingConfig)}
    for name in settings:
        if name not in known:
            raise T3DError(f"{path}: unknown decoding setting {name!r}{nearest(name, known)}")
    return DecodingConfig(**settings)
