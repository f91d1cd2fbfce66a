import json

import pytest
import torch

from t3d.blocks import Layout
from t3d.errors import T3DError
from t3d.models import load_model, save_model, stop_ids
from tests.conftest import make_model


def clean_layout(length, block_size):
    zeros = torch.zeros(1, length, dtype=torch.long)
    return Layout(zeros, zeros, torch.arange(length)[None], block_size)


@pytest.mark.parametrize("tie", [False, True])
def test_save_and_load_give_identical_logits_and_an_ordinary_folder(tmp_path, tie):
    model = make_model(tie=tie)
    save_model(model, tmp_path / "m")
    again, tokenizer = load_model(tmp_path / "m")
    ids = torch.randint(0, 60, (1, 10))
    layout = clean_layout(10, 4)
    for a, b in zip(*(m(ids, layout.boolean_mask(), layout.position).logits for m in (model, again)), strict=True):
        assert torch.equal(a, b)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["architectures"] == ["SDARForCausalLM"]
    assert config["model_type"] == "sdar"
    assert (config["block_size"], config["mask_token_id"]) == (4, 63)
    assert tokenizer is None
    assert not again.training


def test_a_block_does_not_see_later_blocks_but_all_of_itself():
    model = make_model()
    layout = clean_layout(8, 4)
    ids = torch.randint(0, 60, (1, 8))
    logits = model(ids, layout.boolean_mask(), layout.position).logits
    for changed, same in ((5, slice(0, 4)), (3, slice(0, 0))):
        other = ids.clone()
        other[0, changed] = (other[0, changed] + 1) % 60
        moved = (model(other, layout.boolean_mask(), layout.position).logits - logits).abs().amax(-1)[0]
        assert (moved[same] == 0).all()
        assert (moved[changed // 4 * 4 : changed // 4 * 4 + 4] > 0).all()


def test_selected_logits_are_the_full_logits_there():
    model = make_model()
    layout = clean_layout(12, 4)
    ids = torch.randint(0, 60, (1, 12))
    full = model(ids, layout.boolean_mask(), layout.position).logits[0]
    select = torch.tensor([11, 2, 7])
    torch.testing.assert_close(model(ids, layout.boolean_mask(), layout.position, select=select), full[select])


def test_all_stop_ids_of_the_generation_config_count(tmp_path):
    model = make_model()
    model.generation_config.eos_token_id = [7, 9]
    save_model(model, tmp_path / "m")
    assert stop_ids(load_model(tmp_path / "m")[0]) == (7, 9)


def test_the_real_sdar_tokenizer_and_config(shared_data):
    from t3d.models import SDARConfig, load_tokenizer

    tokenizer = load_tokenizer(shared_data / "sdar-4b-chat")
    assert (len(tokenizer), tokenizer.mask_token_id) == (151670, 151669)
    config = SDARConfig.from_pretrained(shared_data / "sdar-4b-chat")
    assert (config.block_size, config.mask_token_id, config.hidden_size) == (4, 151669, 2560)
    assert config.rope_parameters["rope_theta"] == 1000000


def break_truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def break_weights(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.0.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def break_family(folder):
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
        (break_truncate, "cannot load the weights"),
        (break_weights, "model.layers.0.mlp.up_proj.weight"),
        (break_family, "supported: sdar"),
        (lambda f: (f / "config.json").write_text("{"), "configuration"),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
    ],
)
def test_a_folder_that_is_not_a_checkpoint_is_one_clear_line(tmp_path, damage, words):
    save_model(make_model(), tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises(T3DError, match=words) as error:
        load_model(tmp_path / "m")
    assert "\n" not in str(error.value)


def test_missing_folder():
    with pytest.raises(T3DError, match="no such checkpoint folder"):
        load_model("nowhere/at/all")


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path):
    model = make_model()
    save_model(model, tmp_path / "m")

    class Unsavable:
        def save_pretrained(self, folder):
            raise OSError(28, "No space left on device")

    before = sorted(p.name for p in (tmp_path / "m").iterdir())
    with pytest.raises(T3DError, match="No space left"):
        save_model(model, tmp_path / "m", Unsavable())
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
