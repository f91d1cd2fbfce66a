"""Two processes, all weights on both or in shards: the losses are those of one process on the same batches."""

import json
import multiprocessing
import shutil
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file

from tests.distill.processes import launch, train

SETTINGS = {"max_steps": 4, "logging_steps": 1, "save_steps": 2, "round_interval": 2, "learning_rate": 1e-2}
OBJECTIVES = {
    "t3d": {},
    "sft": {"objective": "sft"},  # a mean over blocks, of which the processes have different numbers
    "lora": {"lora_rank": 2},
    "alpha": {"objective": "alpha", "group_size": 2, "draft_share": 0.5},
    "dcd": {"objective": "dcd", "stop_ce": 0.0, "max_steps": 3},  # a mean over weights, not numbers, of tokens
    # a mean over tokens, contexts that are decoded from shards, and the head used outside of the forward
    # (three steps: what is sampled from weights that differ by roundings may differ)
    "mean_field": {"objective": "mean_field", "on_policy_share": 0.5, "mf_anchor": 0.0, "max_steps": 3},
    # groups that stay with their prompt's process; both steps learn from what the same weights wrote
    "cj_grpo": {"objective": "cj_grpo", "rl_reward": "tests.distill.processes:parity", "rl_updates": 2, "max_steps": 2},
    "soft": {"objective": "soft", "reference_sees": "answer", "on_policy_share": 0.5, "max_steps": 3},
}
deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs t3d[deepspeed]")


@pytest.fixture(scope="module")
def context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["t3d.distill.trainer", "t3d.distill.held_out", "transformers", "accelerate"])
    return context


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of the run of one process with the same global batch."""
    found = {}

    def run(objective: str):
        if objective not in found:
            found[objective] = tmp_path_factory.mktemp(objective)
            train(str(found[objective]), SETTINGS | OBJECTIVES[objective] | {"per_device_train_batch_size": 4})
        return found[objective]

    return run


def logged(folder) -> dict[str, list[float]]:
    entries = [entry for entry in json.loads((folder / "log.json").read_text()) if "loss" in entry]
    other = ("tokens_per_second", "memory_gb", "loss/anchor")  # the anchor is a mean over labelled tokens only
    return {name: [entry.get(name, 0.0) for entry in entries] for name in entries[0] if name not in other}


def same(folder, other, tolerance=2e-4):
    """What was logged and the students are the same, up to the order of sums."""
    mine, theirs = logged(folder), logged(other)
    assert mine.keys() == theirs.keys()
    for name, values in mine.items():
        assert values == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name
    weights = [load_file(x / "student" / "model.safetensors") for x in (folder, other)]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], atol=tolerance, rtol=1e-3)


CASES = [
    ("ddp", "t3d"),
    ("ddp", "sft"),
    ("ddp", "alpha"),
    ("ddp", "dcd"),
    ("ddp", "cj_grpo"),
    ("fsdp2", "t3d"),
    ("fsdp2", "lora"),
    ("fsdp2", "mean_field"),
    ("fsdp2", "cj_grpo"),
    ("fsdp2", "soft"),
    pytest.param("zero1", "t3d", marks=deepspeed),
    pytest.param("zero2", "t3d", marks=deepspeed),
    pytest.param("zero3", "t3d", marks=deepspeed),
]


@pytest.mark.parametrize(("strategy", "objective"), CASES)
def test_losses_equal_those_of_one_process(tmp_path, context, alone, strategy, objective):
    settings = SETTINGS | OBJECTIVES[objective] | {"per_device_train_batch_size": 2}
    launch(context, strategy, tmp_path / "two", settings)
    same(tmp_path / "two", alone(objective))
    if strategy in ("fsdp2", "zero3") and objective == "t3d":  # in shards, and from there as if it had not stopped
        shards = sorted(path.name for path in (tmp_path / "two" / "checkpoint-2").glob("reference*"))
        assert shards == [f"reference-{rank:05d}-of-00002.safetensors" for rank in range(2)]
        shutil.copytree(tmp_path / "two", tmp_path / "again")
        shutil.rmtree(tmp_path / "again" / "student")
        launch(context, strategy, tmp_path / "again", settings, resume=tmp_path / "two" / "checkpoint-2")
        same(tmp_path / "again", tmp_path / "two", tolerance=0)


def test_two_processes_keep_one_fake_model(tmp_path, context):
    """Each learns from samples of its own, by the mean of both gradients."""
    settings = SETTINGS | {"objective": "dmd", "round_interval": 0, "max_steps": 2, "per_device_train_batch_size": 2}
    launch(context, "ddp", tmp_path / "two", settings)
    mine, other = (load_file(tmp_path / "two" / f"critic-{rank}.safetensors") for rank in range(2))
    for name, weight in mine.items():
        assert torch.equal(weight, other[name]), name


def test_a_fake_model_is_not_for_shards(tmp_path, context):
    settings = SETTINGS | {"objective": "dmd", "round_interval": 0, "per_device_train_batch_size": 2}
    with pytest.raises(AssertionError, match="a critic is whole in every process and does not go with fsdp2; use DDP"):
        launch(context, "fsdp2", tmp_path / "two", settings)
