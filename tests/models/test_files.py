"""Folders on disk: replaced whole or not at all, whatever kills the process; damage is named."""

import json
import os
import shutil
import signal
import sys

import pytest
import torch

import t3d.models.files
from t3d.errors import T3DError
from t3d.models import load_model, save_model
from tests.conftest import make_model
from tests.models.helpers import logits


def killed_at(event: int, folder, model, exchange: bool) -> bool:
    """Save in a process that is killed when it touches the folder, or what lies beside it, for the `event`-th time;
    False if it ended before."""
    if child := os.fork():
        _, status = os.waitpid(child, 0)
        assert os.WIFEXITED(status) or os.WTERMSIG(status) == signal.SIGKILL
        return os.WIFSIGNALED(status)
    try:
        count = 0

        def hook(name, arguments):
            nonlocal count
            if name.startswith(("open", "os.", "shutil.")) and any(str(folder.parent) in str(a) for a in arguments):
                count += 1
                if count > event:
                    os.kill(os.getpid(), signal.SIGKILL)

        if not exchange:  # a file system that cannot swap two names
            t3d.models.files._exchange = lambda one, other: False
        sys.addaudithook(hook)
        save_model(model, folder, max_shard_size="50KB")
        os._exit(0)
    except BaseException:
        os._exit(1)


@pytest.mark.parametrize("exchange", [True, False])
def test_a_save_killed_anywhere_leaves_the_previous_or_the_new_checkpoint(tmp_path, exchange):
    old, new = make_model(seed=1), make_model(seed=2)
    known = {"old": logits(old), "new": logits(new)}
    folder, found = tmp_path / "m", []
    for event in range(1000):
        if found[-1:] != ["old"]:
            save_model(old, folder, max_shard_size="50KB")
        killed = killed_at(event, folder, new, exchange)
        have = logits(load_model(folder)[0])
        found.append(next(name for name, values in known.items() if torch.equal(have, values)))
        if not killed:
            break
    assert not killed
    assert found[0] == "old"
    assert found[-1] == "new"
    assert len(found) > 20
    assert found == sorted(found, key=["old", "new"].index)  # once it is the new one, it stays the new one
    save_model(new, folder)
    assert os.listdir(tmp_path) == ["m"]  # what the kills left is gone


def test_a_first_save_that_was_killed_is_no_checkpoint(tmp_path):
    assert killed_at(5, tmp_path / "m", make_model(), True)
    with pytest.raises(T3DError, match="no such checkpoint folder"):
        load_model(tmp_path / "m")


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    """No shard of the previous checkpoint stays beside the new one's."""
    save_model(make_model(), tmp_path / "m", max_shard_size="10KB")
    save_model(make_model(), tmp_path / "m")
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert (tmp_path / "m" / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_shards_are_as_small_as_asked(tmp_path):
    save_model(make_model(), tmp_path / "m", max_shard_size="10KB")
    shards = sorted((tmp_path / "m").glob("model-*.safetensors"))
    assert len(shards) > 2
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert {p.name for p in shards} == set(index["weight_map"].values())
    largest = max(p.numel() * p.itemsize for p in make_model().parameters())
    assert max(p.stat().st_size for p in shards) < max(10_000, largest) + 5_000
    with pytest.raises(T3DError, match="cannot save the model"):
        save_model(make_model(), tmp_path / "other", max_shard_size="many")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def only_pickles(folder):
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "model-00002-of-00006.safetensors").unlink(), "model-00002-of-00006.safetensors is missing"),
        (lambda f: cut(f / "model-00003-of-00006.safetensors"), "model-00003-of-00006.safetensors is cut short"),
        (lambda f: (f / "model-00004-of-00006.safetensors").write_bytes(b""), "model-00004-of-00006.safetensors"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "weight_map"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{"), "index.json"),
        (lambda f: (f / "generation_config.json").write_text("{"), "generation_config.json"),
        (lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
        (only_pickles, "only safetensors are read"),
    ],
)
def test_what_is_missing_or_cut_short_is_named(tmp_path, damage, words):
    save_model(make_model(), tmp_path / "m", max_shard_size="20KB")
    assert (tmp_path / "m" / "model-00006-of-00006.safetensors").exists()
    damage(tmp_path / "m")
    with pytest.raises(T3DError, match=words) as error:
        load_model(tmp_path / "m")
    assert "\n" not in str(error.value)


def with_code(folder):
    """A folder as on the hub: the code of other libraries beside the weights."""
    for name in ("configuration_sdar.py", "modeling_sdar.py", "fused_loss.py"):
        (folder / name).write_text(f'raise SystemExit("{name} must not run")\n')
    (folder / "LICENSE").write_text("MIT\n")
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "configuration_sdar.SDARConfig", "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": names, "fuse_cross_entropy": True}))
    return folder


