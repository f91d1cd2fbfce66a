"""What no family of today has: partial rotation, experts in groups with sigmoid gates, shared ones, keys of its own."""

import json
import random

import pytest
import torch
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from t3d.decoding import DecodingConfig
from t3d.engine import Engine
from t3d.models.family import FamilyModel, PublishedConfig
from tests.engine.reference import reference_decode


class Config(PublishedConfig, Glm4MoeConfig):
    model_type = "other_moe"
    keys = {"num_experts": "n_routed_experts", "use_qkv_bias": "attention_bias"}  # noqa: RUF012
    mask_token_id: int | None = 63
    block_size: int = 32


def test_keys_are_read_and_written_as_published(tmp_path):
    published = {"num_experts": 16, "use_qkv_bias": True, "rope_theta": 6e5, "vocab_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(published))
    config = Config.from_pretrained(tmp_path)
    assert (config.n_routed_experts, config.attention_bias) == (16, True)
    assert (config.mask_token_id, config.block_size) == (63, 32)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert published.items() <= written.items()
    assert not {"n_routed_experts", "attention_bias"} & written.keys()
    assert Config.from_pretrained(tmp_path).to_dict() == config.to_dict()


class Glm4Moe(FamilyModel, Glm4MoeForCausalLM):
    pass


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
def test_experts_behind_sigmoid_gates(groups, biases):
    config = Glm4MoeConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=64, max_position_embeddings=128, n_routed_experts=8, num_experts_per_tok=2,
        n_shared_experts=1, moe_intermediate_size=16, n_group=groups, topk_group=(groups + 1) // 2,
        first_k_dense_replace=1, use_qk_norm=True, attention_bias=biases, partial_rotary_factor=0.5,
        routed_scaling_factor=2.5, norm_topk_prob=True, tie_word_embeddings=False, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    config.block_size, config.mask_token_id, config.logits_shift = 4, 63, 0
    torch.manual_seed(0)
    model = Glm4Moe(config).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=2.0 / weight.shape[-1] ** 0.5)
    for layer in model.model.layers[1:]:
        torch.nn.init.normal_(layer.mlp.gate.e_score_correction_bias, std=0.5)
    rng = random.Random(1)
    prompts = [[rng.randrange(6, 60) for _ in range(n)] for n in (3, 4, 9)]
    settings = DecodingConfig(steps=2, max_tokens=8, temperature=1.0)
    for trajectory, prompt in zip(Engine(model).generate(prompts, settings), prompts, strict=True):
        ids, steps, *_ = reference_decode(model, prompt, settings, trajectory.seed, (1,))
        assert (trajectory.response_ids, trajectory.step_map) == (ids, steps)
