"""Training steps of SDAR-1.7B's shape in bf16, one packed row each: tokens per second, MFU and peak memory.

First, flex and dense attention must give one loss on two layers of the shape. MFU counts the products of the layers
alone, 2 per weight and token of a forward and 4 of a backward (2 with frozen weights): no head, no attention, nothing
that is computed again; the peak is what the GPU's maker says.
"""

import math
import tempfile
import time
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import yaml
from cells import Cells, Place
from engine import architecture
from train_step import make_trajectories
from transformers import PrinterCallback, TrainerCallback

from t3d.config import load_recipe
from t3d.distill import T3DConfig, T3DTrainer
from t3d.distill.lora import plain
from t3d.distill.meter import peak_memory
from t3d.models import SDARConfig, SDARForCausalLM
from t3d.pipeline.inputs import Inputs
from t3d.plan import longest_prompt, plan

WARM, STEPS = 2, 4
LORA = {"lora_rank": 64}
CASES = {  # name: thousands of tokens in a row, settings
    "4k t3d": (4, {}),
    "4k t3d, dense": (4, {"attention": "sdpa"}),
    "16k t3d": (16, {"gradient_checkpointing": True}),
    "16k mean_field": (16, {"gradient_checkpointing": True, "objective": "mean_field"}),
    "16k t3d, LoRA": (16, LORA | {"gradient_checkpointing": True}),
    "16k t3d, dense": (16, {"gradient_checkpointing": True, "attention": "sdpa"}),
    "4k mean_field": (4, {"objective": "mean_field"}),
    "4k t3d, LoRA": (4, LORA),
    "4k mean_field, LoRA": (4, LORA | {"objective": "mean_field"}),
    "16k mean_field, LoRA": (16, LORA | {"gradient_checkpointing": True, "objective": "mean_field"}),
    "4k t3d, compiled": (4, {"torch_compile": True}),
    "16k t3d, compiled": (16, {"torch_compile": True, "gradient_checkpointing": True}),
}


def cells(place: Place) -> Cells:
    found = {"check": partial(check, place)}
    return found | {name: partial(measure, place, *case) for name, case in CASES.items()}


class Watch(TrainerCallback):
    """When each step ended, and what was logged of it."""

    def __init__(self):
        self.ends: list[float] = []
        self.logs: list[dict] = []

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.logs.append(dict(logs))


