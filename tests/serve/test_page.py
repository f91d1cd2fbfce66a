"""The playground in a real browser: what it shows is what the API says, by hand and by keyboard, on any screen."""

import itertools
import json
import re

import httpx2
import pytest

from tests.serve.browser import CHROMIUM, Browser

HOSTILE = "<img src=x onerror=\"document.title='pwned'\"></script>&lt;"


def test_the_page_needs_nothing_else(server):
    response = httpx2.get(server.url)
    html, policy = response.text, response.headers["content-security-policy"]
    assert len(html) < 60_000
    assert re.findall(r"""\s(?:src|srcset|style|on\w+)\s*=\s*["']|@import|url\(|https?:|innerHTML|eval\(""", html) == []
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs Chromium (Debian package `chromium`)")
    with Browser() as browser:
        yield browser


@pytest.fixture
def page(browser, server):
    """The playground, freshly loaded; in the end nothing may have gone wrong in it."""
    browser.complaints.clear()
    browser.screen(1200, 900)
    browser.open(server.url)
    browser.wait("state.models.length")
    browser.run("document.getElementById('compare').click()")  # two models are served, so it compares
    yield browser
    assert browser.complaints == []


def ask(page, text: str, pace: int = 0, tokens: int = 60) -> None:
    page.run(
        f"$('max_tokens').value = {tokens}; $('pace').value = '{pace}'; $('prompt').value = ''; $('prompt').focus()"
    )
    page.type(text)
    page.key("Enter", modifiers=2)


def done(page) -> None:
    page.wait("!state.running && !state.playing && received() > 0")


def choose(page, what: str, name: str, **settings) -> None:
    """Select a strategy or a flight of the first side, and its settings."""
    script = """(() => { const f = state.panes[0].root.querySelector("%s"); f.value = "%s";
        for (const e of ["input", "change"]) f.dispatchEvent(new Event(e)); })()"""
    page.run(script % (f".{what}", name))
    knob = page.run("state.panes[0].strategy.knob?.name")
    for setting, value in settings.items():
        page.run(script % (".knob-input" if setting == knob else f"[name={setting}]", value))


def state_of(page) -> list[list[int]]:
    return page.run("state.panes[0].blocks.map(b => [b.start, b.end])")


