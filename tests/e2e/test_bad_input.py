"""What a user can get wrong: one line on stderr, exit code 2, and nothing half-written."""

import json
import os
import shutil
from pathlib import Path

import pytest
from transformers.integrations import get_available_reporting_integrations

from t3d.models import load_tokenizer
from t3d.trajectories import TrajectoryDataset
from tests.e2e.program import assert_same_trajectories
from tests.e2e.test_run import weights


def refused(done, *said: str) -> None:
    assert done.code == 2, done
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    for text in said:
        assert text in done.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "recipe.yaml: No such file"),
        ("task: [", "not valid YAML"),
        ("", "not a recipe"),
        ("tasks: {name: x}", "(did you mean 'task'?)"),
        ("task: {nam: x}", "(did you mean 'task.name'?)"),
        ("task: {num_train: many}", "task.num_train must be int"),
        ("task: {name: word_problem, num_train: 1}", "(did you mean 'word_problems'?)"),
        ("task: {name: word_problems}", "num_train"),
        ("train: {objective: t3dd}", "(did you mean 't3d'?)"),
        ("train: {optim: sgdd}", "train: "),
        ("train: {group_size: 0}", "train.group_size must be at least 1, got 0"),
        ("train: {state: masked}", "train.state is 'trajectory', 'uniform' or 'all_masked', got 'masked'"),
        ("train: {reference_path: nowhere}", "train.reference_path: no such checkpoint folder: nowhere"),
        ("train: {objective: cj_grpo, rl_reward: accurate}", "train.rl_reward is 'accuracy' or 'format'"),
        ("train: {objective: tad, reference_sees: answers}", "train.reference_sees is 'prompt' or 'answer'"),
        ("eval: {checkpoints: {a: b}}", "eval.checkpoints must be list of str"),
        ("train: {report_to: [nowhere]}", "train.report_to: nowhere is not installed, or unknown"),
        ("eval: {grid: [{strategy: low_confidence}]}", "unknown strategy"),
        ("rollout: {steps: 0}", "rollout: steps must be at least 1"),
    ],
)
def test_recipe(t3d, tiny, text, said):
    if text is not None:
        (t3d.folder / "recipe.yaml").write_text(text)
    overrides = [] if text is None or "task" in text else ["task.num_train=2", "task.num_eval=2"]
    refused(t3d("run", "recipe.yaml", f"model.path={tiny}", *overrides), said)
    assert not (t3d.folder / "runs").exists()


def test_what_to_train_is_checked_before_what_is_there_to_train_on(t3d, write_recipe):
    recipe = write_recipe(t3d.folder)
    refused(t3d("train", recipe, "train.objective=t3dd"), "(did you mean 't3d'?)")
    refused(t3d("train", recipe, "train.report_to=nowhere"), "train.report_to: nowhere is not installed")


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_logger_that_is_not_installed_is_named_before_the_rollout(t3d, write_recipe, name):
    if name in get_available_reporting_integrations():
        pytest.skip(f"{name} is installed")
    recipe = write_recipe(t3d.folder, train={"report_to": name})
    for command in ("run", "train"):
        refused(t3d(command, recipe), f"train.report_to: {name} is not installed")
    assert not list((t3d.folder / "runs").rglob("*.parquet"))


DATA = {
    "missing": (None, "none.jsonl"),
    "not JSON": ('{"question": "a"}\n{"question": \n', "line 2"),
    "nothing in it": ("", "data.jsonl"),
    "no question": ('{"query": "a"}\n', "no field 'question'"),
    "an unknown role": ('{"messages": [{"role": "robot", "content": "a"}]}\n', "line 1: message 1 of messages has the"),
    "half a character": ('{"question": "a"}\n{"question": "b\\ud800"}\n', "line 2: question holds U+D800"),
    "an empty question": ('{"question": "How many?"}\n{"question": " "}\n', "line 2: the question is empty"),
    "two with one id": (
        '{"id": "a", "question": "How many?"}\n\n{"id": "a", "question": "How many?"}\n',
        "line 3: id 'a' was already used in line 1",
    ),
    "no object": ('{"question": "a"}\n["b"]\n', "line 2: expected an object with fields, got list"),
    "longer than the context": (
        json.dumps({"question": "short"}) + "\n" + json.dumps({"question": "How many " * 300}) + "\n",
        "the model's context is 512",
    ),
}


@pytest.mark.parametrize("case", DATA)
@pytest.mark.parametrize("key", ["path", "eval_path"])
def test_data(t3d, write_recipe, case, key):
    text, said = DATA[case]
    (t3d.folder / "good.jsonl").write_text('{"question": "How many?", "answer": "3"}\n')
    if text is not None:
        (t3d.folder / "data.jsonl").write_text(text)
    task = {"name": "prompts", "path": "good.jsonl", "num_train": None, "num_eval": None}
    task[key] = "none.jsonl" if text is None else "data.jsonl"
    refused(t3d("run", write_recipe(t3d.folder, task=task)), said)
    assert not (t3d.folder / "runs").exists()


