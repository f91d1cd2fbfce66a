import copy
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from t3d.distill import T3DConfig, T3DTrainer
from t3d.distill.batch import TrainingBatch
from t3d.distill.data import StateDataset
from t3d.distill.objective import OBJECTIVES, Ask, total_loss
from t3d.embedded import EMBEDDED
from t3d.errors import T3DError
from t3d.models import load_tokenizer
from t3d.pipeline.train import check_reference
from tests.conftest import make_model
from tests.distill.test_layout import random_trajectory


def trajectories(count=12, block_size=4):
    rng = np.random.default_rng(0)
    return [random_trajectory(rng, block_size, 6, 3) for _ in range(count)]


def config(folder, **settings):
    base = {
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "round_interval": 3,
        "save_steps": 4,
        "save_total_limit": None,
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": True,
        "seed": 5,
    }
    return T3DConfig(output_dir=str(folder), **base | settings)


def weights(model):
    return {name: w.detach().clone() for name, w in model.named_parameters()}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"draft_share": 0.5, "group_size": 2},
        {"objective": "sft", "optim": "muon", "states_per_sequence": 2},
        {"objective": "pseudo_trajectory"},
    ],
)
def test_a_resumed_run_ends_with_the_same_weights(tmp_path, settings):
    whole = T3DTrainer(make_model(), config(tmp_path / "whole", **settings), trajectories())
    whole.train()
    again = T3DTrainer(make_model(), config(tmp_path / "whole", **settings), trajectories())
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert again.state.global_step == 8
    for (name, a), b in zip(weights(whole.model).items(), weights(again.model).values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_attention_does_not_change_the_training(tmp_path, attention):
    runs = []
    for settings in ({}, {"recompute": "nothing"}):
        model = make_model()
        trainer = T3DTrainer(model, config(tmp_path, max_steps=3, save_steps=100, **settings), trajectories())
        assert model.config._attn_implementation == "block_sdpa"
        if settings:
            model.set_attn_implementation(attention)
        trainer.train()
        runs.append(weights(trainer.model))
    for a, b in zip(*(run.values() for run in runs), strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=1e-3)


def test_drafts_show_the_students_own_choice_and_stay_supervised(tmp_path):
    seen = []

    class Watch(T3DTrainer):
        def forward(self, network, head, batch):
            seen.append((network is self.model, torch.is_grad_enabled(), batch))
            return super().forward(network, head, batch)

    settings = {"objective": "path", "draft_share": 1.0, "state": "all_masked", "random_ratio": 0.0, "max_steps": 1}
    model = make_model()
    before = copy.deepcopy(model)
    trainer = Watch(model, config(tmp_path, **settings), trajectories())
    trainer.train()
    (_, asked_with_gradient, masked), (_, learnt_with_gradient, shown) = seen
    assert (asked_with_gradient, learnt_with_gradient) == (False, True)
    assert torch.equal(masked.select, shown.select)
    assert torch.equal(masked.target, shown.target)
    assert (masked.input_ids.flatten()[masked.select] == 63).all()
    with torch.no_grad():
        logits = before(masked.input_ids, masked.layout.boolean_mask(), masked.position).logits.flatten(0, 1)
    logits[:, 63] = -torch.inf
    assert torch.equal(shown.input_ids.flatten()[shown.select], logits[masked.select].argmax(-1))
    others = torch.ones(masked.input_ids.numel(), dtype=torch.bool).index_fill(0, masked.select, False)
    assert torch.equal(masked.input_ids.flatten()[others], shown.input_ids.flatten()[others])


def test_every_objective_takes_a_step(tmp_path):
    for name in OBJECTIVES:
        arguments = config(tmp_path, objective=name, max_steps=1, logging_steps=1, save_steps=100)
        trainer = T3DTrainer(
            make_model(), arguments, trajectories(), judge=lambda answers: [a.response_ids[0] % 2 == 0 for a in answers]
        )
        before = weights(trainer.model)
        trainer.train()
        assert any(not torch.equal(before[key], w) for key, w in weights(trainer.model).items()), name
        assert trainer.objective.round_interval == (3 if trainer.reference else 0)  # as asked for
        teacher_stays = config(tmp_path, objective=name, round_interval=None).method.round_interval == 0
        assert teacher_stays == (name not in ("t3d", "ddo"))


def test_a_run_draws_every_trajectory_once_per_epoch_and_knows_how_far_it_is(tmp_path):
    """12 trajectories in steps of 4 for 2 epochs, resumed in the middle of the second."""
    settings = {"max_steps": -1, "num_train_epochs": 2, "save_steps": 4, "round_interval": 0}

    class Watch(T3DTrainer):
        def get_batch_samples(self, *args):
            batches, count = super().get_batch_samples(*args)
            steps.extend(sorted(batch["item"].tolist()) for batch in batches)
            return batches, count

    steps, draws = [], []
    original = StateDataset.__getitem__
    StateDataset.__getitem__ = lambda self, draw: draws.append(draw) or original(self, draw)
    try:
        Watch(make_model(), config(tmp_path, **settings), trajectories()).train()
        whole, whole_draws = list(steps), list(draws)
        steps.clear(), draws.clear()
        Watch(make_model(), config(tmp_path, **settings), trajectories()).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-4")
        )
    finally:
        StateDataset.__getitem__ = original
    first, second = (sorted(item for step in epoch for item in step) for epoch in (whole[:3], whole[3:]))
    assert first == second == list(range(12))
    assert whole[:3] != whole[3:]
    assert steps == whole[4:]
    assert draws == whole_draws[16:]
    assert [draw.progress for draw in whole_draws] == [step / 6 for step in range(6) for _ in range(4)]


