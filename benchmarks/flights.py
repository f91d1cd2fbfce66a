"""What blocks in flight and look-ahead cost and save: wall time beside tokens per forward, in one interleaved run.

    python benchmarks/flights.py [CHECKPOINT] [--json FILE] [--problems N] [--rounds N] [--threads N] [--batch N ...]

Every setting decodes the same word problems of the dev split, greedily; a round times each of them once, and the table
has medians over rounds. `forward` is the time of a forward relative to the first setting of its group, one block in
flight with the same policy; `speed` is tokens per second, likewise. Look-ahead writes the tokens of that first setting
(checked), so it pays where `forward` is below its gain in tokens per forward: `needs` is the share of forwards that
would have to confirm a draft, `has` the share that does.
"""

import argparse
import json
import platform
import statistics
import time
from dataclasses import replace

import torch

from t3d.decoding import DecodingConfig
from t3d.embedded import checkpoint
from t3d.engine import Engine
from t3d.models import load_model
from t3d.tasks import TaskConfig, get_task


def groups(max_tokens: int) -> list[list[tuple[str, DecodingConfig]]]:
    """Settings to compare; the first of each group is what the others are relative to."""
    found = []
    dynamic = {"strategy": "low_confidence_dynamic", "threshold": 0.95}
    for name, policy in [
        ("1 step", {"steps": 1}),
        ("2 steps", {"steps": 2}),
        ("4 steps", {}),
        ("dynamic .95", dynamic),
        ("prefix .9", {"strategy": "prefix", "threshold": 0.9}),
    ]:
        plain = DecodingConfig(max_tokens=max_tokens, **policy)
        some = [(name, plain)]
        some += [(f"{name}, look-ahead {d}", replace(plain, flight="look_ahead", depth=d)) for d in (1, 2, 3)]
        if policy is dynamic:
            some += [(f"{name}, {n} blocks", replace(plain, blocks_in_flight=n)) for n in (2, 4)]
            provisional = replace(plain, blocks_in_flight=2, enter=0.0, force=2.0, recheck=0.6)
            some += [(f"{name}, 2, recheck .6", provisional), (f"{name}, s2d2", replace(plain, flight="s2d2"))]
        found.append(some)
    return found


def measure(engine: Engine, prompts: list, some: list[tuple[str, DecodingConfig]], rounds: int) -> list[dict]:
    seconds: dict[str, list[float]] = {name: [] for name, _ in some}
    answers = {}
    for _ in range(rounds):
        for name, config in some:
            start = time.perf_counter()
            if engine.max_batch_size == 1:
                answers[name] = [engine.generate([prompt], config)[0] for prompt in prompts]
            else:
                answers[name] = engine.generate(prompts, config)
            seconds[name].append(time.perf_counter() - start)
    rows, first = [], some[0][0]
    for name, config in some:
        mine, base = answers[name], answers[first]
        tokens, forwards = sum(t.length for t in mine), sum(t.nfe.predicting for t in mine)
        plain = sum(t.nfe.predicting for t in base)
        time_ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds[first], strict=True))
        cost = time_ratio * plain / forwards
        row = {
            "setting": name,
            "tpf": round(tokens / forwards, 2),
            "tokens_per_second": round(tokens / statistics.median(seconds[name])),
            "forward": round(cost, 2),
            "speed": round(1 / time_ratio, 2),
        }
        if config.flight == "look_ahead":
            assert [t.response_ids for t in mine] == [t.response_ids for t in base], "look-ahead changed a token"
            row |= {"has": round(plain / forwards - 1, 2), "needs": round(cost - 1, 2)}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", default="embedded")
    parser.add_argument("--json", help="write the results to this file")
    parser.add_argument("--problems", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer = load_model(checkpoint(options.checkpoint))
    task = get_task(TaskConfig(name="word_problems"))
    prompts = [task.prompt(problem, tokenizer) for problem in task.problems("dev", options.problems)]
    print(f"torch {torch.__version__}, {platform.machine()} CPU, {options.threads} threads, {options.checkpoint}")
    found = []
    for batch in options.batch:
        engine = Engine(model, tokenizer, max_batch_size=batch)
        engine.generate(prompts[:1], DecodingConfig(max_tokens=8))
        print(f"{f'batch {batch}':<26}{'TPF':>6}{'tok/s':>8}{'forward':>9}{'speed':>7}{'has':>7}{'needs':>7}")
        for some in groups(max_tokens=128):
            for row in measure(engine, prompts, some, options.rounds):
                found.append({"batch": batch} | row)
                cells = (row["tpf"], row["tokens_per_second"], row["forward"], row["speed"])
                print("{:<26}{:>6}{:>8}{:>9}{:>7}".format(row["setting"], *cells), end="")
                print("{:>7}{:>7}".format(row["has"], row["needs"]) if "has" in row else "", flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"torch": torch.__version__, "threads": options.threads, "rows": found}, file, indent=1)


if __name__ == "__main__":
    main()
