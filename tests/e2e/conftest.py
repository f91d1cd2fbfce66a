"""The real command line on a tiny model. Importing torch and transformers takes seconds, so commands run in processes
forked from one that has imported them; `test_console.py` starts the installed program itself."""

import multiprocessing
import os
from pathlib import Path

import pytest
import yaml

from tests.conftest import make_model
from tests.e2e.program import Done, Program

RECIPE = {
    "seed": 3,
    "model": {"device": "cpu"},
    "task": {"name": "word_problems", "num_train": 40, "num_eval": 6},
    "rollout": {"max_tokens": 32, "save_every": 8},
    "train": {
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "round_interval": 3,
    },
    "eval": {"grid": [{"steps": [4, 1]}], "max_tokens": 32},
}


@pytest.fixture(scope="session")
def forkserver():
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["t3d.pipeline", "t3d.generate", "t3d.cli"])
    return context


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A checkpoint folder: random weights, the embedded task's tokenizer."""
    from t3d.models import save_model
    from t3d.tasks.word_problems import build_tokenizer

    tokenizer = build_tokenizer()
    model = make_model(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    model.config.mask_token_id, model.config.pad_token_id = tokenizer.mask_token_id, tokenizer.pad_token_id
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_model(model, folder, tokenizer)
    return folder


@pytest.fixture
def t3d(tmp_path, forkserver) -> Program:
    return Program(tmp_path, forkserver)


@pytest.fixture(scope="session")
def write_recipe(tiny):
    """Writes the tiny recipe, changed by dotted keys, into a folder."""

    def write(folder: Path, name: str = "recipe.yaml", **sections) -> str:
        recipe = {key: dict(value) if isinstance(value, dict) else value for key, value in RECIPE.items()}
        recipe["model"]["path"] = str(tiny)
        for section, value in sections.items():
            recipe[section] = recipe.get(section, {}) | value if isinstance(value, dict) else value
        (folder / name).write_text(yaml.safe_dump(recipe))
        return name

    return write


@pytest.fixture(scope="session")
def finished(tmp_path_factory, forkserver, write_recipe) -> tuple[Path, Done]:
    """A folder with an uninterrupted run of the tiny recipe in `runs/recipe`; not to be written to."""
    folder = tmp_path_factory.mktemp("finished")
    done = Program(folder, forkserver)("run", write_recipe(folder))
    assert done.code == 0, done.stderr
    return folder / "runs" / "recipe", done
