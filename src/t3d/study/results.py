"""A study's results as Markdown with plots, and as JSON; also between the marks of a document."""

import json
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path

from t3d.disk import locked
from t3d.errors import T3DError
from t3d.evaluation.oracle import TPF
from t3d.evaluation.rows import percent
from t3d.evaluation.summary import write_whole
from t3d.report.charts import Series
from t3d.report.figures import save_accuracy_plot
from t3d.study import decoding
from t3d.study.config import Study
from t3d.study.pool import Cost, Pool, costs, pools
from t3d.study.tables import head, line

BEGIN, END = "<!-- {}: begin -->", "<!-- {}: end -->"  # with the name of the study's file


def write_study_results(study: Study) -> None:
    """Write FOLDER/results.md, results.json and the plots, of the runs that are complete; none yet: nothing.

    Raises:
        T3DError: if a file cannot be written, or the document that `results` names has no marks.
    """
    folder = Path(study.folder)
    document = None if study.results is None else study.path.parent / study.results
    shared = folder if document is None else document.parent  # by processes of this study, and studies of this document
    with locked(shared) if shared.exists() else nullcontext():
        _write(study, folder, document)


def _write(study: Study, folder: Path, document: Path | None) -> None:
    found = pools(study)
    if not found:
        return
    spent = costs(study)
    pairs = list(comparisons(study, found))
    write_whole(folder / "results.json", json.dumps(_plain(found, spent, pairs), indent=1, ensure_ascii=False) + "\n")
    write_whole(folder / "results.md", _markdown(study, found, spent, pairs, folder / "results"))
    if document is not None:
        name = study.path.stem
        text = _markdown(study, found, spent, pairs, document.with_name(f"{document.stem}-{name}"))
        write_whole(document, _between_marks(document, name, text))


def comparisons(study: Study, found: list[Pool]) -> Iterable[tuple]:
    """(variant's pool, the other's, seeds in common, comparison) of every variant with the `against` of its labels."""
    for pool in found:
        for other in found:
            same = (pool.labels, pool.setting) == (other.labels, other.setting)
            if same and other.variant in study.against and pool.variant not in study.against:
                result = pool.against(other)
                if result is not None:
                    yield pool, other, *result


def _markdown(study: Study, found: list[Pool], spent: dict[str, list[Cost]], pairs: list, stem: Path) -> str:
    """The text; its plots are written beside it, under names that begin with `stem`'s."""
    made = _students(study, found, spent, pairs, stem) if study.train else decoding.markdown(found, stem)
    return "\n".join([*made, *_missing(study, found)])


def _students(study: Study, found: list[Pool], spent: dict[str, list[Cost]], pairs: list, stem: Path) -> list[str]:
    settings = list(dict.fromkeys(pool.setting for pool in found))
    parts, plots = [], _plots(study, found, stem)
    for known in dict.fromkeys(pool.labels for pool in found if pool.labels):
        mine = _with_teachers(study, found, {pool.variant for pool in found if pool.labels == known})
        parts += [f"### Students of {known}", "", *_accuracies(mine, settings, spent), ""]
        if known in plots:
            parts += [f"![accuracy against tokens per forward, students of {known}]({plots[known].name})", ""]
        compared = [pair for pair in pairs if pair[0].labels == known]
        if compared:
            parts += [*_differences(compared), ""]
    return parts


def _with_teachers(study: Study, found: list[Pool], variants: set[str]) -> list[Pool]:
    shown = variants | {study.teachers[name] for name in variants}
    return [pool for pool in found if pool.variant in shown]


def _missing(study: Study, found: list[Pool]) -> list[str]:
    """What a reader must not take for done."""
    planned = {job.variant: [j.seed for j in study.jobs if j.variant == job.variant] for job in study.jobs}
    missing = {
        name: sorted(set(seeds) - {seed for pool in found if pool.variant == name for seed in pool.rows})
        for name, seeds in planned.items()
    }
    left = "; ".join(f"`{name}` (seed {', '.join(map(str, seeds))})" for name, seeds in missing.items() if seeds)
    if left:
        return [f"Not run yet: {left}.", ""]
    return []


