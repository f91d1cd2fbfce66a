"""What is logged of a training's speed."""

import time

import pytest
from accelerate import Accelerator

from t3d.distill import T3DTrainer
from t3d.distill.meter import Meter, peak_flops, utilisation
from tests.conftest import make_model
from tests.distill.test_trainer import config, trajectories


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A10G", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_peaks_are_of_the_device_itself(device, peak):
    assert peak_flops(device) == peak


def test_utilisation():
    assert utilisation(operations=6e15, seconds=30.0, peak=1e15) == pytest.approx(0.2)


def logs(trainer):
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(("objective", "forwards"), [("path", 3), ("t3d", 4)])
def test_mfu_is_what_the_tokens_cost(tmp_path, objective, forwards):
    """A forward and a backward pass of the student, a forward of the reference: 2 operations per weight and token."""
    settings = {"max_steps": 4, "logging_steps": 2, "save_steps": 100, "gradient_accumulation_steps": 2}
    trainer = T3DTrainer(make_model(), config(tmp_path, objective=objective, **settings), trajectories())
    trainer.meter.peak = 1e9
    weights = sum(p.numel() for name, p in trainer.model.named_parameters() if "embed_tokens" not in name)
    for entry in logs(trainer):
        assert entry["mfu"] == pytest.approx(entry["tokens_per_second"] * 2 * forwards * weights / 1e9)


def test_a_run_shorter_than_a_log_is_logged(tmp_path):
    settings = {"max_steps": 3, "logging_steps": 10, "save_steps": 100}
    (entry,) = logs(T3DTrainer(make_model(), config(tmp_path, **settings), trajectories()))
    assert entry["step"] == 3
    assert entry["tokens_per_second"] > 0
    assert "accuracy/rank_0" in entry
    assert "mfu" not in entry  # no GPU
    assert not logs(T3DTrainer(make_model(), config(tmp_path, **settings, logging_strategy="no"), trajectories()))


def test_what_is_paused_does_not_count():
    """Of 0.05 s and of 0.2 s of something else, between two logs."""
    meter = Meter(Accelerator(cpu=True), peak=1e3)
    meter.start()
    meter.seen(1000)
    meter.forwarded(10)
    meter.operations(5)
    time.sleep(0.05)
    with meter.paused():
        time.sleep(0.2)
    found = meter.drain()
    assert 1000 / 0.2 < found["tokens_per_second"] <= 1000 / 0.05
    assert found["mfu"] == pytest.approx(100 / 1e3 / 1000 * found["tokens_per_second"])
