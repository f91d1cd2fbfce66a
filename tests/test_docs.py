"""The documentation: its site builds without a broken link and loads nothing from elsewhere, its examples run."""

import importlib.util
import re
from pathlib import Path

import pytest

import t3d
from t3d import DecodingConfig, Engine
from t3d.errors import T3DError
from t3d.models import FAMILIES
from t3d.tasks import TaskConfig, get_task
from tests.conftest import make_model
from tests.engine.reference import reference_decode
from tests.serve.browser import CHROMIUM, Browser

ROOT = Path(__file__).parents[1]


def example(name: str) -> str:
    """The code of CONTRIBUTING.md that begins with this file's name."""
    found = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    return next(code for code in found if code.startswith(f"# {name}\n"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Its folder."""
    pytest.importorskip("mkdocstrings", reason="needs t3d[docs]")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))  # a warning ends it
    return folder


def test_the_site(site):
    pages = {path.relative_to(site).as_posix(): path.read_text() for path in site.rglob("*.html")}
    for name, page in pages.items():
        loaded = re.findall(r"<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=\"(?:https?:)?//[^\"]*", page)
        assert not loaded, name
    for name in t3d._EXPORTS:
        assert f'id="t3d.{name}"' in pages["reference/python.html"], name
    for command in ("run", "serve", "import"):
        assert f'id="t3d-{command}"' in pages["reference/commands.html"]
    assert "--prefix-cache" in pages["reference/commands.html"]
    assert "how little a likely token counts" in pages["contributing.html"]


def test_no_page_is_wider_than_its_screen(site):
    if CHROMIUM is None:
        pytest.skip("needs Chromium (Debian package `chromium`)")
    with Browser() as browser:
        for page in site.rglob("*.html"):
            for width, mobile in ((1280, False), (390, True)):
                browser.screen(width, 900, mobile=mobile)
                browser.open(f"file://{page}")
                wide = browser.run("document.scrollingElement.scrollWidth")
                assert wide <= width, f"{page.relative_to(site)}: {wide} of {width} pixels"


def test_links_work_on_a_code_host_too():
    """There, the pages that only the site has are not; those of docs/reference are for the site."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "guides").glob("*.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#\s:]+)[)#]", page.read_text())]
    assert len(links) > 100
    for page, link in links:
        assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_a_task_of_one_s_own(tmp_path):
    (tmp_path / "json_answers.py").write_text(example("json_answers.py"))
    (tmp_path / "data.jsonl").write_text('{"question": "a and b of 1, 2?", "answer": "{\\"a\\": 1, \\"b\\": 2}"}\n')
    task = get_task(TaskConfig(name=str(tmp_path / "json_answers.py"), path=str(tmp_path / "data.jsonl")))
    [problem] = task.problems("train")
    assert task.prompt_text(problem) == "a and b of 1, 2?\nAnswer in JSON and write nothing else."
    assert task.judge('{"b": 2,\n"a": 1}', problem).correct
    assert task.judge('{"a": 1}', problem).reason == "another value"
    for broken in ("{", "", "[" * 100_000):
        assert task.judge(broken, problem).reason.startswith("not JSON: ")


@pytest.mark.parametrize("shift", [0, 1])
def test_a_family_of_one_s_own(tmp_path, monkeypatch, shift):
    """It decodes as a plain sampler with its own class would."""
    file = tmp_path / "block_mistral.py"
    file.write_text(example("src/t3d/models/block_mistral.py"))
    spec = importlib.util.spec_from_file_location("block_mistral", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(FAMILIES, "block_mistral", module.BlockMistralForCausalLM)
    model = make_model(family="block_mistral", logits_shift=shift)
    prompt, config = [7, 8, 9, 10, 11], DecodingConfig(steps=2, max_tokens=10, stop_ids=(1, 5))
    [found] = Engine(model).generate([prompt], config)
    ids, steps, *_ = reference_decode(model, prompt, config, found.seed, (1, 5))
    assert (found.response_ids, found.step_map) == (ids, steps)
    with pytest.raises(T3DError, match="sliding_window is not supported"):
        module.BlockMistralConfig(sliding_window=8).check()


def test_what_type_checkers_see_is_what_there_is():
    shown = re.findall(r"import (\w+) as \1$", Path(t3d.__file__).read_text(), re.MULTILINE)
    assert set(shown) == set(t3d._EXPORTS)
    for name in t3d._EXPORTS:
        assert getattr(t3d, name)


def test_the_tour(tmp_path, monkeypatch):
    """The notebook runs, in a small size, and what is kept in it is from its own size."""
    nbclient = pytest.importorskip("nbclient", reason="needs t3d[test]")
    nbformat = pytest.importorskip("nbformat", reason="needs t3d[test]")
    for name, value in {"T3D_TOUR_TRAIN": "8", "T3D_TOUR_STEPS": "2", "T3D_TOUR_EVAL": "4"}.items():
        monkeypatch.setenv(name, value)
    kept = nbformat.read(ROOT / "docs" / "tour.ipynb", 4)
    made = nbformat.from_dict(kept)
    nbclient.NotebookClient(made, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()

    def shown(notebook):
        return [o.output_type for cell in notebook.cells for o in cell.get("outputs", ()) if o.output_type != "stream"]

    assert shown(made) == shown(kept) == ["execute_result", "display_data", "execute_result"]
    assert "60 steps in" in str(kept)