def test_bad_prompts_are_dropped_counted_and_named(t3d, write_recipe):
    good = [{"id": f"good{i}", "question": f"How many apples are {i} and 2?", "answer": str(i + 2)} for i in range(4)]
    long, masked = ({"id": "long", "question": "How many " * 300}, {"id": "masked", "question": "What is <|MASK|>?"})
    data = [good[0], long, *good[1:], masked]
    (t3d.folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in data))
    task = {"name": "prompts", "path": "data.jsonl", "num_train": None, "num_eval": None}
    recipe = write_recipe(t3d.folder, task=task, eval={"grid": [{"steps": [1]}]})
    refused(t3d("rollout", recipe), "'long'", "the model's context is 512")
    refused(t3d("rollout", recipe, "task.bad_prompts=skip"), "task.bad_prompts is 'stop' or 'drop', got 'skip'")
    for _ in range(2):  # the second finds the same prompts in what the first has done
        done = t3d("rollout", recipe, "task.bad_prompts=drop")
        assert done.code == 0, done.stderr
        run = t3d.folder / "runs" / "recipe"
        assert [key for key, _ in TrajectoryDataset(run / "rollout").keys()]  # noqa: SIM118 == [record["id"] for record in good]
    log = (run / "log.txt").read_text()
    assert "training: 2 of 6 prompts dropped, which cannot be decoded: 'long', 'masked'" in log
    assert "prompt 'masked' contains the mask token" in log
    assert "2 prompts dropped" in log.split("rollout: 4 trajectories")[1].splitlines()[0]
    done = t3d("run", recipe, "task.bad_prompts=drop", "train.max_steps=1", "eval.teacher=false")
    assert done.code == 0, done.stderr
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["num_problems"], summary["dropped_prompts"]) == (4, 2)


def test_no_prompt_is_left(t3d, write_recipe):
    (t3d.folder / "data.jsonl").write_text(json.dumps({"question": "What is <|MASK|>?"}) + "\n")
    task = {"name": "prompts", "path": "data.jsonl", "num_train": None, "bad_prompts": "drop"}
    refused(t3d("rollout", write_recipe(t3d.folder, task=task)), "no training prompt can be decoded", "the mask token")