def stream(server, text: str, **settings) -> tuple[list[dict], dict]:
    """(the steps, the details) of a streamed answer."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 60, "seed": 0}
    body |= {"return_details": True, "stream": True, "stream_steps": True} | settings
    lines = httpx2.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).text.split("\n\n")
    told = [json.loads(line[6:])["choices"][0].get("t3d") or {} for line in lines if line.startswith("data: {")]
    return [t for t in told if "places" in t], told[-1]


def answer(server, text: str, tokens: int = 60, **settings) -> dict:
    body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": tokens, "seed": 0}
    body |= {"return_details": True} | settings
    return httpx2.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()["choices"][0]["t3d"]


SHOWN = """state.panes[0].spans.filter(s => !s.hidden && !s.className.includes('after')).map(s =>
    [s.textContent, s.style.getPropertyValue('--t'), s.classList.contains('masked')])"""


def test_it_shows_what_the_api_answers(page, server):
    """Tokens, the colour of the step that wrote each, and the numbers; text is never markup."""
    ask(page, "Hello " + HOSTILE)
    done(page)
    expected = answer(server, "Hello " + HOSTILE)
    shown = page.run(SHOWN)
    visible = [text.replace("\n", "↵\n") or "·" for text in expected["tokens"]]
    assert [text for text, _, _ in shown] == visible
    assert [float(t) for _, t, _ in shown] == pytest.approx([step / 3 for step in expected["step_map"]], abs=1e-3)
    assert not any(masked for _, _, masked in shown)
    stats = page.run("['tpf', 'tokens', 'forwards'].map(name => state.panes[0].find(name).textContent)")
    forwards = expected["nfe"]["denoise"]
    assert stats == [f"{len(expected['tokens']) / forwards:.2f}", str(len(expected["tokens"])), str(forwards)]
    colours = page.run("[...new Set(state.panes[0].spans.map(s => getComputedStyle(s).backgroundColor))].length")
    assert colours >= 4
    assert page.run("document.title") == "t3d playground"


def test_tokens_are_text(page):
    """Even if a model writes markup."""
    told = {"step": 0, "places": [0, 1, 2, 3], "tokens": [HOSTILE] * 4, "token_ids": [1] * 4, "confidence": [1] * 4}
    told |= {"forward": 1, "block": 0}
    chunks = [{"block_size": 4, "steps": 1, "prompt_tokens": 4, "tail": 0}, told]
    script = "state.panes[0].take({choices: [{t3d: %s}]})"
    for chunk in chunks:
        page.run(script % json.dumps(chunk))
    page.run("state.shown = 1; draw()")
    assert page.run("state.panes[0].text.querySelectorAll('img, script').length") == 0
    assert page.run("state.panes[0].spans[0].textContent") == HOSTILE
    assert page.run("document.title") == "t3d playground"


def test_a_block_settles_step_by_step(page):
    """Played slowly: what is not decided yet is masked, and only in the block in flight."""
    ask(page, "Hello", pace=60)
    page.wait("state.shown >= 6 && state.shown < 20")
    page.run("state.playing = false")
    page.wait("!state.running")
    page.run("state.shown = 6; draw()")
    masked = page.run("state.panes[0].spans.map(s => s.hidden ? null : s.classList.contains('masked'))")
    visible = [m for m in masked if m is not None]
    first = page.run("state.panes[0].blocks[0].end")
    assert len(visible) in (first + 4, first + 8)
    assert 1 <= sum(visible) <= 3
    assert not any(visible[:first])  # an earlier block is whole
    page.run("$('time').focus()")
    page.key("End")
    page.wait("!state.panes[0].spans.some(s => s.classList.contains('masked'))")
    assert page.run("$('clock').textContent").startswith(str(page.run("received()")))


def test_steps_and_strategy_change_the_answer(page, server):
    page.run("state.panes[0].find('steps-input').focus()")
    page.key("Home")
    assert page.run("state.panes[0].find('steps-value').textContent") == "1"
    ask(page, "Hello")
    done(page)
    assert float(page.run("state.panes[0].find('tpf').textContent")) > 3
    page.run("""(() => { const s = state.panes[0].find('strategy'); s.value = 'low_confidence_dynamic';
        s.dispatchEvent(new Event('change')); const k = state.panes[0].find('knob-input'); k.value = 0.3;
        k.dispatchEvent(new Event('input')); })()""")
    assert page.run("[state.panes[0].find('steps-field').hidden, state.panes[0].find('knob-value').textContent]") == [
        True,
        "0.30",
    ]
    ask(page, "Hello")
    done(page)
    expected = answer(server, "Hello", strategy="low_confidence_dynamic", threshold=0.3)
    assert page.run("state.panes[0].done.token_ids") == expected["token_ids"]


def test_guidance_changes_the_answer(page, server):
    page.run("$('guidance').value = 2")
    ask(page, "Hello")
    done(page)
    guided = answer(server, "Hello", guidance_scale=2)["token_ids"]
    assert page.run("state.panes[0].done.token_ids") == guided != answer(server, "Hello")["token_ids"]


def test_several_blocks_settle_at_once(page, server):
    """After each forward the page has what the stream said; blocks that are not final look different."""
    choose(page, "strategy", "low_confidence_dynamic", threshold=0.01, floor="one")
    choose(page, "flight", "multi_block", blocks_in_flight=4, enter=0, force=0.25)
    ask(page, "Hello")
    done(page)
    settings = {"strategy": "low_confidence_dynamic", "threshold": 0.01, "blocks_in_flight": 4, "enter": 0.0}
    steps, last = stream(server, "Hello", **settings)
    assert any(a["forward"] == b["forward"] and a["block"] < b["block"] for a, b in itertools.pairwise(steps))
    assert page.run("state.panes[0].done.token_ids") == last["token_ids"]
    assert page.run("received()") == last["nfe"]["denoise"]
    final_from = {}  # block -> the forward after which nothing of it or of those before is masked
    for forward in range(1, last["nfe"]["denoise"] + 1):
        page.run(f"state.shown = {forward}; draw()")
        want = {place for s in steps if s["forward"] <= forward for place in s["places"]}
        shown = page.run("""state.panes[0].spans.map(s => s.hidden || s.classList.contains('masked') ? null
            : [s.textContent, s.classList.contains('open')])""")
        assert {p for p, s in enumerate(shown) if s} == want
        blocks = state_of(page)
        undecided = [b for b, places in enumerate(blocks) if any(p not in want for p in range(*places))]
        final_from |= {b: final_from.get(b, forward) for b in range(min(undecided, default=len(blocks)))}
        n = len(last["token_ids"])
        for b, (start, end) in enumerate(blocks):
            for place in range(start, min(end, n)):
                if shown[place]:
                    assert shown[place][1] == (final_from.get(b, 1 << 30) > forward), (forward, b)


def test_what_was_taken_back_is_seen(page):
    """A token that becomes a mask again, and one that is written anew, each at its forward."""
    common = {"block": 0, "token_ids": [1], "confidence": [0.5]}
    chunks = [
        {"block_size": 2, "steps": 2, "prompt_tokens": 2, "tail": 0},
        common | {"forward": 1, "step": 0, "places": [0], "tokens": ["a"]},
        common | {"forward": 2, "step": 1, "places": [0, 1], "tokens": [None, "b"], "confidence": [0, 0.5]},
        common | {"forward": 4, "step": 2, "places": [0], "tokens": ["c"]},
    ]
    for chunk in chunks:
        page.run(f"state.panes[0].take({{choices: [{{t3d: {json.dumps(chunk)}}}]}})")
    looks = "state.panes[0].spans.map(s => s.classList.contains('masked') ? '' : s.textContent)"
    seen = []
    for forward in range(5):
        page.run(f"state.shown = {forward}; draw()")
        seen.append(page.run(looks))
    assert seen == [["", ""], ["a", ""], ["", "b"], ["", "b"], ["c", "b"]]
    page.run("state.shown = 2; draw(); state.panes[0].choose(0)")
    assert page.run("state.panes[0].spans[0].classList.contains('back')")
    assert "taken back" in page.run("state.panes[0].find('about').textContent")
    page.run("state.shown = 4; draw(); state.panes[0].choose(0)")
    assert page.run("state.panes[0].find('about').textContent").endswith("changed 2 times")


def test_every_setting_of_policies_and_flights_is_offered(page, server):
    """And is what is asked; a flight's setting does not follow into another flight."""
    for what, path in (("strategy", "strategies"), ("flight", "flights")):
        for component in httpx2.get(f"{server.url}/v1/{path}").json()["data"]:
            choose(page, what, component["id"])
            body = page.run("state.panes[0].body('x')")
            assert body[what] == component["id"]
            for setting in component["settings"]:
                assert body[setting["name"]] == setting["default"]
                if setting["name"] != (component.get("knob") or {}).get("name"):
                    assert page.run(f"!!state.panes[0].root.querySelector('[name={setting['name']}]').offsetParent")
    assert "blocks_in_flight" not in page.run("state.panes[0].body('x')")


