"""The recipe: what is accepted, what it becomes, and the one line that says what is wrong with it."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from t3d.config import OWNED, SECTIONS, describe, keys, load_recipe
from t3d.distill.objective import OBJECTIVES
from t3d.errors import T3DError
from t3d.pipeline.settings import differences
from t3d.study import load_study


@pytest.fixture
def recipe(tmp_path):
    def write(text: str, name: str = "some.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_sections_are_typed_and_defaults_fill_the_rest(recipe):
    path = recipe("seed: 3\nrollout: {temperature: 1, stop_ids: [1, 2]}\ntrain:\n  learning_rate: 2e-3\neval:\n")
    found = load_recipe(path)
    assert found.seed == 3
    assert found.run_dir == "runs/some"
    assert found.rollout.temperature == 1.0
    assert found.rollout.stop_ids == (1, 2)
    assert found.train["learning_rate"] == 0.002
    assert found.train["objective"] == "t3d"
    assert "weight_decay" not in found.train  # inherited, not set: transformers' default holds
    assert list(found.eval.grid) == [{"steps": [4, 2, 1]}]


def test_overrides_win_in_order_and_are_yaml(recipe):
    path = recipe("task: {num_train: 5}\n")
    overrides = ["task.num_train=7", "task.num_train=8", "eval.grid=[{steps: 2}]", "train.learning_rate=1e-4"]
    overrides.append("run_dir=a=b")
    found = load_recipe(path, [*overrides, "task.path=", "train.lr_scheduler_kwargs.min_lr_rate=0.5"])
    assert found.task.num_train == 8
    assert list(found.eval.grid) == [{"steps": 2}]
    assert found.train["learning_rate"] == 1e-4
    assert found.run_dir == "a=b"
    assert found.task.path is None
    assert found.train["lr_scheduler_kwargs"] == {"min_lr_rate": 0.5}


def test_interpolation_sees_overrides_and_defaults(recipe):
    path = recipe("run_dir: runs/x-seed${seed}\ntask: {data_seed: '${seed}', num_eval: '${rollout.save_every}'}\n")
    assert load_recipe(path).run_dir == "runs/x-seed0"
    found = load_recipe(path, ["seed=4"])
    assert (found.run_dir, found.task.data_seed, found.task.num_eval) == ("runs/x-seed4", 4, found.rollout.save_every)


def test_the_resolved_recipe_is_a_recipe(recipe):
    text = "rollout: {stop_ids: [3]}\ntrain: {weight_decay: 0.1}\nmodel: {architecture: {hidden_size: 8}}\n"
    first = load_recipe(recipe(text), ["run_dir=r"])
    assert load_recipe(recipe(first.to_yaml(), "resolved.yaml")) == first


WRONG = {
    "seed: [1": "line 2, column",
    "seed: 1\nseed: 2": "duplicate key seed",
    "just text": "unknown key 'just text'",
    "- 1\n- 2": "expected sections of keys",
    "5": "expected sections of keys",
    "": "expected sections of keys",
    "rollouts: {n: 1}": "unknown section 'rollouts' (did you mean 'rollout'?)",
    "num_train: 3": "unknown key 'num_train' (did you mean 'task.num_train'?)",
    "rollout: {temprature: 1}": "unknown key 'rollout.temprature' (did you mean 'rollout.temperature'?)",
    "train: {learning_rates: 1}": "(did you mean 'train.learning_rate'?)",
    "rollout: 3": "rollout is a section",
    "seed: abc": "seed must be int, got 'abc' (str)",
    "seed: 1.5": "seed must be int, got 1.5 (float)",
    "seed: true": "seed must be int, got True (bool)",
    "task: {num_train: 1.5}": "task.num_train must be int or null, got 1.5 (float)",
    "rollout: {temperature: hot}": "rollout.temperature must be float, got 'hot' (str)",
    "rollout: {temperature: null}": "rollout.temperature must be float, got null",
    "rollout: {stop_ids: [a]}": "rollout.stop_ids must be list of int or null, got ['a'] (list)",
    "rollout: {stop_ids: 3}": "rollout.stop_ids must be list of int or null, got 3 (int)",
    "task: {name: 3}": "task.name must be str, got 3 (int)",
    "train: {mask_per_block: 1}": "train.mask_per_block must be bool, got 1 (int)",
    "train: {max_steps: '10'}": "train.max_steps must be int, got '10' (str)",
    "train: {output_dir: x}": "train.output_dir cannot be set here",
    "eval: {grid: 4}": "eval.grid must be list of",
    "eval: {grid: [{steps: many}]}": "item 1 of grid: steps must be int",
    "eval: {grid: [{stepz: 4}]}": "unknown key 'stepz' (did you mean 'steps'?)",
    "eval: {steps: [4]}": "eval.steps is now in the grid: eval.grid=",
    "seed: 2001-01-01": "seed must be int",
    "rollout: {top_p: 2}": "rollout: top_p must lie in 0..1, above 0, got 2",
    "rollout: {save_every: 0}": "rollout: save_every must be at least 1",
    "rollout: {retries: -1}": "rollout: retries must not be negative",
    "rollout: {retry_temperature: 0}": "rollout: retry_temperature must be above 0, got 0",
    "engine: {max_batch_size: 0}": "engine: max_batch_size must be at least 1",
    "run_dir: ${nowhere}": "run_dir",
    "model:\n  path: ???": "model.path is left open (???)",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_is_said_in_one_line(recipe, text):
    path = recipe(text)
    with pytest.raises(T3DError) as error:
        load_recipe(path)
    message = str(error.value)
    assert WRONG[text] in message
    assert str(path) in message
    assert "\n" not in message


@pytest.mark.parametrize("override", ["seed", "=3", "seed=[1", "x.y=1", "seed=a", "rollout=3", "train.seed=1"])
def test_a_wrong_override_is_named(recipe, override):
    with pytest.raises(T3DError) as error:
        load_recipe(recipe("seed: 1"), [override])
    assert repr(override) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_folder_and_binary_files(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name, said in {"none.yaml": "No such file", ".": "Is a directory", "binary.yaml": "not a text file"}.items():
        with pytest.raises(T3DError, match=said):
            load_recipe(tmp_path / name)


def test_objectives_and_schedules_are_checked_with_the_trainers_own_words(recipe):
    with pytest.raises(T3DError, match="did you mean 't3d'"):
        load_recipe(recipe("train: {objective: t3dd}")).training_arguments("x")
    with pytest.raises(T3DError, match=r"lr_scheduler|SchedulerType") as error:
        load_recipe(recipe("train: {lr_scheduler_type: sideways}")).training_arguments("x")
    assert "\n" not in str(error.value)


def test_training_arguments_get_the_recipes_seed_and_device(recipe):
    arguments = load_recipe(recipe("seed: 5\nmodel: {device: cpu}")).training_arguments("x")
    assert (arguments.seed, arguments.use_cpu, arguments.output_dir) == (5, True, "x")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_without_an_accelerator_training_is_on_the_cpu_in_bfloat16_too(recipe):
    arguments = load_recipe(recipe("train: {bf16: true}")).training_arguments("x")
    assert (arguments.bf16, arguments.device.type) == (True, "cpu")


def test_every_key_is_documented_and_its_default_is_valid():
    for section in ("", *SECTIONS):
        for key in keys(section).values():
            assert key.help, key.dotted
            if key.default is not None:
                key.check(key.default, "default")


def test_the_description_is_a_recipe_of_the_defaults(recipe):
    found = yaml.safe_load(describe(everything=True))
    assert set(found) == {*SECTIONS, *keys()}
    assert all(set(found[section]) == set(keys(section)) for section in SECTIONS)
    assert not OWNED.keys() & found["train"].keys()
    assert load_recipe(recipe(describe(), "same.yaml")) == load_recipe(recipe("seed: 0", "same.yaml"))


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 5), st.floats(allow_nan=False), st.text("ab1.-e", max_size=4)
)
ALL_KEYS = [key for section in SECTIONS for key in keys(section).values()]


@given(st.sampled_from(ALL_KEYS), st.one_of(SCALARS, st.lists(SCALARS, max_size=2)))
def test_any_value_is_taken_as_its_type_or_refused_by_name(key, value):
    try:
        taken = key.check(value, "here")
    except T3DError as error:
        assert str(error).startswith(f"here: {key.dotted} must be ")  # noqa: PT017
    else:
        assert taken == value or list(taken) == value


FOLDER = Path(__file__).parents[1] / "recipes"
STUDIES = sorted([*FOLDER.glob("study*.yaml"), *FOLDER.glob("smollm2/study*.yaml")])
RECIPES = sorted({*FOLDER.glob("*.yaml"), *FOLDER.glob("smollm2/*.yaml")} - set(STUDIES))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_variant_of_our_studies_is_a_recipe(path):
    assert load_study(path).jobs


def test_every_objective_is_in_a_study():
    text = "".join(path.read_text() for path in STUDIES)
    assert set(OBJECTIVES) <= set(re.findall(r"train\.objective=(\w+)", text))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_ours_is_one(path, tmp_path):
    values = yaml.safe_load(path.read_text())
    left_open = [
        f"{s}.{k}=x" for s, keys in values.items() if isinstance(keys, dict) for k, v in keys.items() if v == "???"
    ]
    found = load_recipe(path, left_open)
    assert found.run_dir.startswith("runs/")
    if path.stem.startswith("sdar-"):  # as published, on 8 GPUs
        train = found.train
        assert 8 * train["per_device_train_batch_size"] * train["gradient_accumulation_steps"] == 256
        assert (train["alpha"], train["beta"], train["path_lambda"], train["path_k"]) == (0.5, 0.1, 0.2, 4)
        assert (train["mask_exponent"], train["round_interval"], train["learning_rate"]) == (8, 10, 1e-5)
        assert (train["lr_scheduler_type"], found.rollout.temperature) == ("cosine_with_min_lr", 0.1)


def test_a_key_that_a_record_lacks_means_what_versions_without_it_did():
    recipe = {
        "train.objective": "mean_field",
        "train.mf_forward": 0.3,
        "train.mf_anchor": 0.5,
        "eval.grid": [{"steps": 4}],
    }
    old = {name: value for name, value in recipe.items() if name not in ("train.mf_forward", "eval.grid")}
    old |= {"eval.steps": [4, 2], "eval.threshold": [0.9]}  # what versions before the grid had
    assert list(differences(old, recipe)) == [("train.mf_forward", 0.0, 0.3)]
    assert list(differences(old, recipe | {"train.mf_forward": 0.0})) == []
    del old["train.mf_anchor"]  # its default is what went without saying
    assert list(differences(old, recipe | {"train.mf_forward": 0.0})) == []
    assert list(differences(recipe | {"train.weight_decay": 0.1}, recipe)) == [("train.weight_decay", 0.1, 0.0)]