def test_training_lowers_the_loss_and_logs_every_term(tmp_path):
    trainer = T3DTrainer(
        make_model(), config(tmp_path, max_steps=40, save_steps=1000, logging_steps=10), trajectories()
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss/path" in entry]
    assert logs[-1]["loss/path"] < 0.7 * logs[0]["loss/path"]
    for name in ("loss/ddo", "lp/real", "lp/fake", "lp/reference_real", "margin/real", "margin/fake", "fake_differs"):
        assert np.isfinite(logs[-1][name])


def test_the_reference_is_replaced_at_round_boundaries_only(tmp_path):
    trainer = T3DTrainer(make_model(), config(tmp_path, max_steps=7, round_interval=3, save_steps=100), trajectories())
    seen = []

    class Watch(type(trainer.callback_handler.callbacks[0])):
        def on_step_end(self, args, state, control, **kwargs):
            same = all(
                torch.equal(a, b)
                for a, b in zip(trainer.model.parameters(), trainer.reference.model.parameters(), strict=True)
            )
            seen.append(same)

    trainer.add_callback(Watch())
    trainer.train()
    assert seen == [False, False, True, False, False, True, False]


def test_round_interval_zero_keeps_the_teacher(tmp_path):
    model = make_model()
    before = weights(model)
    trainer = T3DTrainer(model, config(tmp_path, round_interval=0, save_steps=100), trajectories())
    trainer.train()
    for name, weight in trainer.reference.model.named_parameters():
        assert torch.equal(weight, before[name])


def test_gradient_accumulation_equals_one_large_batch(tmp_path):
    """All sequences alike in length, so a mean of micro-batch means is the mean."""
    runs = []
    for size, accumulation in ((4, 1), (2, 2)):
        trainer = T3DTrainer(
            make_model(),
            config(
                tmp_path / str(size),
                max_steps=3,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=accumulation,
                optim="sgd",
                round_interval=0,
            ),
            trajectories(),
        )
        trainer.train()
        runs.append(weights(trainer.model))
    for name in runs[0]:
        torch.testing.assert_close(runs[0][name], runs[1][name], atol=1e-6, rtol=1e-5)


def test_a_nan_loss_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    trainer = T3DTrainer(make_model(), config(tmp_path, max_steps=8, save_steps=2), trajectories())

    class Poison(type(trainer.callback_handler.callbacks[0])):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                model.lm_head.weight.data.fill_(float("nan"))

    trainer.add_callback(Poison())
    with pytest.raises(T3DError, match="nan at step 4"):
        trainer.train()
    assert (tmp_path / "checkpoint-2" / "model.safetensors").exists()


def test_trajectories_of_another_block_size_are_refused(tmp_path):
    with pytest.raises(T3DError, match="block size 8, but the model's is 4"):
        T3DTrainer(make_model(), config(tmp_path), trajectories(block_size=8))


def test_filters_count_what_they_drop(tmp_path):
    data = trajectories(6)
    for i, trajectory in enumerate(data):
        trajectory.correct = i % 2 == 0
    trainer = T3DTrainer(make_model(), config(tmp_path, verified_only=True), data)
    assert len(trainer.train_dataset) == 3
    assert trainer.train_dataset.dropped["not verified correct"] == 3
    for trajectory in data:
        trajectory.correct = False
    with pytest.raises(T3DError, match=r"no trajectory is left.*6 not verified correct"):
        T3DTrainer(make_model(), config(tmp_path, verified_only=True), data)


def test_the_easy_share_keeps_every_prompt_that_was_answered_wrongly(tmp_path):
    data = [t for t in trajectories(40) for _ in range(2)]
    data = [replace(t, prompt_id=f"p{i // 2}", sample=i % 2, correct=i % 8 != 0) for i, t in enumerate(data)]
    hard = {t.prompt_id for t in data if not t.correct}

    def kept(**settings) -> list[tuple[str, int]]:
        states = T3DTrainer(make_model(), config(tmp_path, verified_only=True, **settings), data).train_dataset
        assert len(states) + sum(states.dropped.values()) == len(data)
        return [(t.prompt_id, t.sample) for t in map(states.trajectory, range(len(states)))]

    none, some = kept(easy_share=0.0), kept(easy_share=0.5)
    assert {prompt_id for prompt_id, _ in none} == hard
    assert len(none) == len(hard)  # their other samples, which are correct
    easy = [key for key in some if key[0] not in hard]
    assert 0 < len(easy) < 2 * (40 - len(hard))
    assert all((prompt_id, 1 - sample) in easy for prompt_id, sample in easy)  # all of a prompt, or nothing
    assert some == kept(easy_share=0.5) != kept(easy_share=0.5, seed=1)
    assert set(none) < set(some) < set(kept())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"objective": "t3dd"}, "did you mean 't3d'"),
        ({"order": "backwards"}, "order is 'trajectory', 'reversed' or 'random', got"),
        ({"random_ratio": 2.0}, "random_ratio"),
        ({"easy_share": 1.5}, "easy_share must lie in 0..1"),
        ({"ddo_reduction": "max"}, "ddo_reduction"),
        ({"soft_state": "later"}, "soft_state is"),
        ({"recompute": "all"}, "recompute is 'auto', "),
        ({"objective": "pseudo_trajectory", "pt_noise": [0.8, 0.2]}, "train.pt_noise is two rising"),
        ({"pt_window": 0.0}, "pt_window"),
        ({"tad_near": 0}, "tad_near"),
        ({"certainty_temperature": 0.0}, "certainty_temperature"),
        ({"certainty_mask_ratio": 1.0}, "certainty_mask_ratio"),
        ({"cdlm_consistency": -1.0}, "cdlm_consistency"),
    ],
)
def test_bad_settings_are_one_line(tmp_path, settings, words):
    with pytest.raises(T3DError, match=words):
        config(tmp_path, **settings)


