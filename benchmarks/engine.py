"""Tokens per second of the engine beside a plain sampler, in one interleaved run.

    python benchmarks/engine.py [--json FILE] [--rounds N] [--threads N] [--batch N ...] [--steps N ...] [--memory]
    python benchmarks/engine.py --shape 4b --device cuda --dtype bfloat16 --attention flex --batch 1 32 128

The plain sampler does what SDAR's own generate.py does: one sequence, transformers' forward with a DynamicCache, `S`
denoising forwards per block and one more that stores the finished block. Both must give the same tokens. A ratio is the
engine's tokens per second over the plain sampler's; each round measures both, and the table shows medians. `bound` is
what the engine would reach if a forward took no longer than its products with the model's weights, timed in the same
round.

`--memory` instead decodes 256 requests of mixed length through a cache of 1/8 of what they need at once, and compares
the results and the memory with those of an unbounded run.
"""

import argparse
import json
import platform
import resource
import statistics
import time

import torch
from transformers import DynamicCache

from t3d.decoding import DecodingConfig
from t3d.engine import Engine
from t3d.engine.runner import product
from t3d.models import SDARConfig, SDARForCausalLM

BLOCK, PROMPT, NEW = 4, 64, 256
# hidden size, layers, heads, key-value heads, head size, intermediate size, vocabulary
SHAPES = {
    "tiny": (64, 1, 4, 2, 16, 128, 512),
    "small": (256, 8, 8, 4, 32, 768, 8192),
    "0.2b": (1024, 12, 16, 8, 64, 3072, 32000),
    "1.7b": (2048, 28, 16, 8, 128, 6144, 151936),
    "4b": (2560, 36, 32, 8, 128, 9728, 151936),
    "8b": (4096, 36, 32, 8, 128, 12288, 151936),
}


def architecture(shape: str) -> dict:
    """Settings of config.json."""
    hidden, layers, heads, kv_heads, head_dim, intermediate, vocabulary = SHAPES[shape]
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": intermediate,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "max_position_embeddings": 1024,
        "block_size": BLOCK,
        "mask_token_id": vocabulary - 1,
    }


def make_model(shape: str, device: str, dtype: torch.dtype, **changes) -> SDARForCausalLM:
    torch.manual_seed(0)
    config = SDARConfig(**architecture(shape) | changes, dtype=dtype)
    with torch.device(device):
        model = SDARForCausalLM(config).to(dtype)
    for weight in model.parameters():
        if weight.dim() == 2:  # sharp enough that no decision is near a tie
            torch.nn.init.normal_(weight, std=2.0 / weight.shape[1] ** 0.5)
    return model.eval()


