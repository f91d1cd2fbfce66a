import html
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from dataclasses import replace
from io import StringIO
from itertools import pairwise

import pytest
from PIL import Image
from rich.console import Console

from t3d import T3DError
from t3d.report import ReportConfig, show, write_report
from t3d.report.charts import Point, Series, accuracy_chart, front, line_chart, ticks
from t3d.report.runs import choose_problems, load_runs, reference, viewer_data
from t3d.report.tokens import step_colour, token_texts
from t3d.tasks.word_problems import build_tokenizer
from t3d.trajectories.pieces import PIECES
from tests.example_run import example_run
from tests.trajectory_examples import make_trajectory

HOSTILE = "</script><img src=x onerror=\"document.title='pwned'\">&lt;'"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return example_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture(scope="module")
def page(run):
    return write_report([run], run / "report.html").read_text()


def embedded(page) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S).group(1))


def test_the_file_needs_nothing_else(page):
    assert re.findall(r"""(?:src|href)\s*=|@import|url\(|https?:|//cdn""", page) == []
    assert "default-src 'none'" in page
    assert "{{" not in page
    assert len(page) < 1_000_000


def test_it_shows_every_row_and_the_plot_in_both_sizes(page, run):
    rows = json.loads((run / "summary.json").read_text())["rows"]
    text = html.unescape(re.sub(r"<[^>]*>", " ", page))
    for row in rows:
        assert f"{100 * row['accuracy']:.1f}" in text
    charts = [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.S)]
    assert [sum(e.tag == "circle" for e in c.iter()) for c in charts[:2]] == [6, 6]
    assert len(charts) == 2 + 4  # loss, loss_path, grad_norm, learning_rate
    assert "closes" in text
    assert "train 108 s" in text