def test_code_of_the_source_is_carried_over_and_never_run(tmp_path):
    save_model(make_model(), tmp_path / "source")
    with_code(tmp_path / "source")
    model, _ = load_model(tmp_path / "source")
    save_model(model, tmp_path / "student")
    for name in ("configuration_sdar.py", "modeling_sdar.py", "fused_loss.py", "LICENSE"):
        assert (tmp_path / "student" / name).read_bytes() == (tmp_path / "source" / name).read_bytes()
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    assert config["auto_map"]["AutoConfig"] == "configuration_sdar.SDARConfig"
    assert config["fuse_cross_entropy"] is True
    again, _ = load_model(tmp_path / "student")
    assert torch.equal(logits(again), logits(model))


def test_a_model_that_was_not_loaded_brings_nothing_of_the_working_folder(tmp_path, monkeypatch):
    save_model(make_model(), tmp_path / "here")
    monkeypatch.chdir(with_code(tmp_path / "here"))
    save_model(make_model(), tmp_path / "m")
    assert not list((tmp_path / "m").glob("*.py"))


def test_code_that_is_not_there_is_not_promised(tmp_path):
    save_model(make_model(), tmp_path / "source")
    with_code(tmp_path / "source")
    (tmp_path / "source" / "modeling_sdar.py").unlink()
    save_model(load_model(tmp_path / "source")[0], tmp_path / "student")
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    assert config["auto_map"] == {"AutoConfig": "configuration_sdar.SDARConfig"}
    for path in (tmp_path / "source").glob("*.py"):
        path.unlink()
    save_model(load_model(tmp_path / "source")[0], tmp_path / "student")
    assert "auto_map" not in json.loads((tmp_path / "student" / "config.json").read_text())


def test_a_hub_id_loads_from_the_cache(tmp_path, monkeypatch):
    """The cache's own layout, offline."""
    import huggingface_hub.constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--someone--small" / "snapshots" / commit
    save_model(make_model(), cached, max_shard_size="20KB")
    (tmp_path / "models--someone--small" / "refs").mkdir()
    (tmp_path / "models--someone--small" / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    assert torch.equal(logits(load_model("someone/small")[0]), logits(make_model()))
    shutil.rmtree(tmp_path / "models--someone--small")
    with pytest.raises(T3DError, match="no checkpoint someone/small: not a folder here") as error:
        load_model("someone/small")
    assert "\n" not in str(error.value)


def test_training_in_place_does_not_write_to_the_file_it_was_loaded_from(tmp_path):
    """Weights may be the mapped file's own pages; what is written to is a copy."""
    save_model(make_model(), tmp_path / "m")
    before = (tmp_path / "m" / "model.safetensors").read_bytes()
    model, _ = load_model(tmp_path / "m")
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2)
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before
    save_model(model, tmp_path / "m")  # over the file that is mapped
    assert torch.equal(logits(load_model(tmp_path / "m")[0]), logits(model))


def test_a_stop_token_that_pads_is_trained_too(tmp_path):
    save_model(make_model(eos_token_id=0), tmp_path / "m")  # config.json: pad_token_id 0
    model, _ = load_model(tmp_path / "m")
    model(torch.tensor([[0, 7]])).logits.sum().backward()
    assert model.get_input_embeddings().weight.grad[0].abs().max() > 0


def test_a_file_in_the_way_is_left_alone(tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(T3DError, match="a file has this name"):
        save_model(make_model(), tmp_path / "model")
    assert (tmp_path / "model").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
