"""What is installed: the wheel is built as a release builds it, and the recipes in it are taken out again."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from t3d.errors import T3DError
from t3d.recipes import copy, recipes

ROOT = Path(__file__).parents[1]


def test_the_wheel_has_all_that_is_needed_and_no_more(tmp_path):
    pytest.importorskip("build", reason="needs t3d[test]")
    source = tmp_path / "source"
    for name in ("src", "recipes", "tests"):
        leftovers = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=leftovers)
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)  # the wheel from the source distribution
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel] = tmp_path.glob("t3d-*.whl")
    found = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = ROOT / "src" / "t3d"
    files = [path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    files += [package / "assets" / path.relative_to(ROOT) for path in (ROOT / "recipes").rglob("*.yaml")]
    assert found == {path.relative_to(ROOT / "src").as_posix() for path in files}
    assert {"t3d/py.typed", "t3d/assets/recipes/demo.yaml", "t3d/assets/teacher/model.safetensors"} <= found


def test_recipes_are_copied_with_what_they_build_on(tmp_path):
    assert copy("smollm2/study", tmp_path) == [tmp_path / "smollm2/student.yaml", tmp_path / "smollm2/study.yaml"]
    [base] = re.findall(r"^recipe: (.*)$", (tmp_path / "smollm2/study.yaml").read_text(), re.MULTILINE)
    assert (tmp_path / "smollm2" / base).is_file()
    for name in recipes():
        assert "results: " not in copy(name, tmp_path)[-1].read_text(), "it names a page of the repository"
    written = {path.relative_to(tmp_path).with_suffix("").as_posix() for path in tmp_path.rglob("*.yaml")}
    assert written == set(recipes())


def test_every_recipe_begins_with_what_it_is_for():
    for name, text in recipes().items():
        first = (ROOT / "recipes" / f"{name}.yaml").read_text().partition("\n")[0]
        assert first == f"# {text}" or first == f"# {text}:", name
        assert first[-1] in ".:", f"{name}: its first line stands alone in `t3d recipes list`"


def test_a_copy_replaces_nothing_of_yours(tmp_path):
    copy("study", tmp_path)
    copy("study", tmp_path)  # the same once more
    (tmp_path / "study.yaml").unlink()
    (tmp_path / "demo.yaml").write_text("mine")
    with pytest.raises(T3DError, match=r"demo.yaml is there and differs; --force replaces it"):
        copy("study", tmp_path)
    assert (tmp_path / "demo.yaml").read_text() == "mine"
    assert not (tmp_path / "study.yaml").exists()
    copy("study", tmp_path, force=True)
    assert (tmp_path / "demo.yaml").read_text().startswith("# The whole method")
    with pytest.raises(T3DError, match=r"no recipe 'stduy' .did you mean 'study'"):
        copy("stduy", tmp_path)


def test_the_commands(tmp_path, capsys, monkeypatch):
    from t3d.cli import main

    monkeypatch.chdir(tmp_path)
    for arguments, said in (
        (["recipes", "list"], "demo-teacher "),
        (["recipes", "copy", "demo"], "recipes/demo.yaml"),
    ):
        with pytest.raises(SystemExit) as done:
            main(arguments)
        assert (done.value.code, said in capsys.readouterr().out) == (0, True)
