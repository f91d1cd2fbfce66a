"""The plan's numbers are those of real tensors."""

import json
import shutil

import pytest
import torch
from rich.console import Console

from t3d.config import Recipe, load_recipe
from t3d.distill import T3DTrainer
from t3d.errors import T3DError
from t3d.models import FAMILIES, save_model
from t3d.pipeline.inputs import Inputs
from t3d.plan import activation_bytes, plan, sizes, table
from t3d.tasks.word_problems import build_tokenizer
from tests.conftest import make_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    tokenizer = build_tokenizer()
    model = make_model(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    model.config.mask_token_id = tokenizer.mask_token_id
    folder = tmp_path_factory.mktemp("plan") / "tiny"
    save_model(model, folder, tokenizer)
    return folder


def recipe(tiny, tmp_path, *overrides: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: {{path: {tiny}, device: cpu}}\ntask: {{name: word_problems, num_train: 8, num_eval: 2}}\n")
    return load_recipe(path, overrides)


def found(parts) -> dict[str, float]:
    return {f"{part.phase}/{part.name}": part.bytes for part in parts}


def saved(layers: int, tokens: int, autocast: bool, checkpointing: bool = False, **shape) -> int:
    """Bytes of distinct tensors, other than weights, that a forward keeps for the backward pass."""
    model = make_model(layers=layers, **shape).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    weights = {id(p) for p in model.parameters()}
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept, matrices = {}, 0

    def pack(tensor):
        if id(tensor) not in weights and tensor.untyped_storage().data_ptr() not in storages:
            kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
    ):
        mask = torch.zeros(1, 1, tokens, tokens, dtype=torch.bfloat16 if autocast else torch.float32)
        ids = torch.randint(0, 60, (1, tokens))
        out = model(ids, mask, torch.arange(tokens)[None], select=torch.arange(4), head=lambda h, w: h.float().sum())
    del out
    if autocast:  # a cast copy of every matrix of the layers, which the plan lists by itself
        matrices = sum(2 * p.numel() for layer in model.model.layers for p in layer.parameters() if p.ndim == 2)
    return sum(size for size, _ in kept.values()) - matrices


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        {"hidden": 48, "heads": 4, "kv_heads": 2, "head_dim": 8, "intermediate_size": 80},
        {"hidden": 32, "heads": 6, "kv_heads": 3, "head_dim": 16, "intermediate_size": 64},
    ],
)
def test_a_layer_keeps_as_many_bytes_as_the_formula_says(autocast, shape):
    tokens = 96
    measured = saved(3, tokens, autocast, **shape) - saved(2, tokens, autocast, **shape)
    config = make_model(**shape).config
    assert activation_bytes(config, tokens, autocast) == pytest.approx(measured, rel=0.01)
    kept = saved(3, tokens, autocast, True, **shape) - saved(2, tokens, autocast, True, **shape)
    assert kept <= tokens * config.hidden_size * 4 * 1.01  # only its input


def test_a_new_model_has_the_vocabulary_of_its_tokenizer(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {architecture: {hidden_size: 16, num_hidden_layers: 1}}\ntask: {num_train: 1}\n")
    made = Inputs(load_recipe(path))
    assert sizes(made, made.recipe.training_arguments(tmp_path)).embedding == len(made.tokenizer) * 16


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_planned(tmp_path, family):
    model = make_model(family=family, tie=True)
    save_model(model, tmp_path / "m", build_tokenizer())
    made = recipe(tmp_path / "m", tmp_path)
    assert sizes(Inputs(made), made.training_arguments(tmp_path)).parameters == sum(
        p.numel() for p in model.parameters()
    )
    assert found(plan(made))["train/weights"] == sum(p.nbytes for p in model.parameters())


def test_a_configuration_that_is_none_is_one_line(tiny, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(tiny, folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"layer_types": ["full_attention"]}))
    with pytest.raises(T3DError, match=r"broken/config\.json: cannot make a model from it"):
        plan(recipe(folder, tmp_path))


def test_weights_gradients_and_optimizer_are_those_of_a_training_step(tiny, tmp_path):
    from t3d.models import load_model
    from tests.distill.test_trainer import trajectories

    for lora in (0, 2):
        made = recipe(tiny, tmp_path, f"train.lora_rank={lora}", "train.max_steps=1", "train.report_to=none")
        parts = found(plan(made))
        arguments = made.training_arguments(tmp_path / "train")
        model, _ = load_model(tiny, dtype="float32", device="cpu")
        assert sizes(Inputs(made), arguments).parameters == sum(p.numel() for p in model.parameters())
        trainer = T3DTrainer(model, arguments, trajectories())
        trainer.train()
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        assert parts["train/gradients"] == sum(p.nbytes for p in trained)
        moments = sum(v.nbytes for s in trainer.optimizer.state.values() for v in s.values() if v.numel() > 1)
        assert parts["train/optimizer"] == moments
        own = trainer.reference.model.parameters() if not lora else trained
        assert parts["train/reference"] == sum(p.nbytes for p in own)
        everything = sum(p.nbytes for p in trainer.model.parameters())
        if lora:
            everything -= parts["train/reference"]
        assert parts["train/weights"] + parts.get("train/adapter", 0) == everything


def test_the_cache_is_the_engines(tiny, tmp_path):
    from t3d.engine.kv_cache import bytes_per_token

    made = recipe(tiny, tmp_path, "engine.kv_cache_tokens=1000")
    assert found(plan(made))["decode/KV cache"] == 1000 * bytes_per_token(make_model())


def test_shards_divide_what_they_hold(tiny, tmp_path):
    made = recipe(tiny, tmp_path, "train.bf16=true")
    whole = {name: found(plan(made, 8, name)) for name in ("ddp", "fsdp2", "zero1", "zero2", "zero3")}
    total = whole["ddp"]["train/weights"]
    assert whole["fsdp2"]["train/weights"] == whole["fsdp2"]["train/reference"] == total / 8
    assert whole["zero1"]["train/weights"] == whole["zero1"]["train/gradients"] == total / 2
    assert whole["zero2"]["train/gradients"] == whole["zero3"]["train/gradients"] == total / 16
    assert whole["zero3"]["train/weights"] == whole["zero3"]["train/reference"] == total / 16
    assert {name: parts["train/optimizer"] for name, parts in whole.items()} == dict.fromkeys(whole, total / 4) | {
        "ddp": 2 * total
    }
    checkpointed = recipe(tiny, tmp_path, "train.gradient_checkpointing=true")
    assert found(plan(checkpointed))["train/activations"] < found(plan(made))["train/activations"]


def test_the_command(tiny, tmp_path, capsys):
    from t3d.cli import main

    made = recipe(tiny, tmp_path)
    console = Console(width=150, record=True, quiet=True)
    console.print(table(plan(made, 2, "fsdp2"), 2, "fsdp2"))
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(tmp_path / "recipe.yaml"), "--gpus", "2", "--sharding", "fsdp2"])
    assert not ended.value.code
    shown = capsys.readouterr().out
    for words in ("Memory per GPU: 2 x fsdp2", "/ 2 GPUs", "KV cache", "optimizer", "needed"):
        assert words in shown
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(tmp_path / "recipe.yaml"), "--sharding", "fsdp"])
    assert ended.value.code == 2
    assert "did you mean 'fsdp2'" in capsys.readouterr().err
    with pytest.raises(T3DError, match="--gpus must be at least 1"):
        plan(made, 0)