def test_a_nan_loss_names_the_batch(tmp_path):
    data = trajectories(4)
    for number, trajectory in enumerate(data):
        trajectory.prompt_id = f"p{number}"
    model = make_model()
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(T3DError, match=r"nan at step 1, on 'p\d', 'p\d', 'p\d', 'p\d'; lower train.learning_rate"):
        T3DTrainer(model, config(tmp_path), data).train()


class Store(list):
    """A list with the metadata of a store."""

    metadata: ClassVar = {}


def test_trajectories_of_another_tokenizer_are_refused(tmp_path):
    from t3d.tasks.word_problems import build_tokenizer
    from t3d.trajectories.fingerprint import tokenizer_fingerprint

    tokenizer, other = build_tokenizer(), build_tokenizer()
    other.add_tokens(["<new>"])
    data = Store(trajectories())
    data.metadata = {"tokenizer_fingerprint": tokenizer_fingerprint(other)}
    with pytest.raises(T3DError, match="a different tokenizer"):
        T3DTrainer(make_model(vocab_size=200), config(tmp_path), data, processing_class=tokenizer)
    data.metadata = {"tokenizer_fingerprint": tokenizer_fingerprint(tokenizer)}
    T3DTrainer(make_model(vocab_size=200), config(tmp_path), data, processing_class=tokenizer)


