"""When a block-diffusion student is faster than the autoregressive model of its size: tokens per second of both.

    python benchmarks/faster.py [--shape SHAPE] [--batch N ...] [--steps N ...] [--weights KIND ...] [--threads N]
                                [--rounds N] [--json FILE]

The engine decodes with a fixed number of steps per block; transformers' `generate` decodes the same weights one token
at a time, with its default cache. Weights are random. Rounds alternate between the two; the table shows medians of
steady decoding, without the prompts' forward. `needs` is how many tokens a forward of one step per block must write to
be as fast as `generate`: a student is faster where its tokens per forward are more. Where KIND is int8 or int4 both
read the same quantised weights.

Time is processor time divided by the number of threads, which other work on the machine changes less than wall time.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch
from engine import BLOCK, SHAPES, make_model
from transformers import Qwen3ForCausalLM, StoppingCriteria
from transformers.utils import logging as transformers_logging

from t3d.decoding import DecodingConfig
from t3d.engine import Engine
from t3d.engine.intake import make_requests
from t3d.models.quantize import KINDS, quantize

PROMPT, TOKENS, BLOCKS = 8, 6, 4  # of a prompt; new ones, of which the first is not timed; blocks, likewise


def now() -> float:
    return time.process_time() / torch.get_num_threads()


class Ticks(StoppingCriteria):
    """When each token was there."""

    def __init__(self):
        self.times = []

    def __call__(self, input_ids, scores, **kwargs):
        self.times.append(now())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def autoregressive(model, prompts: list[list[int]]) -> float:
    """Seconds of a step, which writes a token of every sequence."""
    ids, ticks = torch.tensor(prompts), Ticks()
    settings = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    model.generate(ids, attention_mask=torch.ones_like(ids), stopping_criteria=[ticks], **settings)
    return statistics.median(b - a for a, b in pairwise(ticks.times))


def diffusion(model, prompts: list[list[int]], steps: int) -> float:
    """Seconds of a block of every sequence."""
    config = DecodingConfig(steps=steps, max_tokens=BLOCKS * BLOCK, stop_ids=())
    engine = Engine(model, max_batch_size=len(prompts), prefill_tokens=len(prompts) * PROMPT)
    requests = make_requests(prompts, config, None, None, model, None)
    session = engine.open(requests)
    for request in requests:
        session.add(request)
    times = [now()]
    while not session.done:
        session.step()
        times.append(now())
    seconds = [b - a for a, b in pairwise(times)][1:]  # the first carries the prompts
    blocks = [sum(seconds[at : at + steps]) for at in range(0, len(seconds) - steps + 1, steps)]
    return statistics.median(blocks)


def pair(model):
    """The model, and an autoregressive one of the same layers."""
    with torch.device("meta"):
        twin = Qwen3ForCausalLM(model.config).eval()
    twin.model, twin.lm_head = model.model, model.lm_head
    twin.generation_config.cache_implementation = None
    return model, twin


def size(model) -> int:
    """Bytes of weights."""
    return sum(x.nbytes for x in (*model.parameters(), *model.buffers()))


def measured(kind: str, options: argparse.Namespace) -> Iterator[dict]:
    """A row for each batch size. One kind after the other: of a large shape there is room for one."""
    model = make_model(options.shape, "cpu", torch.float32)
    model, twin = pair(model if kind == "float32" else quantize(model, kind, torch.float32))
    for batch in options.batch:
        prompts = torch.randint(0, 256, (batch, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()
        found = {name: [] for name in ("generate", *options.steps)}
        for _ in range(options.rounds):
            found["generate"].append(batch / autoregressive(twin, prompts))
            for steps in options.steps:
                found[steps].append(batch * BLOCK / diffusion(model, prompts, steps))
        rates = {name: statistics.median(values) for name, values in found.items()}
        row = {"batch": batch, "weights": kind, "gigabytes": size(model) / 1e9} | rates
        row["needs"] = BLOCK * rates["generate"] / rates[1] if 1 in rates else None
        needs = "" if row["needs"] is None else f"{row['needs']:7.2f}"
        tokens = " ".join(f"{rates[name]:9.2f}" for name in ("generate", *options.steps))
        print(f"{batch:5} {kind:>8} {row['gigabytes']:5.2f} {tokens} {needs}", flush=True)
        yield row


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="0.2b", choices=SHAPES)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--weights", nargs="+", default=["float32", *KINDS], choices=["float32", *KINDS])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers_logging.set_verbosity_error()
    about = {"torch": torch.__version__, "machine": platform.machine(), "threads": options.threads}
    print(f"shape {options.shape}, {about}")
    print(
        f"{'batch':>5} {'weights':>8} {'GB':>5} {'generate':>9}",
        *(f"{f'{s} steps':>9}" for s in options.steps),
        "  needs",
    )
    rows = [row for kind in options.weights for row in measured(kind, options)]
    if options.json:
        options.json.write_text(json.dumps({"shape": options.shape, "about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
