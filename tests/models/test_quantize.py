"""Weights of 8 and 4 bits: the layers against plain computations, and models that decode with them."""

import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from t3d import DecodingConfig, Engine
from t3d.errors import T3DError
from t3d.models import FAMILIES, load_model, save_model
from t3d.models.quantize import GROUP, Int4Linear, Int8Linear
from tests.conftest import make_model
from tests.models.helpers import logits

PLAIN = [family for family in FAMILIES if family not in ("sdar_moe", "llada2_moe")]


def made(kind, outputs, inputs, bias, seed):
    torch.manual_seed(seed)
    layer = torch.nn.Linear(inputs, outputs, bias=bias)
    with torch.no_grad():
        layer.weight[:2] *= 100  # outputs of another scale
        layer.weight[-1] = 0
    return layer, kind(layer, torch.float32)


def weight_of(layer):
    """What the quantised layer multiplies by, from its products with unit vectors."""
    return layer.product(torch.eye(layer.in_features, dtype=torch.bfloat16)).float().T


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 6), st.integers(1, 4), st.booleans(), st.integers(1, 80), st.integers(0, 9))
def test_a_layer_is_its_rounded_weights(outputs, inputs, bias, rows, seed):
    """However many rows there are at once: few and many are computed in different ways."""
    for kind in (Int8Linear, Int4Linear):
        layer, small = made(kind, 16 * outputs, GROUP * inputs, bias, seed)
        x = torch.randn(2, rows, layer.in_features).to(torch.bfloat16).float()
        expected = F.linear(x, weight_of(small), layer.bias)
        assert torch.allclose(small(x), expected, rtol=0.02, atol=0.01 * expected.abs().max().item())
        assert small(x).dtype == torch.float32


@pytest.mark.parametrize(("kind", "levels"), [(Int8Linear, 254), (Int4Linear, 15)])
def test_no_weight_is_further_from_its_own_than_half_a_step(kind, levels):
    layer, small = made(kind, 48, 4 * GROUP, False, 0)
    width = layer.in_features if kind is Int8Linear else GROUP
    groups = layer.weight.view(48, -1, width)
    span = 2 * groups.abs().amax(-1) if kind is Int8Linear else groups.amax(-1) - groups.amin(-1)
    step = (span / levels)[..., None].expand_as(groups).reshape(48, -1)
    near = 0.5 * step + 2**-7 * groups.abs().amax(-1, keepdim=True).expand_as(groups).reshape(48, -1)  # and bfloat16
    assert ((weight_of(small) - layer.weight).abs() <= near).all()


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("family", PLAIN)
def test_every_family_decodes_with_few_bits(tmp_path, family, kind):
    save_model(make_model(family=family, hidden=64), tmp_path / "m")
    exact, few = load_model(tmp_path / "m")[0], load_model(tmp_path / "m", quantize=kind)[0]
    assert not [m for m in few.modules() if type(m) is torch.nn.Linear]
    assert few.dtype == exact.dtype
    a, b = logits(exact), logits(few)
    assert not torch.equal(a, b)
    assert (a - b).norm() / a.norm() < {"int8": 0.1, "int4": 0.8}[kind]
    config = DecodingConfig(max_tokens=12, stop_ids=())
    prompts = [[7, 8, 9], list(range(7, 20))]
    alone, together = (Engine(few, max_batch_size=n).generate(prompts, config) for n in (1, 2))
    assert [len(t.response_ids) for t in together] == [len(t.response_ids) for t in alone]


def test_files_in_bfloat16_compute_in_float32_and_keep_the_embedding_as_it_is(tmp_path):
    model = make_model(hidden=64)
    save_model(model.to(torch.bfloat16), tmp_path / "m")
    few = load_model(tmp_path / "m", quantize="int8")[0]
    assert few.get_input_embeddings().weight.dtype == torch.bfloat16
    assert few.model.norm.weight.dtype == torch.float32
    (t,) = Engine(few).generate([[7, 8, 9]], DecodingConfig(max_tokens=8, stop_ids=()))
    assert len(t.response_ids) >= 8


def test_a_layer_that_four_bits_do_not_fit_has_eight(tmp_path):
    save_model(make_model(hidden=64, intermediate_size=40), tmp_path / "m")
    few = load_model(tmp_path / "m", quantize="int4")[0]
    mlp = few.model.layers[0].mlp
    assert type(mlp.gate_proj) is type(mlp.down_proj) is Int8Linear
    assert type(few.model.layers[0].self_attn.q_proj) is Int4Linear
    assert type(few.lm_head) is Int8Linear


def test_what_cannot_be_quantised_or_saved_is_one_line(tmp_path):
    save_model(make_model(), tmp_path / "m")
    with pytest.raises(T3DError, match="quantised to int8 or int4, not 'int3'"):
        load_model(tmp_path / "m", quantize="int3")
    few = load_model(tmp_path / "m", quantize="int8")[0]
    with pytest.raises(T3DError, match="is not saved"):
        save_model(few, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    assert json.loads((tmp_path / "m" / "config.json").read_text())["model_type"] == "sdar"
    save_model(make_model(family="sdar_moe"), tmp_path / "experts")
    with pytest.raises(T3DError, match="experts of a mixture"):
        load_model(tmp_path / "experts", quantize="int8")
