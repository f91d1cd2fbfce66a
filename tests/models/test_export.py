"""Exports: the same model in another dtype, in other shards, with its adapter merged."""

import json

import pytest
import torch

from t3d.errors import T3DError
from t3d.models import FAMILIES, load_model, save_model
from t3d.models.export import export
from t3d.tasks.word_problems import build_tokenizer
from tests.conftest import make_model
from tests.models.helpers import VARIANTS, logits, make_variant


@pytest.mark.parametrize(("family", "shift"), VARIANTS)
def test_cast_and_cut_into_shards(tmp_path, family, shift):
    save_model(make_variant(family, shift), tmp_path / "m")
    same = export(tmp_path / "m", tmp_path / "same", max_shard_size="20KB")
    assert (same.dtype, same.max_difference, same.same_choice) == ("float32", 0.0, 1.0)
    assert len(list((tmp_path / "same").glob("*.safetensors"))) > 2
    assert torch.equal(logits(load_model(tmp_path / "same")[0]), logits(make_variant(family, shift)))
    half = export(tmp_path / "m", tmp_path / "half", dtype="bfloat16")
    assert half.dtype == "bfloat16"
    assert 0 < half.max_difference < 1
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert {p.dtype for p in load_model(tmp_path / "half")[0].parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"sdar", "sdar_moe"}))
@pytest.mark.parametrize("engine", ["sglang", "lmdeploy"])
def test_engines_that_do_not_know_a_family(tmp_path, family, engine):
    save_model(make_model(family=family), tmp_path / "m", build_tokenizer())
    with pytest.raises(T3DError, match=f"{engine} cannot serve it: it knows sdar and sdar_moe, not {family}"):
        export(tmp_path / "m", tmp_path / "out", engine=engine)
    assert not (tmp_path / "out").exists()


def adapted(folder, model):
    peft = pytest.importorskip("peft", reason="needs t3d[lora]")
    torch.manual_seed(3)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    tuned.save_pretrained(folder)
    return tuned


def test_a_lora_adapter_is_merged(tmp_path):
    save_model(make_model(), tmp_path / "base")
    base, _ = load_model(tmp_path / "base")
    tuned = adapted(tmp_path / "adapter", base)
    want = logits(tuned)
    with pytest.raises(T3DError, match="add --merge-lora"):
        export(tmp_path / "adapter", tmp_path / "out")
    export(tmp_path / "adapter", tmp_path / "out", merge_lora=True)
    merged, _ = load_model(tmp_path / "out")
    torch.testing.assert_close(logits(merged), want, atol=1e-4, rtol=1e-4)
    assert (logits(merged) - logits(make_model())).abs().max() > 0.1
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(T3DError, match="--base MODEL"):
        export(tmp_path / "adapter", tmp_path / "again", merge_lora=True)
    export(tmp_path / "adapter", tmp_path / "again", merge_lora=True, base=tmp_path / "moved")
    assert torch.equal(logits(load_model(tmp_path / "again")[0]), logits(merged))
    save_model(make_model(hidden=16), tmp_path / "other")
    with pytest.raises(T3DError, match="cannot merge"):
        export(tmp_path / "adapter", tmp_path / "last", merge_lora=True, base=tmp_path / "other")
    assert not (tmp_path / "last").exists()


def test_an_export_that_reads_differently_is_not_kept(tmp_path, monkeypatch):
    import t3d.models.export as module

    save_model(make_model(seed=1), tmp_path / "m")
    save_model(make_model(seed=2), tmp_path / "out")
    write = module.write_checkpoint

    def wrong(model, folder, *arguments, **options):
        write(model, folder, *arguments, **options)
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / "model.safetensors")
        weights["model.norm.weight"] = weights["model.norm.weight"].contiguous() * 2
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(module, "write_checkpoint", wrong)
    with pytest.raises(T3DError, match="gives other logits"):
        export(tmp_path / "m", tmp_path / "out")
    assert torch.equal(logits(load_model(tmp_path / "out")[0]), logits(make_model(seed=2)))


@pytest.mark.parametrize("engine", ["sglang", "lmdeploy"])
def test_a_mixture_of_experts_for_another_engine(tmp_path, engine):
    model = make_model(family="sdar_moe", vocab_size=151936, hidden=8, heads=1, kv_heads=1, mlp_only_layers=[0])
    model.config.mask_token_id = 151669
    save_model(model, tmp_path / "m", build_tokenizer())
    if engine == "sglang":  # it has experts in every layer
        with pytest.raises(T3DError, match="some layers have no experts"):
            export(tmp_path / "m", tmp_path / "out", engine=engine)
        return
    export(tmp_path / "m", tmp_path / "out", engine=engine)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["auto_map"] == {"AutoConfig": "configuration_sdar_moe.SDARMoeConfig"}
    assert (tmp_path / "out" / "configuration_sdar_moe.py").exists()
