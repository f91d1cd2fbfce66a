"""The report: one HTML file that needs nothing else."""

import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from jinja2 import Template

from t3d.disk import write_whole
from t3d.errors import T3DError
from t3d.evaluation.metrics import mcnemar
from t3d.evaluation.oracle import TPF
from t3d.evaluation.rows import EXTRACTED, columns, percent
from t3d.evaluation.summary import aup_by_curve
from t3d.report.charts import Point, Series, accuracy_chart, limits, line_chart
from t3d.report.config import ReportConfig
from t3d.report.figures import save_accuracy_plot
from t3d.report.runs import Row, Run, choose_problems, load_runs, reference, viewer_data
from t3d.report.tokens import step_colour

MARK = b'<meta name="generator" content="t3d">'  # in every report, so that nothing else is overwritten


def write_report(run_dirs: Sequence[Path | str], output: Path | str, config: ReportConfig | None = None) -> Path:
    """Write `output` from each run's summary.json, answers and training log, and the plot beside it as SVG and PNG.

    Several runs are shown together, e.g. other objectives or seeds.

    Raises:
        T3DError: if a run has no readable summary, or the file cannot be written, or is there and no report.
    """
    config, output = config or ReportConfig(), Path(output)
    if output.is_file() and MARK not in output.read_bytes()[:2000]:
        raise T3DError(f"{output} exists and is not a t3d report; choose another file")
    runs, rows = load_runs([Path(folder) for folder in run_dirs])
    if not rows:
        raise T3DError(f"{runs[0].path / 'summary.json'} has no rows; run `t3d eval` first")
    names = ", ".join(run.path.resolve().name for run in runs)
    curves = _series(rows)
    data = viewer_data(rows, choose_problems(rows, config.problems))
    steps = max((max(a["steps"]) + 1 for p in data["problems"] for a in p["answers"]), default=1)
    sections = [
        _headline(rows),
        _plot(curves),
        _viewer(data),
        _table(rows),
        _failures(rows),
        _training(runs),
        _provenance(runs),
    ]
    page = files("t3d.report")
    fill = {
        "TITLE": escape(config.title or names),
        "SUBTITLE": escape(_subtitle(runs)),
        "STYLE": page.joinpath("page.css").read_text(encoding="utf-8").replace("/*STEPS*/", _step_colours(steps)),
        "SCRIPT": page.joinpath("page.js").read_text(encoding="utf-8"),
        "BODY": "\n".join(filter(None, sections)),
        # inside <script>, only "<" could end it; "\u003c" is the same in JSON
        "DATA": json.dumps(data, ensure_ascii=False).replace("<", "\\u003c"),
    }
    html = Template(page.joinpath("page.html").read_text(encoding="utf-8"), keep_trailing_newline=True)
    write_whole(output, html.render(fill))
    if curves:
        save_accuracy_plot(curves, output.with_name(f"{output.stem}-accuracy"))
    return output


def _subtitle(runs: list[Run]) -> str:
    tasks = sorted({str(run.summary.get("task")) for run in runs})
    counts = sorted({run.summary.get("num_problems", 0) for run in runs})
    dropped = sum(run.summary.get("dropped_prompts", 0) for run in runs)
    without = f", {dropped:,} dropped whose prompts cannot be decoded" if dropped else ""
    return f"{', '.join(tasks)}, {' / '.join(f'{n:,}' for n in counts)} problems{without}"


def _series(rows: list[Row]) -> list[Series]:
    """The curves of the accuracy plot; the teacher's is grey, whatever the order."""
    found: dict[str, list[Point]] = {}
    oracles: dict[str, float] = {}
    for row in rows:
        v = row.values
        if v["accuracy"] is None:
            continue
        if TPF in v["extra"]:
            oracles[row.series] = v["extra"][TPF]
        low, high = (100 * end for end in v["ci95"])
        title = (
            f"{row.name}: {percent(v['accuracy'])}% ({low:.1f}–{high:.1f}), {v['tpf']:.2f} tokens per forward, "
            f"n = {v['num_problems']}"
        )
        found.setdefault(row.series, []).append(
            Point(v["tpf"], 100 * v["accuracy"], low, high, row.setting.removeprefix("dynamic "), title)
        )
    teachers = [name for name in found if name.split(",")[0] == "teacher"]
    free = iter([0, *range(2, 2 + len(found))])
    colours = {name: 1 if name == next(iter(teachers), None) else next(free) for name in found}
    return [Series(name, colours[name] % 6, points, oracles.get(name)) for name, points in found.items()]