def _accuracies(shown: list[Pool], settings: list[str], spent: dict[str, list[Cost]]) -> list[str]:
    """One line per variant: accuracy with its interval at every setting, tokens per forward where they vary, cost."""
    lines = head("variant", *(f"{s}, %" for s in settings), "n", "seeds", "steps", "TFLOP", "seconds")
    for name in dict.fromkeys(pool.variant for pool in shown):
        mine = {pool.setting: pool for pool in shown if pool.variant == name}
        some = next(iter(mine.values()))
        lines.append(
            line(
                f"`{name}`" if some.labels else name,
                *(_cell(mine.get(s)) for s in settings),
                str(some.n),
                ", ".join(map(str, sorted(some.rows))),
                *_costs(spent.get(name)),
            )
        )
    return lines


def _cell(pool: Pool | None) -> str:
    if pool is None:
        return "–"
    low, high = pool.ci95
    text = f"{percent(pool.accuracy)} ({percent(low)}–{percent(high)})"
    return text + (f", {pool.tpf:.2f} TPF" if pool.knobs else "")


def _costs(spent: list[Cost] | None) -> tuple[str, str, str]:
    """Means over seeds."""
    if not spent:
        return "–", "–", "–"
    mean = [sum(values) / len(spent) for values in zip(*((c.steps, c.flops, c.seconds) for c in spent), strict=True)]
    return f"{mean[0]:.0f}", f"{mean[1] / 1e12:.3g}", f"{mean[2]:.0f}"


def _differences(pairs: list) -> list[str]:
    names = ("against", "variant", "setting", "difference, points", "only this / only that", "n", "p (McNemar)")
    lines = head(*names, text=3)
    for pool, other, _, result in pairs:
        low, high = result.ci95
        lines.append(
            line(
                f"`{other.variant}`",
                f"`{pool.variant}`",
                pool.setting,
                f"{100 * result.difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})",
                f"{result.only_a} / {result.only_b}",
                str(result.n),
                f"{result.p_value:.2g}",
            )
        )
    return lines


def _plots(study: Study, found: list[Pool], stem: Path) -> dict[str, Path]:
    """STEM-LABELS.svg for every source of labels. Lines join numbers of steps; a threshold's point stands alone."""
    made = {}
    for known in dict.fromkeys(pool.labels for pool in found if pool.labels):
        mine = {pool.variant for pool in found if pool.labels == known}
        wanted = _with_teachers(study, found, mine.intersection(study.plot or study.variants))
        names = list(dict.fromkeys(pool.variant for pool in wanted))
        series = []
        for colour, name in enumerate(names):
            mine = [p for p in wanted if p.variant == name]
            steps, others = [p for p in mine if not p.knobs], [p for p in mine if p.knobs]
            for label, joined in ((name, steps or mine), *(("", [p]) for p in others if steps)):
                series.append(Series(label, colour, [p.point for p in joined], mine[0].oracle_tpf))
        if len(names) > 1:
            path = stem.with_name(f"{stem.name}-{known.replace(' ', '-')}")
            made[known] = save_accuracy_plot(series, path, suffixes=(".svg",))[0]
    return made


def _between_marks(path: Path, name: str, text: str) -> str:
    begin, end = BEGIN.format(name), END.format(name)
    try:
        old = path.read_text(encoding="utf-8")
    except OSError as error:
        raise T3DError(f"cannot read {path}, where the results should go: {error.strerror}") from error
    if begin not in old or end not in old.split(begin, 1)[1]:
        raise T3DError(f"{path} has no place for the results: add the lines {begin} and {end}")
    head, rest = old.split(begin, 1)
    return f"{head}{begin}\n\n{text}\n{end}{rest.split(end, 1)[1]}"


def _plain(found: list[Pool], spent: dict[str, list[Cost]], pairs: list) -> dict:
    return {
        "format": "t3d-study",
        "version": 1,
        "rows": [
            {
                "variant": p.variant,
                "labels": p.labels or None,
                "setting": p.setting,
                "seeds": sorted(p.rows),
                "n": p.n,
                "accuracy": p.accuracy,
                "ci95": list(p.ci95),
                "by_seed": {str(seed): row["accuracy"] for seed, row in sorted(p.rows.items())},
                "tpf": p.tpf,
                "mean_length": p.mean_length,
                **({} if p.oracle_tpf is None else {TPF: p.oracle_tpf}),
            }
            for p in found
        ],
        "costs": {name: [vars(cost) for cost in values] for name, values in spent.items()},
        "comparisons": [
            {"variant": a.variant, "against": b.variant, "setting": a.setting, "seeds": seeds, "n": r.n} | vars(r)
            for a, b, seeds, r in pairs
        ],
    }