def run(model, trajectories: list, steps: int, folder: str, before: dict | None = None, **settings):
    """The trainer after so many steps, what it logged of each, and the seconds between their ends. before: gets a copy
    of the weights that are trained, as they are before the first step."""
    base = {"save_strategy": "no", "logging_steps": 1, "report_to": "none", "disable_tqdm": True}
    arguments = T3DConfig(output_dir=folder, max_steps=steps, **base | settings)
    trainer = T3DTrainer(model, arguments, trajectories, callbacks=[watch := Watch()])
    trainer.remove_callback(PrinterCallback)
    if before is not None:
        before |= {n: p.detach().float().cpu().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    return trainer, watch.logs, [b - a for a, b in pairwise(watch.ends)]


def random_model(place: Place, dtype: torch.dtype, **changes):
    shape = "tiny" if place.rehearse else "1.7b"
    torch.manual_seed(0)
    config = SDARConfig(**architecture(shape) | {"max_position_embeddings": 4096, "pad_token_id": 0} | changes)
    with torch.device(place.device):
        return SDARForCausalLM(config).to(dtype)


def sizes(place: Place) -> tuple[int, int]:
    """Tokens of a prompt; of a trajectory, its noisy copy included."""
    return (16, 64) if place.rehearse else (128, 2048)


def rows(place: Place, thousands: int, vocabulary: int):
    """Trajectories of which each step's batch makes one row of so many tokens, and how many a batch has."""
    prompt, one = sizes(place)
    response, count = (one - prompt) // 2, thousands // 2
    lengths = {"prompts": (prompt, prompt + 1), "responses": (response, response + 1)}
    data = make_trajectories(4 * count, **lengths, tokens=(1, vocabulary - 1))
    for trajectory in data:
        trajectory.correct = True
    return data, count


def adapted(place: Place, settings: dict) -> dict:
    """The settings, or what a CPU has in their place."""
    swap = {"attention": {}, "torch_compile": {"torch_compile_backend": "eager"}}
    if not place.rehearse:
        swap = {}
    found = {k: v for name, value in settings.items() for k, v in swap.get(name, {name: value}).items()}
    return found | {"bf16": True, "use_cpu": place.rehearse, "on_policy_share": 0.0}


def check(place: Place) -> dict:
    found = {}
    for name, settings in {"flex": {}, "dense": {"attention": "sdpa"}}.items():
        model = random_model(place, torch.float32, num_hidden_layers=2)
        data, count = rows(place, 4, model.config.vocab_size)
        with tempfile.TemporaryDirectory() as folder:
            settings = adapted(place, settings) | {"per_device_train_batch_size": count}
            found[name] = [log["loss"] for log in run(model, data, 2, folder, **settings)[1]]
    apart = max(abs(a - b) / abs(a) for a, b in zip(*found.values(), strict=True))
    return {"ok": apart < 0.01, "loss": apart} | found


def measure(place: Place, thousands: int, settings: dict) -> dict:
    settings = adapted(place, settings)
    warm, steps = (1, 1) if place.rehearse else (WARM, STEPS)
    lora = "lora_rank" in settings
    model = random_model(place, torch.bfloat16 if lora else torch.float32)
    layers = sum(p.numel() for p in model.model.layers.parameters())
    place.clean()  # it was made in float32
    data, count = rows(place, thousands, model.config.vocab_size)
    settings["per_device_train_batch_size"] = count
    with tempfile.TemporaryDirectory() as folder:
        planned = plan_of(place, settings, folder)
        trainer, logs, seconds = run(model, data, warm + steps, folder, **settings)
    step = sorted(seconds[warm - 1 :])[steps // 2]
    tokens = trainer.train_dataset[0]["input_ids"].size * count
    # the trainer counts a backward as two forwards; of frozen weights there is no gradient, so it is one
    weights = plain(trainer.model).num_parameters(exclude_embeddings=True)
    passed = trainer.state.total_flos / (warm + steps) / (2 * weights)  # tokens through any model
    peak = trainer.meter.peak
    return {
        "tokens": tokens,
        "tokens_per_second": tokens / step,
        "step_seconds": step,
        "first_step_seconds": seconds[0],
        "mfu": peak and 2 * layers * (passed - tokens * lora) / step / peak,
        "peak_gb": peak_memory(trainer.args.device) / 1e9,
        "plan_gb": planned / 1e9,
        "finite": all(math.isfinite(log["loss"]) for log in logs),
    }


def plan_of(place: Place, settings: dict, folder: str) -> float:
    """Bytes that `t3d plan` says such a run needs to train; its prompts are the embedded task's, and its responses as
    long as makes a row of as many tokens."""
    shape = architecture("tiny" if place.rehearse else "1.7b")
    half = "bfloat16" if "lora_rank" in settings else "float32"
    given = {
        "model": {"architecture": shape | {"max_position_embeddings": 4096}, "dtype": half},
        "task": {"name": "word_problems", "num_train": 8, "num_eval": 2},
        "train": {name: value for name, value in settings.items() if name != "use_cpu"},
    }
    path = Path(folder) / "recipe.yaml"
    path.write_text(yaml.safe_dump(given))
    recipe = load_recipe(path)
    response = (sizes(place)[1] - longest_prompt(Inputs(recipe))) // 2
    recipe = replace(recipe, rollout=replace(recipe.rollout, max_tokens=max(1, response)))
    return sum(part.bytes for part in plan(recipe) if part.phase == "train")
