"""The engine decodes LLaDA2 as its published code does, token for token and step for step (see published/README)."""

import json
from pathlib import Path

import pytest

from t3d.decoding import DecodingConfig, laws
from t3d.engine import Engine
from t3d.models import load_model

FOLDER = Path(__file__).parent / "published" / "llada2_moe"


def runs(file: str, edited: bool) -> list:
    found = json.loads((FOLDER / file).read_text())["runs"]
    return [run for run in found if (run["settings"].get("editing_threshold", 1) < 1) == edited]


@pytest.fixture(scope="module")
def model():
    return load_model(FOLDER)[0]


def check(model, run, **settings):
    block = run["settings"]["block_length"]
    config = DecodingConfig(block_size=block, max_tokens=len(run["ids"]), stop_ids=(112,), **settings)
    trajectory = Engine(model).generate([run["prompt"]], config)[0]
    assert trajectory.response_ids == run["ids"]
    assert trajectory.step_map == run["steps"]


@pytest.mark.parametrize("run", runs("runs.json", False), ids=str)
def test_llada2_0(model, run):
    settings = run["settings"]
    check(
        model, run, strategy="low_confidence_dynamic", floor="schedule",
        steps=settings["steps"], threshold=settings["threshold"],
    )  # fmt: skip


@pytest.mark.parametrize("run", runs("runs21.json", False), ids=str)
def test_llada2_1_without_editing(model, run):
    check(model, run, strategy="low_confidence_dynamic", threshold=run["settings"]["threshold"])


@pytest.mark.parametrize("run", runs("runs21.json", True), ids=str)
def test_llada2_1_with_editing(model, run, monkeypatch):
    """But for one thing: t3d changes a token at most 8 times, and random weights change theirs without end."""
    settings = run["settings"]
    if settings["max_post_steps"] > 2:
        monkeypatch.setattr(laws, "MOST_REVISIONS", 1000)
    check(
        model, run, strategy="token_editing", edit_steps=settings["max_post_steps"],
        draft_threshold=settings["threshold"], edit_threshold=settings["editing_threshold"],
    )  # fmt: skip