def test_two_models_side_by_side(page):
    page.run("document.getElementById('compare').click()")
    ask(page, "Hello")
    done(page)
    assert page.run("state.panes.map(p => p.find('model').value)") == ["tiny", "broken"]
    tpf = [float(x) for x in page.run("state.panes.map(p => p.find('tpf').textContent)")]
    assert tpf[0] < 1.01
    assert tpf[1] > 3  # the second begins with one step
    tops = page.run("state.panes.map(p => p.root.getBoundingClientRect().top)")
    assert tops[0] == tops[1]
    assert all(rate > 0 for rate in page.run("state.panes.map(p => parseFloat(p.find('tps').textContent))"))
    page.run("$('turns').checked = true")
    ask(page, "buzz")  # the second model fails at a z
    done(page)
    assert "logits are not numbers" in page.run("state.panes[1].find('error').textContent")
    assert page.run("state.panes[0].done !== null")


def test_the_keyboard_is_enough(page):
    ask(page, "Hello", tokens=12000)
    page.wait("received() > 20")
    page.key("Escape")
    page.wait("!state.running")
    assert page.run("$('run').disabled") is False
    page.run("state.panes[0].text.focus()")
    page.key("ArrowRight")
    page.key("ArrowRight")
    assert page.run("state.panes[0].find('about').textContent").startswith("token 2 ")
    page.key("ArrowLeft")
    assert page.run("state.panes[0].find('about').textContent").startswith("token 1 ")
    unnamed = page.run("""[...document.querySelectorAll('button, input, select, textarea, [tabindex]')].filter(e =>
        e.offsetParent && !(e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim())).length""")
    assert unnamed == 0


