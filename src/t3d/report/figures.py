"""The accuracy plot as files for papers and READMEs."""

from pathlib import Path

from t3d.errors import T3DError
from t3d.report.charts import Series, front, labelled, limits

COLOURS = ("#2563a8", "#8a8f98", "#c2571a", "#2f8f6b", "#8b5cb5", "#a63a50")  # as in page.css, in the light
MARKERS = "os^Dv"  # the next one where colours start again
FEW = 5  # with more series only the best points are labelled, and the legend stands beside


def save_accuracy_plot(
    series: list[Series],
    stem: Path,
    title: str = "",
    suffixes: tuple[str, ...] = (".svg", ".png"),
    bottom: float | None = None,
) -> list[Path]:
    """Write STEM.svg and STEM.png, accuracy in percent against tokens per forward; the same input, the same bytes.

    A series without a name is not in the legend. bottom: accuracy at which the axis begins.
    """
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "t3d", "font.size": 10, "axes.spines.top": False}):
        from matplotlib.figure import Figure

        many = len({s.colour for s in series}) > FEW
        figure = Figure(figsize=(7.6 if many else 6.4, 4.2), layout="constrained")
        axes = figure.add_subplot()
        axes.spines["right"].set_visible(False)
        axes.grid(axis="y", color="#e3e5e8", linewidth=0.8)
        best, points = front(series), [p for s in series for p in s.points]
        spans = [max(values) - min(values) for values in ([p.x for p in points], [p.y for p in points])]
        roomy = labelled([Series("", 0, best)] if many else series, 0.013 * spans[0], 0.05 * spans[1])
        if len(best) > 1:
            axes.plot([p.x for p in best], [p.y for p in best], color="#b9bec6", linewidth=5, alpha=0.5, zorder=1)
        for value, colour in limits(series):
            axes.axvline(value, color=COLOURS[colour % len(COLOURS)], linestyle="--", linewidth=1, zorder=0)
            where = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "rotation": 90}
            axes.annotate("oracle", (value, 0), (3, 4), **where, fontsize=8, color="#555b64")
        for s in (s for s in series if s.points):
            ordered = sorted(s.points, key=lambda p: p.x)
            errors = [[p.y - p.low for p in ordered], [p.high - p.y for p in ordered]]
            axes.errorbar(
                [p.x for p in ordered],
                [p.y for p in ordered],
                yerr=errors,
                color=COLOURS[s.colour % len(COLOURS)],
                marker=MARKERS[s.colour // len(COLOURS) % len(MARKERS)],
                capsize=2,
                label=s.name or None,
                zorder=2,
            )
            for p in (p for p in ordered if p in roomy):
                axes.annotate(p.label, (p.x, p.y), (6, 5), textcoords="offset points", fontsize=8, color="#555b64")
        axes.set_xlabel("tokens per forward")
        axes.set_ylabel("accuracy (%)")
        axes.set_ylim(bottom=bottom, top=102)
        axes.set_yticks([tick for tick in axes.get_yticks() if axes.get_ylim()[0] <= tick <= 100])
        if title:
            axes.set_title(title, loc="left")
        if series:
            axes.legend(frameon=False, **({"loc": "center left", "bbox_to_anchor": (1, 0.5)} if many else {}))
        paths = [stem.with_name(stem.name + suffix) for suffix in suffixes]
        try:
            for path in paths:
                metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
                figure.savefig(path, dpi=160, metadata=metadata)
        except OSError as error:
            raise T3DError(f"cannot write {path}: {error.strerror}") from error
    return paths
