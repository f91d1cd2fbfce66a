"""From an autoregressive checkpoint to a block-diffusion one, and through the training that it is for."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from t3d.errors import T3DError
from t3d.models import FAMILIES, load_model
from t3d.models.convert import convert
from t3d.models.recommended import recommend, recommended
from t3d.tasks.word_problems import build_tokenizer
from tests.models.helpers import CONVERTED, logits

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}


def autoregressive(folder, kind="qwen3", spare=8, tie=False, eos=None):
    """A checkpoint as transformers writes it; its tokenizer has no mask token."""
    tokenizer = build_tokenizer()
    tokenizer.mask_token = None
    torch.manual_seed(0)
    ids = {"eos_token_id": tokenizer.pad_token_id, "bos_token_id": None, "pad_token_id": None}
    config = AutoConfig.for_model(
        kind, **SHAPE, **ids, vocab_size=len(tokenizer) + spare, tie_word_embeddings=tie, dtype="float32"
    )
    made = AutoModelForCausalLM.from_config(config)
    if eos:
        made.generation_config.eos_token_id = eos
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return made, tokenizer


@pytest.mark.parametrize("spare", [8, 0])
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize(("family", "shift"), CONVERTED)
def test_the_weights_are_the_same_but_for_the_mask(tmp_path, family, shift, tie, spare):
    kind = FAMILIES[family].autoregressive
    source, tokenizer = autoregressive(tmp_path / "ar", kind, spare, tie)
    words = len(tokenizer)
    convert(tmp_path / "ar", tmp_path / "bd", block_size=8, mask_token="<mask>", shift=bool(shift))
    model, again = load_model(tmp_path / "bd")
    assert type(model) is FAMILIES[family]
    assert (model.config.block_size, model.config.mask_token_id, model.config.logits_shift) == (8, words, shift)
    assert again.mask_token_id == words
    assert model.config.vocab_size == words + max(spare, 1)
    for name, weight in source.state_dict().items():
        found = model.state_dict()[name]
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(found[:words], weight[:words])
            torch.testing.assert_close(found[words], weight[:words].mean(0))
        else:
            assert torch.equal(found, weight)
    config = json.loads((tmp_path / "bd" / "config.json").read_text())
    assert config["architectures"] == [type(model).__name__]


def test_a_block_diffusion_checkpoint_gets_other_blocks_and_keeps_all_weights(tmp_path):
    autoregressive(tmp_path / "ar")
    convert(tmp_path / "ar", tmp_path / "b4", block_size=4)
    recommend(tmp_path / "b4", {"block_size": 4, "steps": 2, "temperature": 0.0})
    convert(tmp_path / "b4", tmp_path / "b8", block_size=8)
    before, _ = load_model(tmp_path / "b4")
    after, _ = load_model(tmp_path / "b8")
    assert after.config.block_size == 8
    assert after.config.mask_token_id == before.config.mask_token_id
    assert after.generation_config.eos_token_id == before.generation_config.eos_token_id
    assert recommended(after) == {}  # it was for other blocks
    for name, weight in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], weight)


def test_the_tokenizers_own_mask_token_is_taken_and_all_stop_ids(tmp_path):
    _, tokenizer = autoregressive(tmp_path / "ar", eos=[9, 10])
    tokenizer.mask_token = "<|MASK|>"
    tokenizer.save_pretrained(tmp_path / "ar")
    convert(tmp_path / "ar", tmp_path / "bd")
    model, again = load_model(tmp_path / "bd")
    assert model.config.mask_token_id == again.mask_token_id == tokenizer.convert_tokens_to_ids("<|MASK|>")
    end, pad = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.pad_token_id
    assert model.generation_config.eos_token_id == [end, 9, 10, pad]  # the end of a turn first
    assert model.generation_config.pad_token_id == pad


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: None, "block_size must be at least 1"),
        (
            lambda f: (f / "config.json").write_text('{"model_type": "gpt2"}'),
            "'gpt2' cannot be converted .can: qwen3, ",
        ),
        (lambda f: [p.unlink() for p in f.glob("*token*")], "no tokenizer"),
        (lambda f: (f / "model.safetensors").write_bytes(b"short"), "model.safetensors"),
    ],
)
def test_what_cannot_be_converted(tmp_path, damage, words):
    autoregressive(tmp_path / "ar")
    damage(tmp_path / "ar")
    with pytest.raises(T3DError, match=words) as error:
        convert(tmp_path / "ar", tmp_path / "bd", block_size=0 if "block_size" in words else 4)
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["ar"]


def test_a_converted_model_is_one_already_loaded(tmp_path):
    autoregressive(tmp_path / "ar")
    model, _ = convert(tmp_path / "ar", tmp_path / "bd")
    assert torch.equal(logits(model), logits(load_model(tmp_path / "bd")[0]))


def test_the_shift_is_a_property_of_the_model(tmp_path):
    autoregressive(tmp_path / "ar")
    convert(tmp_path / "ar", tmp_path / "kept", shift=True)
    convert(tmp_path / "kept", tmp_path / "b8", block_size=8)
    model, _ = load_model(tmp_path / "b8")
    assert (model.config.model_type, model.config.logits_shift) == ("block_qwen3", 1)
    convert(tmp_path / "ar", tmp_path / "bd")
    autoregressive(tmp_path / "moe", "qwen3_moe")
    for name, shift, words in (
        ("bd", True, "made without the shift"),
        ("kept", False, "made with the shift"),
        ("moe", True, "'qwen3_moe' can only be converted without --shift"),
    ):
        with pytest.raises(T3DError, match=words) as error:
            convert(tmp_path / name, tmp_path / "out", shift=shift)
        assert "\n" not in str(error.value)


def test_a_mask_outside_of_the_vocabulary(tmp_path):
    autoregressive(tmp_path / "ar")
    convert(tmp_path / "ar", tmp_path / "bd")
    path = tmp_path / "bd" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mask_token_id": 999}))
    with pytest.raises(T3DError, match="mask_token_id is 999, outside of the vocabulary"):
        convert(tmp_path / "bd", tmp_path / "b8", block_size=8)