def test_the_oracle_is_a_line_per_model(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    limits = {"teacher": 2.5, "student": 6.25}  # one beyond all points
    for row in summary["rows"]:
        row["extra"]["oracle_tpf"] = limits[row["model"]]
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    text = write_report([tmp_path / "run"], tmp_path / "report.html").read_text()
    for svg in re.findall(r"<svg.*?</svg>", text, re.S)[:2]:
        chart = ET.fromstring(svg)
        titles = [line[0].text for line in chart.iter() if line.get("class") == "limit"]
        assert titles == ["oracle: 2.50 tokens per forward", "oracle: 6.25 tokens per forward"]
        width = float(chart.get("viewBox").split()[2])
        ticks = {e.text: float(e.get("x")) for e in chart.iter() if e.get("class") == "tick"}
        places = [float(line.get("d")[1:].split()[0]) for line in chart.iter() if line.get("class") == "limit"]
        scale = (ticks["4"] - ticks["2"]) / 2
        assert places == pytest.approx([ticks["2"] + 0.5 * scale, ticks["4"] + 2.25 * scale], abs=0.2)
        assert places[1] < width
    assert "Dashed" in text
    assert (tmp_path / "report-accuracy.svg").read_text().count("oracle") >= 2
    assert "oracle tpf" in text


def test_plot_files(page, run):
    assert ET.parse(run / "report-accuracy.svg").getroot().tag.endswith("svg")
    with Image.open(run / "report-accuracy.png") as image:
        assert image.width > 800


def test_the_same_input_gives_the_same_bytes(page, run):
    before = [(run / f"report-accuracy.{kind}").read_bytes() for kind in ("svg", "png")]
    again = write_report([run], run / "report.html")
    assert again.read_text() == page
    assert before == [(run / f"report-accuracy.{kind}").read_bytes() for kind in ("svg", "png")]


def test_the_viewer_gets_the_answers_as_they_were_decoded(page, run):
    _, rows = load_runs([run])
    data = embedded(page)
    assert len(data["problems"]) == ReportConfig().problems
    assert [r["label"] for r in data["rows"]] == ["teacher"] * 3 + ["student"] * 3
    stored = {t.prompt_id: t for t in rows[5].answers}
    for problem in data["problems"]:
        shown, t = problem["answers"][5], stored[problem["id"]]
        assert shown["steps"] == t.step_map
        assert shown["tail"] == len(t.prompt_ids) % 4
        assert len(shown["texts"]) == shown["tail"] + len(t.response_ids)
        assert shown["correct"] == t.correct
        assert problem["question"] == t.question
        if "<unk>" not in t.text:
            assert "".join(shown["texts"]).startswith("".join(shown["texts"][: shown["tail"]]) + t.text[:5])


def test_telling_problems_come_first(run):
    _, rows = load_runs([run])
    everything = choose_problems(rows, 10**6)
    assert everything == list(rows[0].verdicts)
    few = choose_problems(rows, 6)
    assert few == [key for key in everything if key in few]
    differ = [key for key in few if len({row.verdicts[key] for row in rows}) == 2]
    assert len(differ) >= 3
    assert choose_problems(rows, 0) == []
    assert viewer_data(rows, [])["problems"] == []


def test_several_runs_share_the_teacher(run, tmp_path):
    shutil.copytree(run, tmp_path / "other")
    summary = json.loads((run / "summary.json").read_text())
    for row in summary["rows"]:
        if row["model"] == "student":
            row["accuracy"], row["ci95"] = 0.5, [0.4, 0.6]
    (tmp_path / "other" / "summary.json").write_text(json.dumps(summary))
    _, rows = load_runs([run, tmp_path / "other"])
    labels = ["teacher", "student (demo)", "student (other)"]
    assert [row.label for row in rows] == [label for label in labels for _ in range(3)]
    assert reference(rows).name == "teacher, 4 steps"
    page = write_report([run, tmp_path / "other"], tmp_path / "both.html").read_text()
    assert "student (other)" in page


@pytest.mark.parametrize("kind", ["no train", "no answers", "no verdicts", "student only", "one row"])
def test_less_than_everything_is_enough(tmp_path, kind):
    change = {"no verdicts": lambda t: replace(t, correct=None)}.get(kind, lambda t: t)
    models = ("student",) if kind == "student only" else ("teacher", "student")
    run = example_run(tmp_path / "run", count=6, models=models, change=change)
    if kind == "no train":
        shutil.rmtree(run / "train")
    if kind == "no answers":
        shutil.rmtree(run / "eval")
    if kind == "one row":
        summary = json.loads((run / "summary.json").read_text())
        (run / "summary.json").write_text(json.dumps(summary | {"rows": summary["rows"][:1]}))
    page = write_report([run], run / "report.html").read_text()
    assert ("<h2>Training</h2>" in page) == (kind != "no train")
    assert ('id="viewer"' in page) == (kind != "no answers")
    assert ("Nothing could be verified" in page) == (kind == "no verdicts")


def test_bad_input_is_one_line(tmp_path, run):
    with pytest.raises(T3DError, match="give at least one run folder"):
        write_report([], tmp_path / "report.html")
    with pytest.raises(T3DError, match="run `t3d eval` first"):
        write_report([tmp_path], tmp_path / "report.html")
    with pytest.raises(T3DError, match="cannot write"):
        write_report([run], run / "summary.json" / "report.html")
    bad = tmp_path / "bad"
    shutil.copytree(run, bad)
    (bad / "train" / "checkpoint-260" / "trainer_state.json").write_text("{")
    with pytest.raises(T3DError, match="is not a trainer state"):
        write_report([bad], tmp_path / "report.html")
    with pytest.raises(T3DError, match="problems must not be negative"):
        ReportConfig(problems=-1)


# -- in the browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """The page's DOM after `script` ran behind its own scripts, in headless Chromium; errors end up in the title."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium (Debian package `chromium`)")

    def browse(page, script=""):
        folder = tmp_path_factory.mktemp("browser")
        guard = "<script>window.onerror = (m) => { document.title = 'ERROR ' + m; };</script>"
        page = page.replace("<body>", "<body>" + guard).replace("</body>", f"<script>{script}</script></body>")
        (folder / "page.html").write_text(page)
        flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
        flags += (
            " --disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=3000 --dump-dom"
        )
        command = [
            chromium,
            *flags.split(),
            "--dump-dom",
            f"--user-data-dir={folder / 'profile'}",
            f"file://{folder}/page.html",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
        return done.stdout

    return browse


def press(key: str, where: str = "document") -> str:
    return f"{where}.dispatchEvent(new KeyboardEvent('keydown', {{key: '{key}', bubbles: true, cancelable: true}}));"


def test_the_console_is_looked_at(page, browse):
    for fault in ("nowhere.click();", "console.error('a message');", "fetch('https://example.org/');"):
        with pytest.raises(AssertionError, match="CONSOLE"):
            browse(page, fault)


def test_a_table_that_does_not_fit_says_so(page, browse):
    state = "document.title = [...document.querySelectorAll('.scroll')].map((box) => box.className).join();"
    narrow = (
        "for (const box of document.querySelectorAll('.scroll')) { box.style.minWidth = 0; box.style.width = '20rem'; }"
    )
    resize = "dispatchEvent(new Event('resize'));"

    def found(script):
        return re.search("<title>(.*?)</title>", browse(page, script + state)).group(1).split(",")

    assert found(narrow + resize) == ["scroll wide more"] * 2
    ends = "for (const box of document.querySelectorAll('.scroll')) { box.scrollLeft = 9999; }" + resize
    assert found(narrow + ends) == ["scroll wide"] * 2
    assert page.count('class="sideways"') == 2


def test_it_works_from_the_keyboard(page, browse):
    body = "document.body"
    title = "document.title = [document.getElementById('time').value, document.getElementById('problem').value];"

    def after(*keys):
        script = "document.getElementById('time').value = 5;" + "".join(press(key, body) for key in keys) + title
        return re.search("<title>(.*?)</title>", browse(page, script)).group(1)

    assert after("ArrowRight", "ArrowRight", "ArrowLeft") == "6,0"
    assert after("n", "n", "p").split(",")[1] == "1"
    playing = press(" ", body) + "document.title = document.getElementById('play').getAttribute('aria-label');"
    assert "<title>pause</title>" in browse(page, playing)
    tokens = "document.querySelectorAll('.pane')[0].querySelectorAll('.t')"
    walk = f"{tokens}[3].focus();" + press("ArrowRight", f"{tokens}[3]")
    walk += "document.title = document.activeElement.dataset.i + ' ' + document.getElementById('time').value;"
    found = re.search("<title>(.*?)</title>", browse(page, walk)).group(1).split()
    assert found[0] == "4"
    most = re.search(r'id="time"[^>]*max="(\d+)"', browse(page)).group(1)
    assert found[1] == most  # an arrow on a token moves between tokens, not in time


@pytest.mark.parametrize("several", [False, True])
def test_whatever_is_in_it_no_errors_in_the_console(tmp_path, browse, several):
    """Answers without verdicts, cut ones, steps and confidences that are unknown; one run or two."""

    def change(t):
        return replace(t, correct=None, finish_reason="length", confidence=[float("nan")] * len(t.confidence))

    runs = [example_run(tmp_path / name, count=2, change=change) for name in (["a", "b"] if several else ["a"])]
    page = write_report(runs, tmp_path / "report.html").read_text()
    dom = browse(page, "document.getElementById('play').click();" + press("n", "document.body"))
    assert "not verified" in dom
    assert "cut at the token limit" in dom


def test_the_slider_plays_the_denoising(page, browse):
    shown = embedded(page)["problems"][0]["answers"]
    first, last = shown[0], shown[5]

    def visible(answer, time):
        """Which texts are there after `time` forwards, from the step map alone."""
        result, before = [], 0
        for start in range(0, len(answer["texts"]), answer["block"]):
            places = range(start, min(start + answer["block"], len(answer["texts"])))
            steps = [-1 if i < answer["tail"] else answer["steps"][i - answer["tail"]] for i in places]
            result += [step == -1 or before + step < time for step in steps]
            before += max(steps) + 1
        return result

    for time in (0, 5, 10**6):
        dom = browse(
            page,
            f"const s = document.getElementById('time'); s.value = {time}; s.dispatchEvent(new Event('input'));",
        )
        assert "<title>ERROR" not in dom
        tokens = re.findall(r'<span class="t([^"]*)" data-i="(\d+)"', dom)
        expected = visible(first, time) + visible(last, time)
        assert ["masked" not in classes for classes, _ in tokens] == expected


def test_pointing_and_choosing_work(page, browse):
    script = (
        "document.getElementById('next').click();"
        "document.querySelectorAll('.pane')[1].querySelectorAll('.t')[9].focus();"
        "document.getElementById('filter').value = 'both wrong';"
        "document.title = document.querySelectorAll('.about')[1].textContent;"
    )
    data = embedded(page)
    title = html.unescape(re.search("<title>(.*?)</title>", browse(page, script)).group(1))
    answer = data["problems"][1]["answers"][5]
    place = 9 - answer["tail"]
    assert f"block 3 · step {answer['steps'][place] + 1} · forward " in title
    assert f"confidence {answer['confidence'][place]:.3f}" in title
    filtered = browse(
        page,
        "const f = document.getElementById('filter'); f.value = 'left right, right wrong';"
        "f.dispatchEvent(new Event('change'));",
    )
    wanted = [p["id"] for p in data["problems"] if p["answers"][0]["correct"] and not p["answers"][5]["correct"]]
    options = re.search(r'<select id="problem">(.*?)</select>', filtered, re.S).group(1)
    assert re.findall(r">([^<:]+): ", options) == wanted


def test_answers_are_never_taken_for_html(tmp_path, browse):
    def change(t):
        texts = [HOSTILE] * len(t.extra[PIECES])
        return replace(t, question=HOSTILE, answer=HOSTILE, extra=t.extra | {PIECES: texts, "extracted": HOSTILE})

    run = example_run(tmp_path / "<b>run", count=3, change=change)
    page = write_report([run], run / "report.html", ReportConfig(title=HOSTILE)).read_text()
    assert embedded(page)["problems"][0]["question"] == HOSTILE
    assert "<img" not in page
    assert "<b>run" not in page
    dom = browse(page)
    assert "<title>pwned" not in dom
    assert "<title>ERROR" not in dom
    assert "<img" not in re.sub(r"<script.*?</script>", "", dom, flags=re.S)
    assert dom.count(html.escape(HOSTILE, quote=False)) > 20


# -- charts, colours, terminal ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.93, 3.8), (-5, 5), (2, 2), (0, 0), (1e-6, 3e-6), (99.2, 99.4)])
def test_ticks_are_round_and_cover(low, high):
    found = ticks(low, high)
    assert found[0] <= low + 1e-12
    assert found[-1] >= high - 1e-12
    assert 2 <= len(found) <= 12
    assert len({round(b - a, 12) for a, b in pairwise(found)}) == 1


def test_charts_are_well_formed_for_odd_input():
    point = Point(1.0, 50.0, 30.0, 70.0, "<b>", '"&')
    assert ET.fromstring(accuracy_chart([Series("a&b", 0, [point])], 400, 300)) is not None
    assert ET.fromstring(line_chart("x", [(1, 0.0), (2, 0.0)])) is not None


def test_labels_do_not_collide_and_the_front_ignores_rounding():
    def points(*places):
        return [Point(x, y, y - 1, y + 1, "label", "") for x, y in places]

    one, other = points((1.0, 90), (3.73, 56)), points((1.0, 89), (3.74, 19), (5.0, 10))
    series = [Series("a", 0, one), Series("b", 1, other)]
    assert front(series) == [one[0], one[1], other[2]]
    assert accuracy_chart(series, 700, 400).count(">label<") == 4


def test_step_colours_are_readable_and_ordered():
    def luminance(rgb):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in rgb)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for dark, ink in ((False, (0x1D, 0x21, 0x27)), (True, (0xE4, 0xE6, 0xE9))):
        for steps in (1, 4, 32):
            values = [luminance(step_colour(i, steps, dark)) for i in range(steps)]
            for value in values:
                bright, black = sorted((value, luminance(ink)), reverse=True)
                assert (bright + 0.05) / (black + 0.05) >= 4.5  # WCAG AA
            assert values == sorted(values, reverse=dark)


def test_show_in_the_terminal(run):
    _, rows = load_runs([run])
    t = rows[0].answers[0]
    out = StringIO()
    show(t, console=Console(file=out, width=200, force_terminal=True, color_system="truecolor"))
    text = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())
    assert t.question in text.replace("\n", " ")
    assert text.count("│") == (len(t.prompt_ids) % 4 + len(t.response_ids)) // 4 - 1
    assert "step  1  2  3  4" in text
    red, green, blue = step_colour(0, 4, dark=False)
    assert f"48;2;{red};{green};{blue}" in out.getvalue()


def test_show_never_sends_control_characters():
    t = make_trajectory(prompt=4, blocks=1)
    t.extra[PIECES] = ["\x1b[2J", "a\nb", "[red]", ""]
    out = StringIO()
    show(t, console=Console(file=out, width=80))
    assert "\x1b" not in out.getvalue()
    assert "[red]" in out.getvalue()


def test_token_texts_without_kept_ones():
    t = make_trajectory(prompt=5, blocks=1)
    ids = t.prompt_ids[4:] + t.response_ids
    assert token_texts(t) == [f"⟨{i}⟩" for i in ids]
    tokenizer = build_tokenizer()
    assert token_texts(t, tokenizer) == [tokenizer.decode([i]) for i in ids]