@torch.inference_mode()
def plain_sampler(model, prompt: list[int], new: int, steps: int) -> list[int]:
    """Greedy low-confidence decoding of one prompt (whole blocks long), for clarity and not for speed."""
    mask_id, device = model.config.mask_token_id, model.device
    cache = DynamicCache()

    def forward(ids, start):
        positions = torch.arange(start, start + ids.shape[1], device=device)
        seen = torch.arange(start + ids.shape[1], device=device)
        mask = (seen // BLOCK <= positions[:, None] // BLOCK)[None, None]
        return model(ids, attention_mask=mask, position_ids=positions[None], past_key_values=cache).logits[0]

    ids = torch.tensor([prompt], device=device)
    forward(ids, 0)
    out = []
    for start in range(len(prompt), len(prompt) + new, BLOCK):
        block = torch.full((1, BLOCK), mask_id, device=device)
        for step in range(steps):
            logits = forward(block, start).float()
            cache.crop(-BLOCK)
            logits[:, mask_id] = -torch.inf
            confidence, tokens = logits.softmax(-1).max(-1)
            confidence[block[0] != mask_id] = -torch.inf
            count = BLOCK // steps + (step < BLOCK % steps)
            chosen = confidence.topk(count).indices
            block[0, chosen] = tokens[chosen]
        forward(block, start)  # stores the finished block
        out += block[0].tolist()
    return out


@torch.inference_mode()
def product_seconds(model, tokens: int, logits: int) -> float:
    """Time of a forward's products with weights: `tokens` through every layer, the head for `logits` of them."""
    layers = [m.weight for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    inputs = {w.shape[1]: torch.randn(tokens, w.shape[1], device=w.device, dtype=w.dtype) for w in layers}
    hidden = inputs[model.config.hidden_size][:logits]
    head, products = product(model.lm_head.weight), [(product(w), inputs[w.shape[1]]) for w in layers]
    start = time.perf_counter()
    for multiply, x in products:
        multiply(x)
    head(hidden)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def bound(model, batch: int, steps: int) -> float:
    """Tokens per second by products with weights alone; a block's first step carries the block before it."""
    seconds, masked = 0.0, BLOCK
    for step in range(steps):
        seconds += product_seconds(model, batch * BLOCK * (2 if step == 0 else 1), batch * masked)
        masked -= BLOCK // steps + (step < BLOCK % steps)
    return batch * BLOCK / seconds


def measure(model, batch: int, steps: int, rounds: int, attention: str) -> dict:
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(0, 8000, (batch, PROMPT), generator=generator).tolist()
    config = DecodingConfig(steps=steps, max_tokens=NEW, stop_ids=())
    engine = Engine(model, max_batch_size=batch, attention=attention)
    engine.generate(prompts[:1], config)
    plain_rates, engine_rates, bounds, equal = [], [], [], 0
    bound(model, batch, steps)
    for number in range(rounds):
        start = time.perf_counter()
        plain = plain_sampler(model, prompts[number % batch], NEW, steps)
        plain_rates.append(NEW / (time.perf_counter() - start))
        start = time.perf_counter()
        results = engine.generate(prompts, config)
        engine_rates.append(batch * NEW / (time.perf_counter() - start))
        bounds.append(statistics.median(bound(model, batch, steps) for _ in range(5)))
        equal += results[number % batch].response_ids == plain
    return {
        "batch": batch,
        "steps": steps,
        "plain": round(statistics.median(plain_rates), 1),
        "engine": round(statistics.median(engine_rates), 1),
        "bound": round(statistics.median(bounds), 1),
        "ratio": round(statistics.median(e / p for e, p in zip(engine_rates, plain_rates, strict=True)), 2),
        "equal": f"{equal}/{rounds}",
    }


def peak_memory() -> float:
    """MiB of resident memory this process has come to."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_memory(model) -> dict:
    generator = torch.Generator().manual_seed(2)

    def draw(most: int) -> int:
        return int(torch.randint(8, most, (), generator=generator))

    prompts = [torch.randint(0, 8000, (draw(256),), generator=generator).tolist() for _ in range(256)]
    configs = [DecodingConfig(steps=2, max_tokens=draw(256), stop_ids=()) for _ in prompts]
    need = sum(-(-(len(p) + c.max_tokens) // BLOCK) * BLOCK for p, c in zip(prompts, configs, strict=True))
    Engine(model).generate(prompts[:1], configs[:1])
    rows, results = [], []
    for name, budget in (("1/8", need // 8), ("all at once", None)):
        engine, before, start = Engine(model, max_batch_size=256, kv_cache_tokens=budget), peak_memory(), time.time()
        results.append([(t.response_ids, t.step_map, t.length) for t in engine.generate(prompts, configs)])
        rows.append(
            {
                "cache": name,
                "positions": engine.stats.kv_budget_tokens,
                "peak_positions": engine.stats.kv_peak_tokens,
                "preemptions": engine.stats.preemptions,
                "grown_mib": round(peak_memory() - before, 1),
                "seconds": round(time.time() - start, 1),
            }
        )
        print("   ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    equal = sum(a == b for a, b in zip(*results, strict=True))
    print(f"{equal}/256 results equal")
    return {"need_positions": need, "runs": rows, "equal": equal}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the results to this file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--shape", default="small", choices=SHAPES)
    parser.add_argument("--attention", default="sdpa", choices=("sdpa", "flex"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--memory", action="store_true", help="measure memory under a small budget instead of speed")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = make_model(options.shape, options.device, getattr(torch, options.dtype))
    on = torch.cuda.get_device_name() if model.device.type == "cuda" else f"{platform.machine()} CPU"
    names = ("shape", "dtype", "attention", "threads")
    found = {"torch": torch.__version__, "device": on} | {name: getattr(options, name) for name in names}
    print(", ".join(f"{name} {value}" for name, value in found.items()))
    found |= {"memory": measure_memory(model)} if options.memory else {"ratios": measure_all(model, options)}
    if options.json:
        with open(options.json, "w") as file:
            json.dump(found, file, indent=1)


def measure_all(model, options) -> list[dict]:
    line = "{batch:>5} {steps:>5} {plain:>9} {engine:>9} {bound:>9} {ratio:>7} {equal:>7}"
    names = ("batch", "steps", "plain", "engine", "bound", "ratio", "equal")
    print(line.format(**{name: name for name in names}) + "   (tokens/s)")
    rows = []
    for batch in options.batch:
        for steps in options.steps:
            rows.append(measure(model, batch, steps, options.rounds, options.attention))
            print(line.format(**rows[-1]), flush=True)
    return rows


if __name__ == "__main__":
    main()