@pytest.mark.parametrize("tie", [False, True])
def test_an_offloaded_reference_changes_nothing(tmp_path, tie):
    """Its layers come one by one; rounds and resuming work on what lies in between."""
    runs = []
    for offload in (False, True):
        settings = {"reference_offload": offload, "round_interval": 2, "reference_ema": 0.5}
        folder = tmp_path / str(offload)
        trainer = T3DTrainer(make_model(tie=tie), config(folder, **settings), trajectories())
        trainer.train()
        again = T3DTrainer(make_model(tie=tie), config(folder, **settings), trajectories())
        again.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
        runs += [weights(trainer.model), weights(again.model)]
    for other in runs[1:]:
        for name, weight in runs[0].items():
            assert torch.equal(weight, other[name]), name


@pytest.mark.parametrize("more", [{}, {"reference_temperature": 1.0}, {"reference_offload": True}, {"lora_rank": 2}])
def test_a_cached_reference_is_asked_once_and_changes_nothing(tmp_path, more):
    settings = {"round_interval": 0, "reference_cache": str(tmp_path / "values"), **more}

    def trained(folder: str, resume=None, **other) -> tuple[dict, int]:
        torch.manual_seed(0)  # an adapter starts at random
        trainer = T3DTrainer(make_model(), config(tmp_path / folder, **settings | other), trajectories())
        asked, reference = [], trainer.reference.active
        trainer.reference.active = lambda model: asked.append(model) or reference(model)
        trainer.train(resume_from_checkpoint=resume)
        return weights(trainer.model), len(asked)

    def same(a: dict, b: dict) -> bool:
        return all(torch.equal(weight, b[name]) for name, weight in a.items())

    first, asked = trained("first")
    assert asked == 8 == len(list(tmp_path.glob("values/*/*.safetensors")))
    again, asked = trained("again")
    assert asked == 0
    assert same(first, again)
    if not more.get("reference_temperature"):  # there the cache holds one sample, and another run draws others
        assert same(first, trained("without", reference_cache=None)[0])
    other, asked = trained("other", beta=2.0)
    assert asked == 0
    assert not same(first, other)
    assert trained("seed", seed=6)[1] == 8
    resumed, asked = trained("first", resume=str(tmp_path / "first" / "checkpoint-4"))
    assert asked == 0
    assert same(first, resumed)


def test_a_cache_knows_whose_values_it_holds_and_says_what_is_damaged(tmp_path):
    settings = {"round_interval": 0, "reference_cache": str(tmp_path / "values"), "max_steps": 2}

    def train(model, folder: str):
        T3DTrainer(model, config(tmp_path / folder, **settings), trajectories()).train()

    train(make_model(), "one")
    files = sorted(tmp_path.glob("values/*/*.safetensors"))
    other = make_model()
    with torch.no_grad():
        other.lm_head.weight.add_(0.1)
    train(other, "two")
    assert len(list(tmp_path.glob("values/*/*.safetensors"))) == 2 * len(files)
    files[0].write_bytes(files[0].read_bytes()[:20])
    with pytest.raises(T3DError, match=rf"reference_cache: .*{files[0].name}.*remove it"):
        train(make_model(), "three")


@pytest.mark.parametrize(
    "settings", [{"objective": "mean_field"}, {"objective": "path"}, {"objective": "t3d", "round_interval": 10}]
)
def test_a_reference_that_changes_is_not_cached(tmp_path, settings):
    with pytest.raises(T3DError, match="reference_cache needs a reference that stays as it is"):
        config(tmp_path, **{"round_interval": 0} | settings, reference_cache=str(tmp_path))


