"""Whether the GPU's paths compute what the CPU's do, which the tests hold against plain references.

tokens: the engine's answers in float32, token for token and step for step, with each attention. training: losses and
the weights' changes of a few steps of SGD, that is gradients, beside those on the CPU. bf16: how often a greedy token
is another one when the batch has another shape.
"""

import tempfile
from functools import cache, partial
from itertools import product

import torch
from cells import Cells, Place
from engine import make_model
from train import run
from train_step import make_trajectories

from t3d.decoding import DecodingConfig
from t3d.distill import T3DConfig
from t3d.distill.lora import quantisation
from t3d.embedded import EMBEDDED
from t3d.engine import Engine
from t3d.models import load_model

ATTENTION = {
    "sdpa": {"attention": "sdpa"},
    "flex": {"attention": "flex", "cuda_graphs": False},
    "graphs": {"attention": "flex", "cuda_graphs": True},
}
TRAINING = {  # settings, with which the GPU must agree with the CPU's plain training, and how well
    "flex": ({}, 1e-3),
    "dense": ({"attention": "sdpa"}, 1e-3),
    "mean_field": ({"objective": "mean_field", "on_policy_share": 0.0}, 1e-3),
    "groups of 2": ({"group_size": 2}, 1e-3),
    "gradient checkpointing": ({"gradient_checkpointing": True}, 1e-3),
    "cheap recomputation": ({"recompute": "cheap"}, 1e-3),
    "offloaded reference": ({"reference_offload": True}, 1e-3),
    "compiled": ({"torch_compile": True}, 1e-3),
    "LoRA": ({"lora_rank": 8}, 1e-3),
    "bf16": ({"bf16": True}, 0.1),
    "LoRA in 4 bits": ({"lora_rank": 8, "lora_4bit": True, "bf16": True}, 0.5),
}
SAME = ("objective", "on_policy_share", "group_size", "lora_rank")  # settings that the CPU's training has, too


def cells(place: Place) -> Cells:
    models = ["tiny"] if place.rehearse else ["embedded", "0.2b"]
    found = {}
    for model, scenario, attention in product(models, SCENARIOS, ATTENTION):
        found[f"tokens {model} {scenario} {attention}"] = partial(tokens, place, model, scenario, attention)
    for name in TRAINING:
        found[f"training {name}"] = partial(training, place, name)
    for model, attention in product(models, ATTENTION):
        found[f"bf16 {model} {attention}"] = partial(bf16, place, model, attention)
    return found


@cache
def made(name: str, device: str, dtype: torch.dtype = torch.float32):
    """A model; random ones have the same weights on every device."""
    if name == "embedded":
        return load_model(EMBEDDED, device=device, dtype=dtype)[0]
    return make_model(name, "cpu", torch.float32).to(device, dtype)


def draw(seed: int, lengths: list[int], vocabulary: int) -> list[list[int]]:
    """Random prompts. The first ids and the last one may be special ones."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, vocabulary - 1, (n,), generator=generator).tolist() for n in lengths]


def mixed(vocabulary: int, scale: int):
    """Other lengths and settings in one batch, more prompts than places."""
    configs = [
        DecodingConfig(steps=1),
        DecodingConfig(steps=2),
        DecodingConfig(steps=4),
        DecodingConfig(steps=2, temperature=0.8),
        DecodingConfig(strategy="low_confidence_dynamic", threshold=0.8),
        DecodingConfig(strategy="entropy_bounded_eb"),
    ]
    prompts = draw(1, [scale * n // 8 for n in (1, 9, 17, 3, 40, 8, 25, 12)], vocabulary)
    return prompts, [configs[i % len(configs)] for i in range(len(prompts))], {"max_batch_size": 5}


def prefix(vocabulary: int, scale: int):
    """Prompts that begin alike, whose pages are shared."""
    (head, *tails) = draw(2, [scale * 5, *(3 + n for n in range(5))], vocabulary)
    return [head + tail for tail in tails], [DecodingConfig(steps=2)] * 5, {"prefix_cache": True, "max_batch_size": 3}


def in_flight(vocabulary: int, scale: int):
    """Several blocks of a sequence at once, some with a copy of the first, and drafts of what follows."""
    three = {"strategy": "low_confidence_dynamic", "threshold": 0.6, "blocks_in_flight": 3}
    configs = [
        DecodingConfig(**three),
        DecodingConfig(**three, recheck=0.4),
        DecodingConfig(steps=2, flight="look_ahead", depth=2),
    ]
    prompts = draw(3, [scale * n // 8 for n in (5, 13, 22)], vocabulary)
    return prompts, configs, {}


SCENARIOS = {"mixed": mixed, "prefix": prefix, "in flight": in_flight}


@cache
def expected(place: Place, model: str, scenario: str):
    """The CPU's answers, without sharing pages."""
    network = made(model, "cpu")
    prompts, configs, _ = asked(place, scenario, network)
    return Engine(network).generate(prompts, configs)


