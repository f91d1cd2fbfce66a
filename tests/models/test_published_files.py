"""A published folder, loaded and saved: the same keys, names of weights and bits."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from t3d.blocks import Layout
from t3d.models import FAMILIES, save_model
from t3d.models.load import load_tokenizer, load_weights

PUBLISHED = Path(__file__).parent / "published"
NAMES = ("llada2_moe", "fast_dllm_v2")


def loaded(folder):
    family = json.loads((folder / "config.json").read_text())["model_type"]
    return load_weights(FAMILIES[family], folder, folder, device="cpu")


@pytest.mark.parametrize("name", NAMES)
def test_logits(name):
    model = loaded(PUBLISHED / name)
    data = json.loads((PUBLISHED / name / "runs.json").read_text())["logits"]
    ids, shift = torch.tensor([data["ids"]]), model.config.logits_shift
    place, zeros = torch.arange(ids.shape[1])[None], torch.zeros_like(ids)
    with torch.no_grad():
        found = model(ids, Layout(zeros, zeros, place, model.config.block_size).boolean_mask(), place).logits[0]
    expected = torch.tensor(data["values"])
    torch.testing.assert_close(found[shift:], expected[: len(expected) - shift], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [None, 16])
@pytest.mark.parametrize("name", NAMES)
def test_what_goes_in_comes_out(tmp_path, name, size):
    model, tokenizer = loaded(PUBLISHED / name), load_tokenizer(PUBLISHED / name)
    key = "bd_size" if name == "fast_dllm_v2" else "block_size"
    model.config.block_size = size or model.config.block_size
    model.config.mask_token_id = tokenizer.convert_tokens_to_ids(model.config.mask_tokens[0])  # as loading finds it
    save_model(model, tmp_path / "m", tokenizer, source=PUBLISHED / name)
    before, after = (load_file(f / "model.safetensors") for f in (PUBLISHED / name, tmp_path / "m"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[k], weight) and after[k].dtype == weight.dtype for k, weight in before.items())
    before, after = (json.loads((f / "config.json").read_text()) for f in (PUBLISHED / name, tmp_path / "m"))
    before |= {key: size} if size else {}
    assert {k for k, v in before.items() if after.get(k) != v} == {"auto_map", "transformers_version"}
    assert not {"block_size", "mask_token_id", "logits_shift"} & (after.keys() - before.keys())
    assert (tmp_path / "m" / "tokenizer.json").read_bytes() == (PUBLISHED / name / "tokenizer.json").read_bytes()


def test_without_a_tokenizer_the_mask_is_written(tmp_path):
    model = loaded(PUBLISHED / "llada2_moe")
    model.config.mask_token_id = 115
    save_model(model, tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["mask_token_id"] == 115