def test_every_metric_is_logged_and_reported(tmp_path):
    trainer = T3DTrainer(make_model(), config(tmp_path, max_steps=4, logging_steps=2, save_steps=100), trajectories())
    seen = []

    class Report(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    trainer.add_callback(Report())
    trainer.train()
    logs = [entry for entry in seen if "loss" in entry]
    assert len(logs) == 2
    for name in (
        "grad_norm", "learning_rate", "loss/ddo", "loss/path", "lp/real", "lp/fake", "lp/reference_real",
        "lp/reference_fake", "margin/real", "margin/fake", "fake_differs", "tokens_per_second", "memory_gb",
        *(f"accuracy/rank_{rank}" for rank in range(4)),
    ):  # fmt: skip
        assert np.isfinite(logs[-1][name]), name
    assert all(0 <= logs[-1][f"accuracy/rank_{rank}"] <= 1 for rank in range(4))


def test_accuracy_by_rank_is_the_share_of_right_choices(tmp_path):
    """A model that has learnt its data by heart chooses nearly always right."""
    settings = {"objective": "path", "max_steps": 120, "learning_rate": 5e-2, "save_steps": 1000, "random_ratio": 0.0}
    data = trajectories(2)
    trainer = T3DTrainer(make_model(), config(tmp_path, per_device_train_batch_size=2, **settings), data)
    trainer.train()
    last = [entry for entry in trainer.state.log_history if "accuracy/rank_0" in entry]
    assert np.mean([last[-1][f"accuracy/rank_{rank}"] for rank in range(4)]) > 0.9 > last[0]["accuracy/rank_0"]


def test_a_batch_without_a_masked_position_costs_nothing(tmp_path):
    """Where only tokens behind the stop are masked, the processes must still meet in the backward pass."""
    data = trajectories(4)
    trainer = T3DTrainer(make_model(), config(tmp_path, max_steps=1, weight_decay=0.0, max_grad_norm=0), data)
    before = weights(trainer.model)
    empty = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    for name in ("select", "target", "rank", "weight", "part", "labelled", "sequence", "block"):
        empty[name] = empty[name][:0]
    trainer.data_collator = lambda examples: empty
    trainer.train()
    for name, weight in weights(trainer.model).items():
        assert torch.equal(weight, before[name]), name


def test_compiled_layers_change_nothing(tmp_path):
    """Compiled without a code generator, so that the test needs none."""
    runs = []
    for settings in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        arguments = config(tmp_path, max_steps=3, save_steps=100, optim="sgd", **settings)
        trainer = T3DTrainer(make_model(), arguments, trajectories())
        trainer.train()
        runs.append(weights(trainer.model))
    for name, weight in runs[0].items():
        torch.testing.assert_close(weight, runs[1][name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_attention_gives_the_same_losses(tmp_path, attention):
    losses = []
    for name in ("auto", attention):
        arguments = config(tmp_path, max_steps=2, save_steps=100, logging_steps=1, attention=name)
        trainer = T3DTrainer(make_model(), arguments, trajectories())
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"block_size": 8}, "has block_size 4, the student 8"), ({"vocab_size": 70}, "the student 70")],
)
def test_a_reference_that_does_not_fit_is_one_line(settings, words):
    tokenizer = load_tokenizer(EMBEDDED)
    with pytest.raises(T3DError, match=f"train.reference_path: .*{words}"):
        check_reference(EMBEDDED, make_model(**{"vocab_size": len(tokenizer)} | settings), tokenizer)
    check_reference(EMBEDDED, make_model(vocab_size=len(tokenizer)), tokenizer)


def test_the_stop_tokens_term_leaves_other_versions_of_a_batch_alone(tmp_path):
    """An objective may ask the student about its batch and about another in one loss."""
    trainer = T3DTrainer(make_model(), config(tmp_path, objective="path", stop_ce=1.0), trajectories(4))
    batch = TrainingBatch(**trainer.data_collator([trainer.train_dataset[i] for i in range(4)]))
    other = replace(batch, select=batch.select[:1])

    def student(head, asked=batch):
        return trainer.forward(trainer.model, head, asked)

    class Both:
        stop_ce = 1.0

        def loss(self, batch, ask):
            assert len(ask.student(lambda hidden, weight: hidden, other)) == 1
            return ask.student(lambda hidden, weight: hidden.sum() * 0), {}

    loss, metrics = total_loss(Both(), batch, Ask(student, None, 63))
    assert loss.item() == pytest.approx(metrics["loss/stop"].item()) != 0
