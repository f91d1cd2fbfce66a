"""The engine decodes every family as its published code does, token for token and step for step."""

import json
import shutil
from math import ceil
from pathlib import Path

import pytest

from t3d.decoding import DecodingConfig
from t3d.engine import Engine
from t3d.models import load_model
from t3d.models.recommended import recommend, recommended

FOLDER = Path(__file__).parent / "published"
DREAM = {"maskgit_plus": "low_confidence_static", "topk_margin": "margin", "entropy": "entropy"}


def dllm(s: dict) -> dict:
    blocks = ceil(s["max_new_tokens"] / s["block_size"])
    return {
        "block_size": s["block_size"],
        "steps": min(ceil(s["steps"] / blocks), s["block_size"]),
        "schedule": "rounded",
    }


def dream(s: dict) -> dict:
    return {"steps": s["steps"], "schedule": "truncated", "strategy": DREAM[s["alg"]]}


def llada(s: dict) -> dict:
    steps = s["steps"] // (s["gen_length"] // s["block_length"])
    return {"block_size": s["block_length"], "steps": min(steps, s["block_length"])}


def llada2(s: dict) -> dict:
    return {
        "block_size": s["block_length"],
        "steps": s["steps"],
        "strategy": "low_confidence_dynamic",
        "threshold": s["threshold"],
        "floor": "schedule",
    }


def llada21(s: dict) -> dict:
    if s["editing_threshold"] >= 1:
        return {"block_size": s["block_length"], "strategy": "low_confidence_dynamic", "threshold": s["threshold"]}
    return {
        "block_size": s["block_length"],
        "strategy": "token_editing",
        "edit_steps": s["max_post_steps"],
        "draft_threshold": s["threshold"],
        "edit_threshold": s["editing_threshold"],
    }


def fast_dllm_v2(s: dict) -> dict:
    return {
        "block_size": s["block_size"],
        "window": s["small_block_size"],
        "flight": "next_token",
        "strategy": "low_confidence_dynamic",
        "threshold": s["threshold"],
    }


SAMPLERS = {
    "a2d_bd3lm/runs.json": dllm,
    "a2d_mdlm/runs.json": dllm,
    "dream/runs.json": dream,
    "llada/runs.json": llada,
    "llada2_moe/runs.json": llada2,
    "llada2_moe/runs21.json": llada21,
    "fast_dllm_v2/runs.json": fast_dllm_v2,
}


@pytest.mark.parametrize("file", SAMPLERS)
def test_the_published_sampler(file):
    model, _ = load_model(FOLDER / Path(file).parent, device="cpu")
    runs = json.loads((FOLDER / file).read_text())["runs"]
    for run in runs:
        settings = SAMPLERS[file](run["settings"])
        most = run["settings"].get("max_new_tokens") or run["settings"].get("gen_length")
        if "fast_dllm" in file or "llada2" in file:  # they count blocks from position 0, and end with one
            most = len(run["ids"])
        config = DecodingConfig(max_tokens=most, ignore_eos=True, **settings)
        t = Engine(model).generate([run["prompt"]], config)[0]
        steps = run["steps"]
        if settings.get("flight") == "next_token":  # a first token by the pass before its block has step -1 there
            size, first = settings["block_size"], len(run["prompt"])
            begun = {(first + i) // size for i, step in enumerate(steps) if step == -1}
            steps = [s if s is None else s + ((first + i) // size in begun) for i, s in enumerate(steps)]
        written = [i for i, step in enumerate(steps) if step is not None]  # it may stop inside a block
        assert len(written) > 0
        assert [t.response_ids[i] for i in written] == [run["ids"][i] for i in written], run["settings"]
        assert [t.step_map[i] for i in written] == [steps[i] for i in written], run["settings"]
    assert len(runs) >= 12


@pytest.mark.parametrize("file", [file for file in SAMPLERS if "runs21" not in file])
def test_a_checkpoint_that_recommends_nothing_is_decoded_as_published(file, tmp_path):
    """The settings of a run of the published code, but for how long blocks are and how many steps they have."""
    shutil.copytree(FOLDER / Path(file).parent, tmp_path / "m")
    own = recommended(tmp_path / "m")
    sizes = {"block_size", "steps", "window", "threshold"}
    runs = [SAMPLERS[file](run["settings"]) for run in json.loads((FOLDER / file).read_text())["runs"]]
    assert {k: v for k, v in own.items() if k not in sizes} in [{k: r[k] for k in r if k not in sizes} for r in runs]
    assert sizes & set(own) == {"window", "threshold"} & set(runs[0])
    model, _ = load_model(tmp_path / "m", device="cpu")
    assert recommended(model) == own
    recommend(tmp_path / "m", {"steps": 2})
    assert recommended(tmp_path / "m") == {"steps": 2}
    assert Engine(model).generate([[1, 2, 3]], DecodingConfig(**own, max_tokens=8))[0].response_ids
