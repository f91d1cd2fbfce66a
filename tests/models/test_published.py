"""What the public code of other families makes of small weights of the published layout: see published/README.md."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from t3d.blocks import Layout
from t3d.errors import T3DError
from t3d.models import FAMILIES, load_model, save_model, stop_ids
from t3d.models.convert import convert
from t3d.models.load import generation_ids
from tests.models.helpers import plain_class

FOLDERS = sorted(path.parent for path in Path(__file__).parent.glob("published/*/config.json"))
EVERY = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


def golden(folder):
    """`(ids (1, n), logits (n, vocab))`; published are those of the rows, ours those of the tokens at the rows."""
    found = json.loads((folder / "runs.json").read_text())["logits"]
    return torch.tensor([found["ids"]]), torch.tensor(found["values"])


@torch.no_grad()
def logits(model, ids):
    length = ids.shape[1]
    block, zeros = length if model.config.attention == "full" else model.config.block_size, torch.zeros_like(ids)
    layout = Layout(zeros, zeros, torch.arange(length)[None], block)
    return model(ids, layout.boolean_mask(), layout.position).logits[0]


def weights(folder):
    return {name: weight for path in folder.glob("*.safetensors") for name, weight in load_file(path).items()}


@EVERY
def test_logits_are_those_of_the_public_code(folder):
    model, _ = load_model(folder)
    ids, expected = golden(folder)
    if model.config.logits_shift:
        expected = torch.cat([expected[:1], expected[:-1]])
    difference = (logits(model, ids) - expected).abs().max().item()
    print(f"{folder.name}: largest difference {difference:.1e}, logits up to {expected.abs().max():.1f}")
    assert difference < 1e-4 * expected.abs().max()


@EVERY
def test_what_is_saved_is_what_was_published(tmp_path, folder):
    model, tokenizer = load_model(folder)
    save_model(model, tmp_path / "m", tokenizer)
    published, saved = weights(folder), weights(tmp_path / "m")
    assert published.keys() == saved.keys()
    assert all(torch.equal(weight, saved[name]) for name, weight in published.items())
    config, ours = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "m"))
    changed = {key for key, value in config.items() if key not in ours or ours[key] != value}
    assert changed <= {"transformers_version", "auto_map"}  # auto_map: of code that is not in the folder
    plain = plain_class(config["model_type"]).config_class()
    theirs = {"architectures", "dtype", "torch_dtype", "rope_theta", "rope_scaling", "rope_parameters"}
    assert set(ours) - set(config) <= theirs | set(plain.to_dict())
    again, _ = load_model(tmp_path / "m")
    ids, _ = golden(folder)
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert stop_ids(again) == stop_ids(model)
    assert again.config.mask_token_id == model.config.mask_token_id


@EVERY
def test_another_block_size_is_saved(tmp_path, folder):
    model, tokenizer = load_model(folder)
    model.config.block_size = 2
    save_model(model, tmp_path / "m", tokenizer)
    assert load_model(tmp_path / "m")[0].config.block_size == 2


@EVERY
def test_without_its_tokenizer_a_model_is_saved_with_its_mask(tmp_path, folder):
    model, _ = load_model(folder)
    save_model(model, tmp_path / "m")
    assert load_model(tmp_path / "m")[0].config.mask_token_id == model.config.mask_token_id


@pytest.mark.parametrize(
    ("name", "attention", "anchor", "block", "window", "mask", "stops"),
    [
        ("a2d_bd3lm", "block", "prompt", 32, 32, 125, (122, 120)),
        ("a2d_mdlm", "full", "prompt", None, 32, 125, (122, 120)),
        ("dream", "full", "prompt", None, None, 123, (118, 122)),
        ("llada", "full", "prompt", 32, 32, 124, (117, 125)),
        ("llada2_moe", "block", "start", 32, 32, 115, (112, 114)),
        ("fast_dllm_v2", "block", "start", 32, 32, 117, (113, 111)),
    ],
)
def test_what_the_files_do_not_say_is_known(name, attention, anchor, block, window, mask, stops):
    folder = Path(__file__).parent / "published" / name
    model, tokenizer = load_model(folder)
    config = model.config
    assert (config.attention, config.anchor, config.block_size, config.window) == (attention, anchor, block, window)
    assert (config.mask_token_id, stop_ids(model)) == (mask, stops)
    assert generation_ids(folder)[1:] == (stops, window)
    assert len(tokenizer) == max(tokenizer.get_vocab().values()) + 1


@pytest.mark.parametrize("name", ["a2d_bd3lm", "llada", "llada2_moe"])
def test_a_mask_that_only_a_name_says(tmp_path, name):
    """`<|mask|>`, `<|mdm_mask|>`: tokens of the vocabulary, while neither file says that one is the mask."""
    shutil.copytree(Path(__file__).parent / "published" / name, tmp_path / "m")
    expected = load_model(tmp_path / "m")[0].config.mask_token_id
    for file, key in (("config.json", "mask_token_id"), ("tokenizer_config.json", "mask_token")):
        values = json.loads((tmp_path / "m" / file).read_text())
        values.pop(key, None)
        (tmp_path / "m" / file).write_text(json.dumps(values))
    assert load_model(tmp_path / "m")[0].config.mask_token_id == expected


def test_stop_ids_that_only_the_tokenizer_says(tmp_path):
    shutil.copytree(Path(__file__).parent / "published" / "llada", tmp_path / "m")
    for file in ("config.json", "generation_config.json"):
        values = json.loads((tmp_path / "m" / file).read_text())
        values.pop("eos_token_id")
        (tmp_path / "m" / file).write_text(json.dumps(values))
    assert stop_ids(load_model(tmp_path / "m")[0]) == generation_ids(tmp_path / "m")[1] == (117, 125)


def test_widths_that_llada_derives(tmp_path):
    """`mlp_hidden_size` and `n_kv_heads` may be null: then other keys say them."""
    folder = Path(__file__).parent / "published" / "llada"
    shutil.copytree(folder, tmp_path / "m")
    values = json.loads((folder / "config.json").read_text())
    values |= {"mlp_hidden_size": None, "mlp_ratio": 2, "n_kv_heads": None}
    (tmp_path / "m" / "config.json").write_text(json.dumps(values))
    ids, _ = golden(folder)
    assert torch.equal(logits(load_model(tmp_path / "m")[0], ids), logits(load_model(folder)[0], ids))


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("llada", {"block_type": "sequential"}, "block_type is 'sequential', but of LLaDA only 'llama'"),
        ("llada", {"activation_type": "gelu"}, "activation_type is 'gelu', but of LLaDA only 'silu'"),
        ("dream", {"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window"),
    ],
)
def test_what_cannot_be_had_is_one_line(tmp_path, name, changes, words):
    shutil.copytree(Path(__file__).parent / "published" / name, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text()) | changes
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(T3DError, match=words) as error:
        load_model(tmp_path / "m")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("wrong", ["shift", 128, -1, "<|mask|>", None], ids=str)
@EVERY
def test_a_shift_or_a_mask_that_cannot_be_is_one_line(tmp_path, folder, wrong):
    """To load and to convert. None: no file says which token is the mask."""
    shutil.copytree(folder, tmp_path / "m")
    path, words = tmp_path / "m" / "config.json", f"mask_token_id is {wrong!r}, outside of the vocabulary"
    config = json.loads(path.read_text()) | {"mask_token_id": wrong}
    if wrong == "shift":
        own = FAMILIES[config["model_type"]].config_class.logits_shift
        del config["mask_token_id"]
        config["logits_shift"], words = 1 - own, f"logits_shift is {1 - own}, but model type .* has {own}"
    if wrong is None:
        words = "neither config.json nor the tokenizer says which token is the mask"
        for file in (tmp_path / "m").glob("*token*.json"):
            file.write_text(re.sub(r"<\|(mdm_)?mask\|>|\|<MASK>\|", "<|other|>", file.read_text(), flags=re.I))
        file = tmp_path / "m" / "tokenizer_config.json"
        file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "mask_token"}))
    path.write_text(json.dumps(config))
    for act in (load_model, lambda folder: convert(folder, tmp_path / "out", block_size=8)):
        with pytest.raises(T3DError, match=words) as error:
            act(tmp_path / "m")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@EVERY
def test_conversion_keeps_the_shift(tmp_path, folder):
    """And gives other blocks; a shift that contradicts the family is refused."""
    shift = load_model(folder)[0].config.logits_shift
    convert(folder, tmp_path / "out", block_size=8, shift=bool(shift))
    config = load_model(tmp_path / "out")[0].config
    assert (config.logits_shift, config.block_size) == (shift, 8)
    with pytest.raises(T3DError, match="the shift, which stays so; leave --shift out"):
        convert(folder, tmp_path / "other", block_size=8, shift=not shift)
