"""What a step of the engine costs beside its forward: planning, packing, deciding, in Python and numpy.

    python benchmarks/host.py [--batch N ...] [--steps N ...]

A model of one small layer decodes on one CPU thread. Milliseconds of processor time per step, medians: the forward
(which a GPU computes while Python goes on), what Python does beside it, up to the copy of what was drawn, which waits
for the GPU, and what it does before and after, while the GPU has nothing to do.
"""

import argparse
import statistics
import time
from itertools import pairwise

import torch
from engine import make_model

from t3d.decoding import DecodingConfig
from t3d.engine import Engine
from t3d.engine.decide import _Batch
from t3d.engine.intake import make_requests
from t3d.engine.runner import Runner

PROMPT, NEW = 32, 256


class Watch:
    """When the last call of a method began and ended, in processor time."""

    def __init__(self, owner: type, name: str):
        method = getattr(owner, name)

        def timed(*arguments):
            self.start = time.process_time()
            found = method(*arguments)
            self.end = time.process_time()
            return found

        setattr(owner, name, timed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 128])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 4])
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = make_model("tiny", "cpu", torch.float32)
    compute, forward, draw = Watch(Runner, "compute"), Watch(Runner, "forward"), Watch(_Batch, "view")
    print(f"{'batch':>5} {'steps':>5} {'forward':>8} {'beside':>7} {'before':>7} {'after':>6}  (ms)")
    for batch in options.batch:
        for steps in options.steps:
            config = DecodingConfig(steps=steps, max_tokens=NEW, stop_ids=())
            prompts = torch.randint(0, 256, (batch, PROMPT)).tolist()
            requests = make_requests(prompts, config, None, None, model, None)
            session = Engine(model, max_batch_size=batch, prefill_tokens=batch * PROMPT).open(requests)
            for request in requests:
                session.add(request)
            session.step()
            found = []
            while not session.done:
                start = time.process_time()
                session.step()
                times = (start, compute.start, compute.end, forward.end, draw.end, time.process_time())
                before, inside, leaving, beside, after = (b - a for a, b in pairwise(times))
                found.append((inside, beside, before + leaving, after))
            medians = (1e3 * statistics.median(column) for column in zip(*found, strict=True))
            print(f"{batch:5} {steps:5} {{:8.2f}} {{:7.2f}} {{:7.2f}} {{:6.2f}}".format(*medians), flush=True)


if __name__ == "__main__":
    main()
