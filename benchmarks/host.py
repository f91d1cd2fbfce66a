"""What a step of the engine costs beside its forward: planning, packing, deciding, in Python and numpy.

    python benchmarks/host.py [--batch N ...] [--steps N ...]

A model of one small layer decodes on one CPU thread. Milliseconds of processor time per step, medians: the forward
(which a GPU computes while Python waits or goes on), what comes before it, and what comes after it. On a GPU the last
two are what keeps it waiting, and with CUDA graphs all that does.
"""

import argparse
import statistics
import time

import torch
from engine import make_model

from t3d.decoding import DecodingConfig
from t3d.engine import Engine
from t3d.engine.intake import make_requests
from t3d.engine.runner import Runner

PROMPT, NEW = 32, 256


class Watch:
    """Processor time inside a method, by call."""

    def __init__(self, owner: type, name: str):
        self.seconds, method = 0.0, getattr(owner, name)

        def timed(*arguments):
            start = time.process_time()
            found = method(*arguments)
            self.seconds += time.process_time() - start
            return found

        setattr(owner, name, timed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 128])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 4])
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = make_model("tiny", "cpu", torch.float32)
    compute, forward = Watch(Runner, "compute"), Watch(Runner, "forward")
    print(f"{'batch':>5} {'steps':>5} {'forward':>8} {'before':>7} {'after':>6}  (ms)")
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
                compute.seconds = forward.seconds = 0.0
                start = time.process_time()
                session.step()
                whole = time.process_time() - start
                found.append((compute.seconds, forward.seconds - compute.seconds, whole - forward.seconds))
            inside, before, after = (1e3 * statistics.median(column) for column in zip(*found, strict=True))
            print(f"{batch:5} {steps:5} {inside:8.2f} {before:7.2f} {after:6.2f}", flush=True)


if __name__ == "__main__":
    main()