def _half(folder: Path):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def _config(folder: Path, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


CHECKPOINTS = {
    "missing": (shutil.rmtree, "no such checkpoint folder"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "half a config": (lambda folder: (folder / "config.json").write_text("{"), "config"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "half the weights": (_half, "cannot load the weights"),
    "another shape": (
        lambda folder: _config(folder, intermediate_size=48),
        "weights are missing or of the wrong shape",
    ),
    "another family": (lambda folder: _config(folder, model_type="llama"), "'llama'"),
    "no tokenizer": (lambda folder: [path.unlink() for path in folder.glob("*token*")], "no tokenizer"),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoint(t3d, write_recipe, tiny, case):
    damage, said = CHECKPOINTS[case]
    folder = t3d.folder / "model"
    shutil.copytree(tiny, folder)
    damage(folder)
    recipe = write_recipe(t3d.folder)
    refused(t3d("run", recipe, "model.path=model/"), said)
    assert not (t3d.folder / "runs" / "recipe").exists()
    refused(t3d("generate", "./model", "How many?"), said)


def test_a_reference_is_shown_answers_that_are_there(t3d, write_recipe, finished):
    """Of the recipe's own questions, and of trajectories that come from elsewhere."""
    lines = [{"id": "a", "question": "How many?", "answer": "3"}, {"id": "b", "question": "How many apples?"}]
    (t3d.folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    task = {"name": "prompts", "path": "data.jsonl", "num_train": None, "num_eval": None}
    recipe = write_recipe(t3d.folder, task=task)
    see = ["train.objective=tad", "train.reference_sees=answer"]
    refused(t3d("run", recipe, *see), "task 'prompts' has no reference answer to 'b'; give it one")
    source = f"rollout.source={finished[0] / 'rollout'}"
    refused(t3d("run", recipe, *see, source), "the prompt of trajectory 'word_problems/train/", "task.template")
    recipe = write_recipe(t3d.folder)
    refused(t3d("run", recipe, *see, "rollout.max_tokens=460"), "with its reference answer' has", "the model's context")
    assert not (t3d.folder / "runs" / "recipe").exists()


def test_settings_that_do_not_fit_the_model(t3d, write_recipe):
    recipe = write_recipe(t3d.folder)
    refused(t3d("run", recipe, "eval.grid=[{steps: [4, 5]}]"), "steps = 5 is more than block_size = 4")
    refused(t3d("run", recipe, "rollout.steps=5"), "steps = 5 is more than block_size = 4")
    refused(t3d("run", recipe, "model.dtype=float33"), "float33")
    assert not (t3d.folder / "runs" / "recipe").exists()


def test_a_run_folder_that_cannot_be_one(t3d, write_recipe):
    recipe = write_recipe(t3d.folder)
    (t3d.folder / "file").write_text("kept")
    refused(t3d("run", recipe, "run_dir=file"), "file")
    refused(t3d("run", recipe, "run_dir=file/run"), "Not a directory")
    (t3d.folder / "papers" / "train").mkdir(parents=True)
    refused(t3d("run", recipe, "run_dir=papers", "--force"), "not a run folder")
    assert (t3d.folder / "papers" / "train").is_dir()
    assert (t3d.folder / "file").read_text() == "kept"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(t3d, write_recipe):
    recipe = write_recipe(t3d.folder)
    (t3d.folder / "locked").mkdir(mode=0o555)
    refused(t3d("run", recipe, "run_dir=locked/run"), "Permission denied")


@pytest.mark.parametrize(
    ("largest_file", "stage"), [(400, None), (4000, "rollout"), (60_000, "train")], ids=["folder", "rollout", "train"]
)
def test_no_room(t3d, write_recipe, finished, largest_file, stage):
    recipe = write_recipe(t3d.folder)
    run = t3d.folder / "runs" / "recipe"
    done = t3d("run", recipe, largest_file=largest_file)
    assert done.code == 2, done
    *before, last = done.stderr.splitlines()
    assert last.startswith("error: ")
    assert "no space left" in last or "File too large" in last
    assert not any("error" in line for line in before)
    assert not (run / "student").exists()
    if stage is None:
        assert not run.exists()
        return
    assert not json.loads((run / stage / "stage.json").read_text())["complete"]
    assert t3d(stage, recipe).code == 0
    assert_same_trajectories(run, finished[0])
    assert stage == "rollout" or weights(run) == weights(finished[0])


def test_a_damaged_record_says_what_to_remove(t3d, write_recipe, finished):
    recipe = write_recipe(t3d.folder)
    run = t3d.folder / "runs" / "recipe"
    shutil.copytree(finished[0], run)
    (run / "train" / "stage.json").write_text("{")
    refused(t3d("run", recipe), "stage.json", "remove")


def test_a_prompt_that_is_not_characters(t3d, tiny):
    """As an argument that is not UTF-8 arrives."""
    for options in ((), ("--raw",)):
        refused(t3d("generate", str(tiny), "How many\udcff?", *options), "the prompt holds U+DCFF, half of a surrogate")


def test_usage_errors_and_unknown_commands(t3d):
    for arguments in (["run"], ["rum", "x"], ["run", "x", "--fast"], ["generate", "model"]):
        done = t3d(*arguments)
        assert done.code == 2
        assert done.stderr.startswith("Usage: ")
    done = t3d("run", "recipe.yaml", "--help")
    assert done.code == 0
    assert "section.key=value" in done.stdout


def test_trajectories_that_are_not_the_models_to_learn_from(t3d, write_recipe, tiny, finished):
    recipe, source = write_recipe(t3d.folder), f"rollout.source={finished[0] / 'rollout'}"
    done = t3d("convert", str(tiny), "b8", "--block-size", "8")
    assert done.code == 0, done.stderr
    refused(t3d("run", recipe, source, "model.path=b8/"), "blocks of 4 tokens, the model of 8")
    tokenizer = load_tokenizer(tiny)
    vocabulary = tokenizer.get_vocab()
    swapped = dict(zip(vocabulary, [*list(vocabulary.values())[:-2], *list(vocabulary.values())[:-3:-1]], strict=True))
    path = t3d.folder / "other"
    shutil.copytree(tiny, path)
    values = json.loads((path / "tokenizer.json").read_text())
    values["model"]["vocab"] = {word: swapped.get(word, id) for word, id in values["model"]["vocab"].items()}
    (path / "tokenizer.json").write_text(json.dumps(values))
    refused(t3d("run", recipe, source, "model.path=other/"), "a different tokenizer")
    (t3d.folder / "empty").mkdir()
    refused(t3d("run", recipe, "rollout.source=empty"), "empty")
    assert not (t3d.folder / "runs" / "recipe" / "student").exists()


def test_nothing_left_to_learn_from(t3d, write_recipe, finished):
    recipe, source = write_recipe(t3d.folder), f"rollout.source={finished[0] / 'rollout'}"
    done = t3d("run", recipe, source, "train.max_length=1")
    assert done.code == 2
    assert "no trajectory is left to train on: 40 too long" in done.stderr.splitlines()[-1]


def test_a_loss_that_is_not_a_number_names_the_batch_and_keeps_the_last_checkpoint(t3d, write_recipe, finished):
    recipe, source = write_recipe(t3d.folder), f"rollout.source={finished[0] / 'rollout'}"
    done = t3d("run", recipe, source, "train.learning_rate=1e30", "train.max_grad_norm=0", "train.save_steps=1")
    assert done.code == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: the loss became ")
    assert "word_problems/train/" in last
    assert "lower train.learning_rate" in last
    run = t3d.folder / "runs" / "recipe"
    assert any(run.glob("train/checkpoint-*/whole"))
    assert not (run / "student").exists()
