"""Decoding at published shapes, random weights in bf16: the engine, the plain sampler, and autoregressive decoding.

First, on two layers in float32, the engine must give the plain sampler's tokens. Then, by importance: prompts of 256
tokens, 256 new ones, a fixed number of steps per block; autoregressive decoding is transformers' `generate` of the
same weights with a static cache, which it compiles on a GPU. `tokens_per_second` counts steady decoding, without the
prompts' forward; shares are of what the GPU's memory and matrix units give in this run.
"""

import statistics
import time
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise, product

import torch
from cells import Cells, Place
from correct import ATTENTION, draw
from engine import BLOCK, make_model, plain_sampler
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen3ForCausalLM, StoppingCriteria

from t3d.decoding import DecodingConfig
from t3d.engine import Engine
from t3d.engine.intake import make_requests
from t3d.engine.kv_cache import bytes_per_token

SHAPES, BATCHES, STEPS = ("1.7b", "4b", "8b"), (1, 8, 32, 128), (1, 2, 4)


def engine_cell(shape: str, batch: int, steps: int, kind: str) -> str:
    return f"{shape} batch {batch} steps {steps} {kind}"


def plain_cell(shape: str, steps: int) -> str:
    return f"{shape} batch 1 steps {steps} plain"


def autoregressive_cell(shape: str, batch: int) -> str:
    return f"{shape} batch {batch} autoregressive"


def cells(place: Place) -> Cells:
    shapes, batches, all_steps = (("tiny",), (2,), (1, 2)) if place.rehearse else (SHAPES, BATCHES, STEPS)
    early = {"graphs": 0, "sdpa": 1, "flex": 2, 1: 0, 128: 0, 32: 1, 8: 2}  # what is asked first; others last
    ranked = []  # (rank, name, what it does)
    for shape, kind in product(shapes, ATTENTION):
        ranked.append((-1 if shape == shapes[0] else 3, f"{shape} check {kind}", partial(check, place, shape, kind)))
    for shape, batch in product(shapes, batches):
        found = partial(autoregressive, place, shape, batch)
        ranked.append((early.get(batch, 0) + (shape == "8b"), autoregressive_cell(shape, batch), found))
        for kind, steps in product(ATTENTION, all_steps):
            rank = early[kind] + early.get(batch, 0) + {1: 0, 4: 1, 2: 2}[steps] + (shape == "8b")
            found = partial(engine, place, shape, kind, batch, steps)
            ranked.append((rank, engine_cell(shape, batch, steps, kind), found))
    for shape, steps in product(shapes, all_steps):
        ranked.append((1 + (shape == "8b"), plain_cell(shape, steps), partial(plain, place, shape, steps)))
    ranked.sort(key=lambda cell: cell[0])
    return {"machine": partial(machine, place), **{name: work for _, name, work in ranked}}


@cache
def model(place: Place, shape: str):
    found = make_model(shape, place.device, torch.bfloat16)
    place.clean()  # it was made in float32
    return found


def lengths(place: Place) -> tuple[int, int, int]:
    """Tokens of a prompt, new ones, and steps under the profiler."""
    return (8, 16, 2) if place.rehearse else (256, 256, 8)


@cache
def machine(place: Place) -> dict:
    """What the memory and the matrix units give: a large copy, read and written, and a large bf16 product."""
    n, repeat = (256, 1) if place.rehearse else (8192, 10)
    a, b = (torch.randn(n, n, device=place.device).to(torch.bfloat16) for _ in range(2))
    source = torch.randn(16 * n, n, device=place.device)
    target = torch.empty_like(source)

    def best(work) -> float:
        work()
        return min(place.seconds(lambda: [work() for _ in range(repeat)]) / repeat for _ in range(3))

    product_seconds, copy_seconds = best(lambda: a @ b), best(lambda: target.copy_(source))
    return {"flops": 2 * n**3 / product_seconds, "bytes_per_second": 2 * source.nbytes / copy_seconds}


def check(place: Place, shape: str, kind: str) -> dict:
    """Tokens of two layers in float32, greedy, beside the plain sampler's."""
    network = make_model(shape, place.device, torch.float32, num_hidden_layers=2 - place.rehearse)
    prompts = draw(0, [8, 20, 40], network.config.vocab_size)  # whole blocks, which is all that the sampler takes
    config = DecodingConfig(steps=2, max_tokens=8 if place.rehearse else 32, stop_ids=())
    got = Engine(network, **ATTENTION[kind]).generate(prompts, config)
    want = [plain_sampler(network, prompt, config.max_tokens, config.steps) for prompt in prompts]
    equal = sum(a.response_ids == b for a, b in zip(got, want, strict=True))
    return {"ok": equal == len(want), "equal": equal, "of": len(want)}


