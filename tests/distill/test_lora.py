"""Adapters: the reference is the base model, training touches nothing else, and what is decoded has them in."""

import pytest
import torch

from t3d.decoding import DecodingConfig
from t3d.distill import T3DTrainer
from t3d.distill.lora import REFERENCE, STUDENT, adapter_weights, merged, reference_active
from t3d.distill.trainer import ADAPTER
from t3d.engine import Engine
from t3d.errors import T3DError
from t3d.models import load_model
from tests.conftest import make_model
from tests.distill.test_trainer import config, trajectories, weights

pytest.importorskip("peft", reason="needs t3d[lora]")
LORA = {"lora_rank": 4, "learning_rate": 5e-2}


def logits(model, seed=0):
    ids = torch.randint(2, 60, (1, 8), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    with torch.no_grad():
        return model(ids, mask, torch.arange(8)[None], select=torch.arange(8))


@pytest.mark.parametrize("round_interval", [0, 3])
def test_the_reference_is_the_base_model_and_then_the_student_of_the_last_round(tmp_path, round_interval):
    base = logits(make_model())
    settings = LORA | {"round_interval": round_interval, "max_steps": 3, "save_steps": 100}
    trainer = T3DTrainer(make_model(), config(tmp_path, **settings), trajectories())
    names = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert names
    assert all("lora_" in name and f".{STUDENT}." in name for name in names)
    trainer.train()
    student = logits(trainer.model)
    assert not torch.allclose(student, base, atol=1e-3)
    with trainer.reference.active(trainer.model) as network:
        torch.testing.assert_close(logits(network), student if round_interval else base)
    assert {name for name, p in trainer.model.named_parameters() if p.requires_grad} == names
    torch.testing.assert_close(logits(trainer.model), student)


def test_a_moving_average_of_adapters_keeps_its_share(tmp_path):
    settings = LORA | {"round_interval": 1, "reference_ema": 0.75, "max_steps": 1, "save_steps": 100}
    trainer = T3DTrainer(make_model(), config(tmp_path, **settings), trajectories())
    before = {name: w.detach().clone() for name, w in adapter_weights(trainer.model, STUDENT).items()}
    trainer.train()
    after = adapter_weights(trainer.model, STUDENT)
    for name, weight in adapter_weights(trainer.model, REFERENCE).items():
        torch.testing.assert_close(weight, 0.75 * before[name] + 0.25 * after[name])


def test_a_resumed_run_ends_with_the_same_adapter(tmp_path):
    whole = T3DTrainer(make_model(), config(tmp_path, **LORA), trajectories())
    whole.train()
    again = T3DTrainer(make_model(), config(tmp_path, **LORA), trajectories())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for (name, a), b in zip(weights(whole.model).items(), weights(again.model).values(), strict=True):
        assert torch.equal(a, b), name


def test_what_is_saved_and_what_is_decoded_has_the_adapter_in(tmp_path):
    trainer = T3DTrainer(make_model(), config(tmp_path, **LORA, save_steps=100), trajectories())
    trainer.train()
    trainer.save_student(tmp_path / "student", torch.float32, make_model)
    student, _ = load_model(tmp_path / "student", device="cpu")
    assert not hasattr(student, "peft_config")
    torch.testing.assert_close(logits(student), logits(trainer.model), atol=1e-4, rtol=1e-4)
    kept = merged(make_model(), tmp_path / ADAPTER)
    torch.testing.assert_close(logits(kept), logits(student))
    prompts, decoding = [[5, 6, 7], [9, 10]], DecodingConfig(max_tokens=12, steps=2)
    decoded = [Engine(model).generate(prompts, decoding) for model in (trainer.decoder(), student, make_model())]
    tokens = [[t.response_ids for t in answers] for answers in decoded]
    assert tokens[0] == tokens[1] != tokens[2]


def test_mean_field_trains_an_adapter_on_contexts_of_its_own(tmp_path):
    settings = LORA | {"objective": "mean_field", "on_policy_share": 1.0, "max_steps": 2, "save_steps": 100}
    data = trajectories()
    for trajectory in data:
        trajectory.correct = True
    trainer = T3DTrainer(make_model(), config(tmp_path, **settings), data)
    trainer.train()
    with reference_active(trainer.model):
        base = logits(trainer.model)
    assert not torch.allclose(base, logits(trainer.model))


def test_gradient_checkpointing_changes_no_gradient(tmp_path):
    runs = []
    for settings in ({}, LORA):
        for checkpointing in (False, True):
            arguments = config(
                tmp_path, **{"optim": "sgd", **settings, "max_steps": 2, "save_steps": 100, "logging_steps": 1},
                gradient_checkpointing=checkpointing,
            )  # fmt: skip
            trainer = T3DTrainer(make_model(), arguments, trajectories())
            trainer.train()
            runs.append((weights(trainer.model), [e["grad_norm"] for e in trainer.state.log_history if "loss" in e]))
    for (plain, norms), (checkpointed, same) in (runs[:2], runs[2:]):
        assert norms == pytest.approx(same, rel=1e-5)
        for name in plain:
            torch.testing.assert_close(plain[name], checkpointed[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lora_rank": 2, "lora_targets": ["lm_head"]}, "lm_head cannot have an adapter"),
        ({"lora_rank": 2, "lora_targets": ["q_prj"]}, "lora_targets"),
    ],
)
def test_bad_targets_are_one_line(tmp_path, settings, words):
    with pytest.raises(T3DError, match=words) as error:
        T3DTrainer(make_model(), config(tmp_path, **settings), trajectories())
    assert "\n" not in str(error.value)