def test_what_is_wrong_is_shown(page):
    ask(page, "Hello", tokens=99999)
    page.wait("!state.running")
    assert "maximum context length is 16384" in page.run("state.panes[0].find('error').textContent")
    assert page.complaints[0].startswith("Failed to load resource")  # the browser's own note of the 400
    page.complaints.clear()


@pytest.mark.parametrize(("width", "height"), [(360, 740), (820, 1100), (1600, 900)])
def test_it_fits_any_screen(page, width, height):
    page.screen(width, height, mobile=width < 500)
    page.run("document.getElementById('compare').click()")
    ask(page, "Hello")
    done(page)
    wide = f"""[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > {width})
        .map(e => e.outerHTML.slice(0, 80))"""
    assert page.run("document.documentElement.scrollWidth") <= width, page.run(wide)
    small = page.run("[...document.querySelectorAll('button, select')].filter(e => e.offsetHeight < 40).length")
    assert small == 0
    stacked = page.run(
        "state.panes[1].root.getBoundingClientRect().left === state.panes[0].root.getBoundingClientRect().left"
    )
    assert stacked == (width < 700)


def test_light_and_dark(page):
    ask(page, "Hello")
    done(page)
    seen = []
    for dark in (False, True):
        page.screen(1200, 900, dark=dark)
        style = "(e => [getComputedStyle(e).backgroundColor, getComputedStyle(e).color])"
        seen.append([page.run(f"{style}(document.body)"), page.run(f"{style}(state.panes[0].spans[0])")])
    assert seen[0][0][0] != seen[1][0][0]
    assert seen[0][1][0] != seen[1][1][0]
    assert seen[0][0][0] == seen[0][0][1] or seen[0][0][1] != seen[1][0][1]


def test_a_server_with_a_key(browser, start, tiny, tmp_path_factory):
    key = tmp_path_factory.mktemp("key") / "key"
    key.write_text("sk-1")
    server = start(str(tiny), "--api-key-file", str(key))
    browser.open(server.url)
    browser.wait("!$('error').hidden")
    assert "wants an API key" in browser.run("$('error').textContent")
    assert browser.run("document.activeElement.id") == "key"
    browser.type("sk-1")
    browser.key("Tab")
    browser.wait("state.models.length")
    ask(browser, "Hello")
    done(browser)
    assert browser.run("state.panes[0].done !== null")
    assert browser.run("Object.keys(localStorage).length + Object.keys(sessionStorage).length") == 0
    browser.complaints.clear()