def _headline(rows: list[Row]) -> str:
    """For every few-step setting that teacher and student share: both accuracies, and the share of the gap closed."""
    full = reference(rows)
    if full is None or full.values["model"] != "teacher":
        return ""
    pairs, cards = {}, []
    for row in rows:
        if row.values["accuracy"] is not None and row is not full:
            pairs.setdefault(row.setting, {}).setdefault(row.values["model"], row)
    for name, by_model in pairs.items():
        teacher, student = by_model.get("teacher"), by_model.get("student")
        if teacher is None or student is None:
            continue
        t, s, f = (100 * row.values["accuracy"] for row in (teacher, student, full))
        closed = ""
        if f - t >= 1:
            closed = f"closes {100 * (s - t) / (f - t):.0f}% of the gap to the teacher at {full.setting}"
        cards.append(
            f'<div class="card"><h3>{escape(name)}{"" if student.values["knobs"] else " per block"}</h3>'
            f'<p class="big"><span class="from">{t:.1f}</span><span class="arrow"> → </span>{s:.1f}<small>%</small></p>'
            f'<div class="bar" role="img" aria-label="teacher {t:.1f}%, student {s:.1f}%, of {f:.1f}% at full steps">'
            f'<i class="student" style="width:{s:.1f}%"></i><i class="teacher" style="width:{t:.1f}%"></i>'
            f'<i class="mark" style="left:{f:.1f}%"></i></div>'
            f"<p>{closed}</p><p>{student.values['tpf']:.2f} tokens per forward</p></div>"
        )
    if not cards:
        return ""
    cards = cards[:6]
    note = (
        f"Accuracy of the teacher → of the student; the line marks the teacher at {full.setting} "
        f"({percent(full.values['accuracy'])}%)."
    )
    return f'<section><div class="cards">{"".join(cards)}</div><p class="note">{escape(note)}</p></section>'


def _plot(curves: list[Series]) -> str:
    if not curves:
        return (
            '<section><p class="note">Nothing could be verified: the problems have no reference answers.</p></section>'
        )
    legend = "".join(f'<li class="c{s.colour}"><i></i>{escape(s.name)}</li>' for s in curves)
    scores = aup_by_curve({s.name: [(p.x, p.y) for p in s.points] for s in curves})
    cells = "".join(f"<li>{escape(name)} <b>{value:.1f}</b></li>" for name, value in scores.items())
    wide, narrow = accuracy_chart(curves, 760, 400), accuracy_chart(curves, 360, 320)
    oracle = " Dashed: the oracle, which knows what the model writes." if limits(curves) else ""
    return (
        "<section><h2>Accuracy against tokens per forward</h2>"
        f'<ul class="legend">{legend}<li class="front"><i></i>Pareto front</li></ul>'
        f'<figure class="wide">{wide}</figure><figure class="narrow">{narrow}</figure>'
        '<p class="note">Points are decode settings; bars are 95% intervals. Forwards that denoise are counted.'
        f"{oracle}</p>"
        f'<ul class="aup"><li>AUP</li>{cells}</ul></section>'
    )


def _table(rows: list[Row]) -> str:
    shown, same = [], []
    for name, side, text in columns([row.values for row in rows]):
        values = {text(row.values) for row in rows}
        if name in ("n", "T", "seed") and len(values) == 1:  # said once, below
            same.append(f"{name} = {values.pop()}")
        else:
            shown.append((name, side, text))
    head = "".join(f'<th class="{side}">{escape(name)}</th>' for name, side, _ in shown)
    body = []
    previous = None
    for row in rows:
        cells = [text(row.values | {"model": row.label}) for _, _, text in shown]
        kind = ' class="first"' if previous not in (None, row.label) else ""
        previous = row.label
        rest = "".join(
            f'<td class="{side}">{escape(cell)}</td>' for (_, side, _), cell in zip(shown[1:], cells[1:], strict=True)
        )
        body.append(f'<tr{kind}><th scope="row">{escape(cells[0])}</th>{rest}</tr>')
    machines = sorted(
        {f"{v['hardware']}, up to {v['batch_size']} at a time" for v in (r.values for r in rows) if v.get("hardware")}
    )
    note = (
        "TokPS: nominal tokens per step. TPF: tokens per forward that denoises; TPF all: prefill and commit too. "
        "TPS: tokens per second of decoding"
        + (f" ({'; '.join(machines)})" if machines else "")
        + ". NFE: forwards per response. length: tokens per response. cut: responses that did not end by themselves."
        + (f" {', '.join(same)}." if same else "")
    )
    return f'<section><h2>Results</h2>{_scrolling("Results", head, body)}<p class="note">{escape(note)}</p></section>'


def _scrolling(label: str, head: str, body: list[str]) -> str:
    """A table that can be scrolled sideways, by the keyboard too, and says so where it does not fit (page.js)."""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
        '<p class="sideways" aria-hidden="true">scroll sideways for more →</p>'
    )


def _training(runs: list[Run]) -> str:
    parts = []
    for run in runs:
        if not run.curves:
            continue
        order = sorted(run.curves, key=lambda name: (not name.startswith("loss"), "/" in name, name))
        charts = [
            f"<figure><figcaption>{escape(name)}</figcaption>{line_chart(name, run.curves[name])}</figure>"
            for name in order
        ]
        title = f"<h3>{escape(run.path.resolve().name)}</h3>" if len(runs) > 1 else ""
        parts.append(f'{title}<div class="curves">{"".join(charts[:6])}</div>')
        if len(charts) > 6:
            more = f"<summary>{len(charts) - 6} more</summary>"
            parts.append(f'<details>{more}<div class="curves">{"".join(charts[6:])}</div></details>')
    if not parts:
        return ""
    return f'<section><h2>Training</h2>{"".join(parts)}<p class="note">Each against the optimizer step.</p></section>'


