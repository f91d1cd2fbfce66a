"""A study of decoding as Markdown with plots: models as they are, each at every setting of the grid."""

from collections.abc import Iterable
from pathlib import Path

from t3d.evaluation.rows import percent
from t3d.report.charts import Series
from t3d.report.figures import save_accuracy_plot
from t3d.study.pool import Pool
from t3d.study.tables import head, line

LOWEST = 50  # percent; a plot leaves out what is below
OTHERS, SEVERAL = "other policies", "several blocks"  # points of different kinds: they make no line


def markdown(found: list[Pool], stem: Path) -> list[str]:
    """The lines of the document; the plots go to STEM-MODEL.svg."""
    parts = []
    for name in dict.fromkeys(pool.variant for pool in found):
        mine = [pool for pool in found if pool.variant == name]
        parts += [f"### `{name}`", ""]
        parts += [f"![accuracy against tokens per forward of {name}]({_plot(mine, stem, name).name})", ""]
        parts += head("setting", "accuracy, %", "TPF", "TPF all", "n", "seeds")
        for pool in sorted(mine, key=lambda pool: (group(pool), pool.setting.split(" ")[0], pool.tpf)):
            low, high = pool.ci95
            accuracy = f"{percent(pool.accuracy)} ({percent(low)}–{percent(high)})"
            seeds = ", ".join(map(str, sorted(pool.rows)))
            parts.append(line(pool.setting, accuracy, f"{pool.tpf:.2f}", f"{pool.tpf_all:.2f}", str(pool.n), seeds))
        if mine[0].oracle_tpf is not None:
            parts += ["", f"Oracle: {mine[0].oracle_tpf:.2f} tokens per forward with one block in flight."]
        parts.append("")
    return parts + _look_ahead(found)


def group(pool: Pool) -> str:
    """The line or the colour of a plot."""
    name = pool.row["strategy"].removeprefix("low_confidence_")
    flight = pool.row.get("flight_settings", {}).get("flight")
    if pool.row.get("other") or name not in ("static", "dynamic"):
        return OTHERS
    if flight == "multi_block":
        return SEVERAL
    return f"{name}, {pool.row['flight'] if flight == 'look_ahead' else flight or 'one block'}"


def _plot(mine: list[Pool], stem: Path, name: str) -> Path:
    bottom = LOWEST if any(100 * pool.accuracy >= LOWEST for pool in mine) else None
    shown = [pool for pool in mine if 100 * pool.accuracy >= (bottom or 0)]
    series = []
    for colour, label in enumerate(sorted({group(pool) for pool in shown})):
        points = [pool.point for pool in shown if group(pool) == label]
        if label in (OTHERS, SEVERAL):
            series += [Series("" if number else label, colour, [point]) for number, point in enumerate(points)]
        else:
            series.append(Series(label, colour, points))
    series.append(Series("", 0, [], mine[0].oracle_tpf))
    return save_accuracy_plot(series, stem.with_name(f"{stem.name}-{name}"), suffixes=(".svg",), bottom=bottom)[0]


def _look_ahead(found: list[Pool]) -> list[str]:
    """Whether look-ahead wrote what one block in flight writes, and how many drafts a forward confirmed."""
    pairs = [(plain, pool) for pool in found if (plain := _one_block(pool, found)) is not None]
    if not pairs:
        return []
    parts = ["### Exact look-ahead beside one block in flight", ""]
    parts += head("model", "setting", "equal answers", "TPF, one block", "TPF", "right drafts per forward", text=2)
    for plain, pool in pairs:
        drafts = plain.predicting / pool.predicting - 1
        equal, n = _equal(plain, pool)
        parts.append(
            line(
                f"`{pool.variant}`",
                pool.setting,
                f"{equal:,} of {n:,}",
                f"{plain.tpf:.2f}",
                f"{pool.tpf:.2f}",
                f"{drafts:.2f}",
            )
        )
    return [*parts, ""]


def _one_block(pool: Pool, found: Iterable[Pool]) -> Pool | None:
    """The same model at the same setting but for look-ahead; None where `pool` has none of it."""
    if pool.row.get("flight_settings", {}).get("flight") != "look_ahead":
        return None
    same = ("block_size", "steps", "strategy", "knobs", "temperature", "other")

    def key(p: Pool) -> list:
        return [p.variant, *(p.row.get(name) for name in same)]

    return next((p for p in found if not p.row.get("flight") and key(p) == key(pool)), None)


def _equal(plain: Pool, pool: Pool) -> tuple[int, int]:
    """How many answers have the same tokens and step map, and of how many."""
    seeds = sorted(plain.rows.keys() & pool.rows.keys())
    want = {(t.prompt_id, t.sample): (t.response_ids, t.step_map, t.length) for t in plain.trajectories(seeds)}
    same = [
        want.get((t.prompt_id, t.sample)) == (t.response_ids, t.step_map, t.length) for t in pool.trajectories(seeds)
    ]
    return sum(same), len(same)