def engine(place: Place, shape: str, kind: str, batch: int, steps: int) -> dict:
    network, (prompt, new, watched) = model(place, shape), lengths(place)
    prompts = draw(1, [prompt] * batch, network.config.vocab_size)
    config = DecodingConfig(steps=steps, max_tokens=new, stop_ids=())
    # all prompts in one forward, so that the sequences stay in step and every shape is met while warming up
    decoder = Engine(network, max_batch_size=batch, prefill_tokens=batch * prompt, **ATTENTION[kind])
    requests = make_requests(prompts, config, None, None, network, None)
    session = decoder.open(requests)

    def begin(tokens: int) -> None:
        for request in requests:
            session.add(replace(request, config=replace(request.config, max_tokens=tokens)))

    def finish() -> list[float]:
        seconds = []
        while not session.done:
            seconds.append(place.seconds(session.step))
        return seconds

    begin(2 * BLOCK)
    finish()
    begin(new)
    seconds = finish()
    steady = statistics.median(seconds[1:])
    found = {
        "tokens_per_second": batch * BLOCK / steps / steady,
        "with_prompts": batch * new / sum(seconds),
        "step_ms": 1e3 * steady,
        "slowest_step_ms": 1e3 * max(seconds[1:]),
        "prompts_ms": 1e3 * seconds[0],
    }
    begin((-(-watched // steps) + 2) * BLOCK)
    session.step()
    found |= traced(place, session.step, watched)
    finish()
    found["host_ms"] = None if place.rehearse else found["step_ms"] - found["device_ms"]
    return found | shares(place, network, batch, steady, *per_step(network, batch, steps))


def traced(place: Place, step, count: int) -> dict:
    """Kernels of some steps: how many each launched, how long they took, and the ten that took longest in all."""
    on = ProfilerActivity.CPU if place.rehearse else ProfilerActivity.CUDA
    with profile(activities=[on]) as trace:
        for _ in range(count):
            step()
        place.wait()
    kind = torch.autograd.DeviceType.CPU if place.rehearse else torch.autograd.DeviceType.CUDA
    events = [event for event in trace.events() if event.device_type == kind]
    total: dict[str, list[float]] = {}
    for event in events:
        total.setdefault(event.name[:90], []).append(event.time_range.elapsed_us() / 1e3)
    longest = sorted(total, key=lambda name: -sum(total[name]))[:10]
    return {
        "kernels": len(events) / count,
        "device_ms": sum(map(sum, total.values())) / count,
        "longest": [[name, len(total[name]) / count, sum(total[name]) / count] for name in longest],
    }


def per_step(network, batch: int, steps: int) -> tuple[float, float]:
    """Tokens that a step carries through the layers, and those whose logits it computes, means over a block's steps."""
    masked, wanted = BLOCK, 0
    for step in range(steps):
        wanted += masked
        masked -= BLOCK // steps + (step < BLOCK % steps)
    return batch * BLOCK * (steps + 1) / steps, batch * wanted / steps


def shares(place: Place, network, batch: int, seconds: float, tokens: float, wanted: float) -> dict:
    """What reading the weights and the cache once, and the products with weights, would take at the machine's best."""
    layers = sum(p.numel() for p in network.model.layers.parameters())
    head = network.lm_head.weight.numel()
    prompt, new, _ = lengths(place)
    read = 2 * (layers + head) + batch * (prompt + new / 2) * bytes_per_token(network)
    done = 2 * (layers * tokens + head * wanted)
    best = machine(place)
    return {
        "memory_share": read / best["bytes_per_second"] / seconds,
        "matrix_share": done / best["flops"] / seconds,
    }


def plain(place: Place, shape: str, steps: int) -> dict:
    network, (prompt, new, _) = model(place, shape), lengths(place)
    new = min(new, 64)  # it is slow
    (ids,) = draw(1, [prompt], network.config.vocab_size)
    plain_sampler(network, ids, 2 * BLOCK, steps)
    none = place.seconds(lambda: plain_sampler(network, ids, BLOCK, steps))
    seconds = place.seconds(lambda: plain_sampler(network, ids, new, steps)) - none
    return {"tokens_per_second": (new - BLOCK) / seconds}


class Ticks(StoppingCriteria):
    """When each token was there. `generate` waits for every one anyway, to see whether all have ended."""

    def __init__(self, place: Place):
        self.place, self.times = place, []

    def __call__(self, input_ids, scores, **kwargs):
        self.place.wait()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def autoregressive(place: Place, shape: str, batch: int) -> dict:
    network, (prompt, new, _) = model(place, shape), lengths(place)
    with torch.device("meta"):
        twin = Qwen3ForCausalLM(network.config).eval()
    twin.load_state_dict(network.state_dict(), assign=True)
    twin.model.rotary_emb = network.model.rotary_emb
    ids = torch.tensor(draw(1, [prompt] * batch, network.config.vocab_size), device=place.device)

    def generate() -> list[float]:
        ticks = Ticks(place)
        settings = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        everything = torch.ones_like(ids)
        twin.generate(
            ids, attention_mask=everything, cache_implementation="static", stopping_criteria=[ticks], **settings
        )
        return ticks.times

    first = place.seconds(generate)  # compiles
    start = time.perf_counter()
    times = generate()
    steady = statistics.median(b - a for a, b in pairwise(times))
    found = {
        "tokens_per_second": batch / steady,
        "with_prompts": batch * len(times) / (times[-1] - start),
        "step_ms": 1e3 * steady,
        "first_call_seconds": first,
    }
    return found | shares(place, network, batch, steady, batch, batch)