def _failures(rows: list[Row]) -> str:
    """Accuracy by how long the reference's answer is, and what is solved besides and instead of what it solves."""
    base = reference(rows)
    rows = [row for row in rows if row.verdicts and row.values["accuracy"] is not None]
    if base is None or not base.verdicts or len(rows) < 2:
        return ""
    lengths = dict(zip(base.verdicts, base.answers.column("length"), strict=True))
    ordered = sorted(lengths, key=lengths.__getitem__)
    cut = [ordered[len(ordered) * i // 3] for i in (1, 2)]
    bounds = [(0, lengths[cut[0]]), (lengths[cut[0]], lengths[cut[1]]), (lengths[cut[1]], float("inf"))]
    names = (f"short (< {bounds[0][1]})", "medium", f"long (≥ {bounds[2][0]})")
    bins = [[k for k in ordered if low <= lengths[k] < high] for low, high in bounds]
    body = []
    for row in rows:
        cells = []
        for group in bins:
            judged = [row.verdicts[k] for k in group if row.verdicts.get(k) is not None]
            share = sum(judged) / len(judged) if judged else None
            cells.append(f'<td class="heat" style="--p:{100 * (share or 0):.1f}%">{percent(share)}</td>')
        shared = [(row.verdicts[k], base.verdicts[k]) for k in row.verdicts if k in base.verdicts]
        gained, lost = shared.count((True, False)), shared.count((False, True))
        p = mcnemar(gained, lost)
        why = "".join(f'<td class="right">{percent(share)}</td>' for share in _ways(row))
        mark = '<td class="right">–</td>' * 3
        if row is not base:
            mark = f'<td class="right">{gained}</td><td class="right">{lost}</td><td class="right">{_p(p)}</td>'
        head = f'<th scope="row">{escape(row.label)}</th><td>{escape(row.setting)}</td>'
        body.append(f"<tr>{head}{''.join(cells)}{why}{mark}</tr>")
    heads = "".join(f'<th class="right">{escape(name)}</th>' for name in names)
    ways = "".join(f'<th class="right">{name}</th>' for name in ("wrong", "none", "cut"))
    counts = ", ".join(str(len(group)) for group in bins)
    note = (
        f"Accuracy in percent by the length, in tokens, of the answer of {base.name} ({counts} problems). Then what is "
        "not right, in percent of all answers: wrong ones; none found; cut by the token limit. gained and lost: "
        f"problems that a row solves and {base.name} does not, and the other way; p: McNemar's exact test."
    )
    marks = '<th class="right">gained</th><th class="right">lost</th><th class="right">p</th>'
    head = f"<th>model</th><th>setting</th>{heads}{ways}{marks}"
    return (
        f"<section><h2>Where it fails</h2>{_scrolling('Where it fails', head, body)}"
        f'<p class="note">{escape(note)}</p></section>'
    )


def _ways(row: Row) -> tuple[float, float, float]:
    """Shares of the verified answers that are not right: wrong ones, none found, and cut before they ended."""
    columns = (row.answers.column(name) for name in ("correct", "extra", "finish_reason"))
    judged = [found for found in zip(*columns, strict=True) if found[0] is not None]
    wrong = [(json.loads(extra or "{}"), ended) for correct, extra, ended in judged if not correct]
    cut = sum(ended == "length" for _, ended in wrong)
    none = sum(ended != "length" and extra.get(EXTRACTED) is None for extra, ended in wrong)
    return tuple(count / len(judged) for count in (len(wrong) - none - cut, none, cut))


def _p(value: float) -> str:
    return f"{value:.2f}" if value >= 0.01 else "< .01" if value >= 0.001 else "< .001"


def _viewer(data: dict) -> str:
    if not data["problems"]:
        return ""
    return files("t3d.report").joinpath("viewer.html").read_text(encoding="utf-8")


def _provenance(runs: list[Run]) -> str:
    items = []
    for run in runs:
        s = run.summary
        times = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in s.get("wall_seconds", {}).items() if seconds)
        versions = ", ".join(f"{name} {value}" for name, value in s.get("versions", {}).items() if value)
        text = f"{run.path.resolve().name}: seed {s.get('seed')}" + (f"; {times}" if times else "")
        items.append(f"<li>{escape(text)}<br><span>{escape(versions)}</span></li>")
    return f"<footer><ul>{''.join(items)}</ul></footer>"


def _step_colours(steps: int) -> str:
    """--s0, --s1, ... for the light, and again for the dark."""

    def block(dark: bool) -> str:
        return "".join(f"--s{i}:rgb{step_colour(i, steps, dark)};".replace(", ", ",") for i in range(steps))

    return f":root{{{block(False)}}}@media (prefers-color-scheme:dark){{:root{{{block(True)}}}}}"
