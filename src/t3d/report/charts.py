"""Charts as inline SVG. Colours are CSS classes, so that they follow light and dark."""

import math
from dataclasses import dataclass
from html import escape

from t3d.evaluation.metrics import pareto


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    low: float
    high: float
    label: str  # beside the point
    title: str  # on hover


@dataclass(frozen=True)
class Series:
    name: str
    colour: int  # class c0, c1, ...
    points: list[Point]
    limit: float | None = None  # x of the oracle, drawn as a line from top to bottom


def limits(series: list[Series]) -> list[tuple[float, int]]:
    """(x, colour) of each limit, once."""
    found: dict[float, int] = {}
    for s in series:
        if s.limit is not None:
            found.setdefault(s.limit, s.colour)
    return list(found.items())


def front(series: list[Series]) -> list[Point]:
    """The Pareto front of all points. Tokens per forward count to a tenth: less is no gain that one would pay for."""
    points = [p for s in series for p in s.points]
    return [points[i] for i in pareto([(round(p.x, 1), p.y) for p in points])]


def labelled(series: list[Series], character: float, line: float) -> list[Point]:
    """The points whose labels have room, best ones first; a label stands to the right of its point.

    character, line: width of a character and height of a line, in units of x and y.
    """
    found: list[Point] = []
    for p in (*front(series), *(p for s in series for p in s.points)):
        beside = (abs(p.y - q.y) > line or _apart(p, q, character) or _apart(q, p, character) for q in found)
        if all(beside):
            found.append(p)
    return found


def _apart(p: Point, q: Point, character: float) -> bool:
    """Whether q is to the right of p's label."""
    return q.x - p.x > (len(p.label) + 1) * character


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, at most `most` or so of them."""
    span = (high - low) or abs(high) or 1.0
    raw = span / max(1, most - 1)
    scale = 10.0 ** math.floor(math.log10(raw))
    step = next(scale * m for m in (1, 2, 2.5, 5, 10) if scale * m >= raw * 0.999999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def number(value: float) -> str:
    """A tick or a value in a few characters."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e5:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.4g}"


def accuracy_chart(series: list[Series], width: int, height: int) -> str:
    """Accuracy in percent against tokens per forward: points with intervals, a line per series, the Pareto front."""
    points = [p for s in series for p in s.points]
    left, right, top, bottom = 40, 14, 14, 38
    xs = ticks(
        min(0.8, *(p.x for p in points)),
        max([p.x for p in points] + [value for value, _ in limits(series)]) * 1.03,
        8 if width > 500 else 6,
    )
    xs = [x for x in xs if x >= 0]
    ys = ticks(0 if min(p.low for p in points) < 50 else min(p.low for p in points), 100)
    ys = [y for y in ys if 0 <= y <= 100]

    def x(value: float) -> str:
        return f"{left + (value - xs[0]) / (xs[-1] - xs[0]) * (width - left - right):.1f}"

    def y(value: float) -> str:
        return f"{top + (ys[-1] - value) / (ys[-1] - ys[0]) * (height - top - bottom):.1f}"

    parts = []
    for value in ys:
        parts.append(f'<path class="grid" d="M{left} {y(value)}H{width - right}"/>')
        parts.append(f'<text class="tick" x="{left - 8}" y="{y(value)}" dy=".35em" text-anchor="end">{value:g}</text>')
    for value in xs:
        parts.append(f'<text class="tick" x="{x(value)}" y="{height - 20}" text-anchor="middle">{value:g}</text>')
    middle = (left + width - right) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{height - 4}" text-anchor="middle">tokens per forward</text>')
    for value, colour in limits(series):
        line = f"M{x(value)} {top}V{height - bottom}"
        title = f"<title>oracle: {value:.2f} tokens per forward</title>"
        parts.append(f'<g class="c{colour}"><path class="limit" d="{line}">{title}</path></g>')
    best = front(series)
    across, up = (xs[-1] - xs[0]) / (width - left - right), (ys[-1] - ys[0]) / (height - top - bottom)  # per pixel
    roomy = labelled(series, 6.5 * across, 13 * up)
    if len(best) > 1:
        parts.append(f'<path class="front" d="M{"L".join(f"{x(p.x)} {y(p.y)}" for p in best)}"/>')
    for s in series:
        ordered = sorted(s.points, key=lambda p: p.x)
        parts.append(f'<g class="c{s.colour}">')
        parts.append(f'<path class="line" d="M{"L".join(f"{x(p.x)} {y(p.y)}" for p in ordered)}"/>')
        aside = 3 * (series.index(s) - (len(series) - 1) / 2)  # so that intervals at the same place can be told apart
        for p in ordered:
            beyond = float(x(p.x)) > width - 60
            under = any(0 < q.y - p.y < 26 * up and abs(q.x - p.x) < 50 * across for q in points)
            place = ('dx="-9"', 'text-anchor="end"') if beyond else ('dx="9"', "")
            place = f'{place[0]} dy="{"1.4em" if beyond or under else "-.55em"}" {place[1]}'
            label = f'<text x="{x(p.x)}" y="{y(p.y)}" {place}>{escape(p.label)}</text>' if p in roomy else ""
            middle, low, high = float(x(p.x)) + aside, y(p.low), y(p.high)
            ends = "".join(f"M{middle - 3:.1f} {end}h6" for end in (low, high))
            parts.append(
                f'<g class="point"><title>{escape(p.title)}</title>'
                f'<path class="whisker" d="M{middle:.1f} {low}V{high}{ends}"/>'
                f'<circle cx="{x(p.x)}" cy="{y(p.y)}" r="5"/>'
                f"{label}</g>"
            )
        parts.append("</g>")
    return _svg(width, height, "accuracy in percent against tokens per forward", parts)


def line_chart(name: str, points: list[tuple[float, float]], width: int = 260, height: int = 130) -> str:
    """One training curve: value against optimizer step."""
    left, right, top, bottom = 46, 8, 8, 18
    steps, values = [p[0] for p in points], [p[1] for p in points]
    ys = ticks(min(values), max(values), 4)
    first, last = min(steps), max(steps)

    def place(step: float, value: float) -> str:
        across = (step - first) / ((last - first) or 1)
        up = (ys[-1] - value) / (ys[-1] - ys[0])
        return f"{left + across * (width - left - right):.1f} {top + up * (height - top - bottom):.1f}"

    parts = []
    for value in ys:
        height_of = place(first, value).split()[1]
        parts.append(f'<path class="grid" d="M{left} {height_of}H{width - right}"/>')
        parts.append(
            f'<text class="tick" x="{left - 6}" y="{height_of}" dy=".35em" text-anchor="end">{number(value)}</text>'
        )
    parts.append(f'<text class="tick" x="{left}" y="{height - 3}">{number(first)}</text>')
    parts.append(f'<text class="tick" x="{width - right}" y="{height - 3}" text-anchor="end">{number(last)}</text>')
    parts.append(f'<path class="line c0" d="M{"L".join(place(s, v) for s, v in points)}"/>')
    return _svg(width, height, name, parts)


def _svg(width: int, height: int, label: str, parts: list[str]) -> str:
    head = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label, quote=True)}">'
    return head + "".join(parts) + "</svg>"