def asked(place: Place, scenario: str, network):
    scale, new = (8, 8) if place.rehearse else (64, 48)
    prompts, configs, engine = SCENARIOS[scenario](network.config.vocab_size, scale)
    given = {"max_tokens": new, "stop_ids": ()}
    configs = [DecodingConfig(**{k: v for k, v in vars(c).items() if k in FIELDS} | given) for c in configs]
    return prompts, configs, engine | ({"page_size": 16} if place.rehearse else {})


FIELDS = DecodingConfig.__dataclass_fields__


def tokens(place: Place, model: str, scenario: str, attention: str) -> dict:
    want = expected(place, model, scenario)
    network = made(model, place.device)
    prompts, configs, settings = asked(place, scenario, network)
    engine = Engine(network, **ATTENTION[attention], **settings)
    got = engine.generate(prompts, configs)
    pairs = list(zip(got, want, strict=True))
    equal = [(a.response_ids, a.step_map) == (b.response_ids, b.step_map) for a, b in pairs]
    same = [(a.confidence, b.confidence) for (a, b), ok in zip(pairs, equal, strict=True) if ok]
    apart = max((abs(x - y) for both in same for x, y in zip(*both, strict=True)), default=None)
    found = {"ok": all(equal), "equal": sum(equal), "of": len(equal), "confidence": apart}
    if not all(equal):
        number = equal.index(False)
        a, b = pairs[number]
        places = (n for n, (x, y) in enumerate(zip(a.response_ids, b.response_ids, strict=False)) if x != y)
        found["first"] = f"sequence {number}, token {next(places, None)}"
    if settings.get("prefix_cache"):
        found["cached"] = engine.stats.cached_tokens
        found["ok"] &= found["cached"] > 0
    return found


def training(place: Place, name: str) -> dict:
    settings, limit = TRAINING[name]
    losses, change = plainly(place, tuple((k, v) for k, v in settings.items() if k in SAME))
    got, other = trained(place, place.device, settings)
    apart = float((change - other).norm() / change.norm())
    difference = max(abs(a - b) / abs(a) for a, b in zip(losses, got, strict=True))
    ok = difference < limit and apart < limit
    return {"ok": ok, "loss": difference, "gradient": apart, "limit": limit, "losses": got}


@cache
def plainly(place: Place, settings: tuple):
    return trained(place, "cpu", dict(settings))


def trained(place: Place, device: str, settings: dict):
    """Losses of a few steps of SGD, and the change of all weights that are trained, on the CPU."""
    if place.rehearse:  # what a CPU lacks
        swap = {"torch_compile": {"torch_compile_backend": "eager"}, "lora_4bit": {}}
        settings = {k: v for name, value in settings.items() for k, v in swap.get(name, {name: value}).items()}
    settings = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.05, "random_ratio": 0.0} | settings
    settings |= {"per_device_train_batch_size": 3, "lr_scheduler_type": "constant", "use_cpu": device == "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        if settings.get("lora_4bit"):
            how = quantisation(T3DConfig(output_dir=folder, **settings))
            model = load_model(EMBEDDED, device=device, dtype=torch.bfloat16, quantisation=how)[0]
        else:
            model = load_model(EMBEDDED, device=device, dtype=torch.float32)[0]
        most = 12 if place.rehearse else 90
        data = make_trajectories(9, prompts=(5, 40), responses=(10, most), tokens=(4, model.config.vocab_size))
        for trajectory in data:
            trajectory.correct = True
        trainer, logs, _ = run(model, data, 3, folder, before := {}, **settings)
    after = {name: p.detach().float().cpu() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return [log["loss"] for log in logs], torch.cat([(after[name] - before[name]).ravel() for name in sorted(before)])


def bf16(place: Place, model: str, attention: str) -> dict:
    """Prompts decoded one by one and in batches; a change is where an answer first differs from the one alone."""
    network = made(model, place.device, torch.bfloat16)
    many = 2 if place.rehearse else 32
    prompts = draw(4, [12 + n for n in range(many)], network.config.vocab_size)
    config = DecodingConfig(steps=2, max_tokens=4 if place.rehearse else 128, stop_ids=())
    found = {}
    answers = {
        batch: Engine(network, max_batch_size=batch, **ATTENTION[attention]).generate(prompts, config)
        for batch in (1, many // 4 or 1, many)
    }
    for batch in list(answers)[1:]:
        same = changed = 0
        for one, other in zip(answers[1], answers[batch], strict=True):
            pairs = zip(one.response_ids, other.response_ids, strict=True)
            first = next((n for n, (a, b) in enumerate(pairs) if a != b), None)
            changed += first is not None
            same += len(one.response_ids) if first is None else first
        rate = 1000 * changed / max(same + changed, 1)
        found[f"batch {batch}"] = {"changed": changed, "of": many, "per_1000_tokens": rate}
    return found
