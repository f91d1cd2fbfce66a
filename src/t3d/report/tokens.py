"""Token texts and colours that the HTML viewer and the terminal share."""

import math

from t3d.trajectories.pieces import PIECES, Pieces
from t3d.trajectories.record import Trajectory


def token_texts(trajectory: Trajectory, tokenizer=None) -> list[str]:
    """Texts of the prompt's tail in the first generated block, then of every generated token.

    As kept by the evaluation, else by `tokenizer`, else the ids themselves.
    """
    if PIECES in trajectory.extra:
        return trajectory.extra[PIECES]
    if tokenizer is not None:
        return Pieces(tokenizer).of(trajectory)
    tail = trajectory.tail
    ids = trajectory.prompt_ids[len(trajectory.prompt_ids) - tail :] + trajectory.response_ids
    return [f"⟨{token}⟩" for token in ids]


def step_colour(step: int, steps: int, dark: bool) -> tuple[int, int, int]:
    """sRGB of a token's background: blue for the first step to rose for the last, and lighter (in the dark: darker)
    on the way, so that the order shows without hue too."""
    t = step / max(1, steps - 1)
    lightness, chroma = (0.47 - 0.16 * t, 0.09) if dark else (0.81 + 0.12 * t, 0.085 - 0.03 * t)
    return _oklch(lightness, chroma, math.radians(255 - 235 * t))


def _oklch(lightness: float, chroma: float, hue: float) -> tuple[int, int, int]:
    """Björn Ottosson's OKLCH to sRGB, cut to the gamut."""
    a, b = chroma * math.cos(hue), chroma * math.sin(hue)
    l_, m_, s_ = (
        (lightness + x * a + y * b) ** 3
        for x, y in ((0.3963377774, 0.2158037573), (-0.1055613458, -0.0638541728), (-0.0894841775, -1.2914855480))
    )
    linear = (
        4.0767416621 * l_ - 3.3077115913 * m_ + 0.2309699292 * s_,
        -1.2684380046 * l_ + 2.6097574011 * m_ - 0.3413193965 * s_,
        -0.0041960863 * l_ - 0.7034186147 * m_ + 1.7076147010 * s_,
    )
    gamma = (12.92 * c if c <= 0.0031308 else 1.055 * c ** (1 / 2.4) - 0.055 for c in (max(0.0, c) for c in linear))
    return tuple(round(255 * min(1.0, c)) for c in gamma)
