"""Every family: the published layout on disk, and the same decoding and training as any other."""

import json
import random
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from t3d.blocks import geometry
from t3d.decoding import DecodingConfig
from t3d.distill import T3DConfig, T3DTrainer
from t3d.engine import Engine
from t3d.engine.ray_engine import _pack, _unpack
from t3d.errors import T3DError
from t3d.models import FAMILIES, load_model, save_model
from t3d.models.load import cast
from tests.conftest import make_model
from tests.engine.reference import reference_decode
from tests.engine.test_geometry import plain_windows
from tests.models.helpers import VARIANTS, logits, make_variant, plain_class

PUBLISHED = {"sdar": "SDARForCausalLM", "sdar_moe": "SDARMoeForCausalLM"}


def names(folder) -> set[str]:
    found = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= set(file.keys())
    return found


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("shards", ["5GB", "30KB"])
@pytest.mark.parametrize(("family", "shift"), VARIANTS)
def test_save_and_load_give_identical_logits(tmp_path, family, shift, shards, tie):
    model = make_variant(family, shift, tie=tie)
    save_model(model, tmp_path / "m", max_shard_size=shards)
    assert (tmp_path / "m" / "model.safetensors.index.json").exists() == (shards == "30KB")
    again, _ = load_model(tmp_path / "m")
    assert type(again) is FAMILIES[family]
    assert again.config.logits_shift == shift
    assert torch.equal(logits(again), logits(model))
    half, _ = load_model(tmp_path / "m", dtype="bfloat16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("family", ["sdar", "llada2_moe"])
def test_another_dtype_is_the_same_loaded_and_cast(tmp_path, family):
    """As in a file that is loaded, neither rotary frequencies nor what routers add are rounded."""
    model = make_model(family=family, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer += torch.linspace(0, 0.3, len(buffer))
    save_model(model, tmp_path / "m")
    half, _ = load_model(tmp_path / "m", dtype="bfloat16")
    assert torch.equal(logits(cast(model, torch.bfloat16)), logits(half))
    assert torch.equal(logits(_unpack(_pack(half))), logits(half))


@pytest.mark.parametrize("family", PUBLISHED)
def test_files_have_the_published_layout(tmp_path, family):
    """Names and keys as transformers 4, SGLang and LMDeploy look for them."""
    model = make_model(family=family, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    save_model(model, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["model_type"] == family
    assert config["architectures"] == [PUBLISHED[family]]
    assert "logits_shift" not in config
    assert (config["rope_theta"], config["rope_scaling"], config["torch_dtype"]) == (1e6, None, "float32")
    found = names(tmp_path / "m")
    part = "mlp.experts.3." if family == "sdar_moe" else "mlp."
    assert {f"model.layers.1.{part}{name}_proj.weight" for name in ("gate", "up", "down")} <= found
    if family == "sdar_moe":
        assert config["num_experts"] == 4
        assert "model.layers.1.mlp.gate.weight" in found
    assert not any(name.endswith(("gate_up_proj", "experts.down_proj")) for name in found)


@pytest.mark.parametrize(("family", "shift"), VARIANTS)
def test_weights_of_the_autoregressive_model_mean_the_same(tmp_path, family, shift):
    """An independent writer and reader: transformers' own class, whose layout the files have, under a causal mask."""
    plain, ours = plain_class(family), make_variant(family, shift)
    settings = {k: v for k, v in ours.config.to_dict().items() if k not in ("model_type", "architectures")}
    theirs = plain(plain.config_class(**settings)).eval()
    theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(6, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    causal = torch.ones(12, 12, dtype=torch.bool).tril()[None, None]
    with torch.no_grad():
        found, expected = ours(ids, causal, torch.arange(12)[None]).logits, theirs(ids).logits
    torch.testing.assert_close(found[:, shift:], expected[:, : 12 - shift], atol=2e-5, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "m")
    values = json.loads((tmp_path / "m" / "config.json").read_text()) | {"model_type": family, "mask_token_id": 63}
    (tmp_path / "m" / "config.json").write_text(json.dumps(values))
    assert torch.equal(logits(load_model(tmp_path / "m")[0]), logits(ours))


@pytest.mark.parametrize(("family", "shift"), VARIANTS)
def test_selected_logits_are_the_full_logits_there(family, shift):
    model = make_variant(family, shift)
    ids, select = torch.randint(0, 60, (1, 12)), torch.tensor([11, 2, 7])
    full = model(ids).logits[0]
    torch.testing.assert_close(model(ids, select=select - shift), full[select])
    doubled = model(ids, select=select - shift, head=lambda hidden, weight: 2 * hidden @ weight.T)
    torch.testing.assert_close(doubled, 2 * full[select])


@pytest.mark.parametrize("block_size", [1, 4, 8, 32])
@pytest.mark.parametrize(("family", "shift"), VARIANTS)
def test_the_engine_decodes_as_the_plain_sampler(family, shift, block_size):
    model, rng = make_variant(family, shift, block_size=block_size), random.Random(1)
    prompts = [[rng.randrange(6, 60) for _ in range(rng.randint(1, 21))] for _ in range(6)]
    config = DecodingConfig(steps=(block_size + 1) // 2, max_tokens=10, temperature=1.0, stop_ids=(1, 5))
    for trajectory, prompt in zip(Engine(model, max_batch_size=4).generate(prompts, config), prompts, strict=True):
        if geometry(model.config)["anchored"]:
            whole = replace(config, block_size=block_size)
            ids, steps = plain_windows(model, prompt, whole, trajectory.seed, geometry(model.config)["full"])
        else:
            ids, steps, *_ = reference_decode(model, prompt, config, trajectory.seed, (1, 5))
        assert (trajectory.response_ids, trajectory.step_map) == (ids, steps)


@pytest.mark.parametrize("objective", ["t3d", "mean_field"])
@pytest.mark.parametrize(("family", "shift"), VARIANTS)
def test_two_training_steps_change_every_weight_and_can_be_saved(tmp_path, family, shift, objective):
    model, rng = make_variant(family, shift), random.Random(2)
    prompts = [[rng.randrange(6, 60) for _ in range(5)] for _ in range(8)]
    data = Engine(model).generate(prompts, DecodingConfig(max_tokens=24, stop_ids=(1,)))
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    args = T3DConfig(
        output_dir=str(tmp_path / "train"), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2,
        round_interval=1, lr_scheduler_type="constant", use_cpu=True, report_to=[], save_strategy="no",
        objective=objective,
    )  # fmt: skip
    T3DTrainer(model, args, data).train()
    same = [name for name, weight in model.named_parameters() if torch.equal(weight, before[name])]
    assert same == []
    save_model(model, tmp_path / "student")
    assert torch.equal(logits(load_model(tmp_path / "student")[0]), logits(model.eval()))


@pytest.mark.parametrize(("family", "shift"), VARIANTS)
def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path, family, shift):
    """Whatever names the files give to weights."""
    data = Engine(make_variant(family, shift)).generate([[7, 8, 9]] * 8, DecodingConfig(max_tokens=12, stop_ids=()))
    args = {
        "output_dir": str(tmp_path / "train"), "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_steps": 1,
        "lr_scheduler_type": "constant", "use_cpu": True, "report_to": [], "objective": "path",
    }  # fmt: skip
    whole, stopped, further = (make_variant(family, shift) for _ in range(3))
    T3DTrainer(whole, T3DConfig(**args | {"max_steps": 2, "save_strategy": "no"}), data).train()
    T3DTrainer(stopped, T3DConfig(**args | {"max_steps": 1}), data).train()
    T3DTrainer(further, T3DConfig(**args | {"max_steps": 2}), data).train(resume_from_checkpoint=True)
    state = whole.state_dict()
    assert [name for name, weight in further.state_dict().items() if not torch.equal(weight, state[name])] == []


def test_what_no_family_can_do_is_refused(tmp_path):
    save_model(make_model(), tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text())
    for changes, words in (
        ({"model_type": "gpt2"}, "'gpt2' is not supported .supported: sdar, .*llada2_moe.*[)]$"),
        ({"model_type": "qwen3"}, "t3d convert"),
        ({"mask_token_id": None}, "which token is the mask"),
        ({"block_size": 0}, "block_size is 0; it must be"),
        ({"block_size": None}, "block_size is None; it must be"),
        ({"block_size": "4"}, "block_size"),
        ({"mask_token_id": 64}, "mask_token_id is 64, outside of the vocabulary of 64 tokens"),
        ({"logits_shift": 1}, "logits_shift is 1, but model type 'sdar' has 0"),
        ({"model_type": "block_qwen3", "logits_shift": 0}, "logits_shift is 0, but model type 'block_qwen3' has 1"),
        ({"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window"),
    ):
        path.write_text(json.dumps(config | changes))
        with pytest.raises(T3DError, match=words) as error:
            load_model(tmp_path / "m")
        assert "\n" not in str(error.value)


def test_weights_that_no_layer_takes_are_said(tmp_path, caplog, monkeypatch):
    from t3d.log import log

    monkeypatch.setattr(log, "propagate", True)
    save_model(make_model(tie=True), tmp_path / "m")
    load_model(tmp_path / "m")
    assert not caplog.records
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"num_hidden_layers": 1, "layer_types": ["full_attention"]}))
    load_model(tmp_path / "m")
    assert "model.layers.1.input_layernorm.weight" in caplog.text


@pytest.mark.parametrize("factor", [1, 2])
def test_a_head_in_the_files_of_a_model_with_tied_embeddings(tmp_path, factor):
    """Published either way. If it differs from the embedding, it counts, and what is saved says so."""
    save_model(make_model(tie=True), tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    weights["lm_head.weight"] = factor * weights["model.embed_tokens.weight"]
    save_file(weights, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    model, _ = load_model(tmp_path / "m")
    torch.testing.assert_close(logits(model), factor * logits(make_model(tie=True)))
    save_model(model, tmp_path / "n")
    config = json.loads((tmp_path / "n" / "config.json").read_text())
    assert config["tie_word_embeddings"] is (factor == 1)
    assert ("lm_head.weight" in names(tmp_path / "n")) is (factor == 2)
    assert torch.equal(logits(load_model(tmp_path / "n")[0]), logits(model))
