"""A checkpoint of SDAR-4B's shape: time to load it and to decode a block, and the memory that takes.

Random bf16 weights in shards (8.8 GB) are written to a temporary folder and removed at the end; loading and decoding
happen in a process of their own. `anonymous` is memory that nobody else can have; weights that are read from the mapped
files in their own dtype are not in it, the system can drop and read them again.

    python benchmarks/load_4b.py [--folder /tmp] [--layers 36] [--dtype bfloat16] [--blocks 2]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

SHAPE = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "block_size": 4,
    "mask_token_id": 151669,
    "eos_token_id": 151643,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
SHARD = 2 << 30


def write(folder: Path, layers: int) -> int:
    """Random weights in the published layout, a shard at a time; their bytes."""
    import torch
    from safetensors.torch import save_file
    from transformers.initialization import no_init_weights

    from t3d.models import SDARConfig, SDARForCausalLM

    config = SDARConfig(**SHAPE, num_hidden_layers=layers, architectures=["SDARForCausalLM"], dtype="bfloat16")
    with torch.device("meta"), no_init_weights():
        shapes = {name: weight.shape for name, weight in SDARForCausalLM(config).state_dict().items()}
    config.save_pretrained(folder)
    noise = torch.empty(1 << 26, dtype=torch.bfloat16).normal_(std=0.02)  # repeated: 4.4e9 random numbers take minutes
    where, shard, size, total = {}, {}, 0, 0

    def flush():
        name = f"model-{len(set(where.values())) + 1:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, shape in shapes.items():
        weight = torch.ones(shape, dtype=torch.bfloat16)
        if "norm" not in name:
            for part in weight.view(-1).split(len(noise)):
                part.copy_(noise[: len(part)])
        shard[name] = weight
        size += weight.nbytes
        total += weight.nbytes
        if size > SHARD:
            flush()
            size = 0
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def memory() -> dict[str, float]:
    """GiB: resident now and at most, and the part of it that is not pages of files."""
    found = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = {"resident": "VmRSS", "peak": "VmHWM", "anonymous": "RssAnon"}
    return {name: int(found[key].split()[0]) / 2**20 for name, key in names.items()}


def _disk_reads() -> int:
    """Bytes that this process had read from disk: pages of the files that were not, or no longer, in memory."""
    found = dict(line.split(":") for line in Path("/proc/self/io").read_text().splitlines())
    return int(found["read_bytes"])


def measure(folder: Path, dtype: str, blocks: int) -> dict:
    import torch

    from t3d.decoding import DecodingConfig
    from t3d.engine import Engine
    from t3d.models import load_model

    before, most, over = memory(), [0.0], threading.Event()

    def watch():
        while not over.wait(0.01):
            most[0] = max(most[0], memory()["anonymous"])

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start = time.perf_counter()
    model, _ = load_model(folder, dtype=dtype, device="cpu")
    loaded = time.perf_counter() - start
    engine = Engine(model)
    prompt = torch.randint(1000, 150000, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    times, processor, faults = [], [], []
    for _ in range(blocks):
        start, start_cpu, start_faults = time.perf_counter(), time.process_time(), _disk_reads()
        (answer,) = engine.generate([prompt], DecodingConfig(max_tokens=4, ignore_eos=True))
        times.append(time.perf_counter() - start)
        processor.append(time.process_time() - start_cpu)
        faults.append(_disk_reads() - start_faults)
    over.set()
    watcher.join()
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "load_seconds": round(loaded, 2),
        "block_seconds": [round(t, 2) for t in times],
        "block_processor_seconds": [round(t, 2) for t in processor],
        "block_read_from_disk_gib": [round(n / 2**30, 2) for n in faults],
        "forwards": answer.nfe.total,
        "before_gib": {k: round(v, 2) for k, v in before.items()},
        "peak_resident_gib": round(memory()["peak"], 2),
        "peak_anonymous_gib": round(most[0], 2),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=None, help="where the temporary folder goes (10 GB)")
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--blocks", type=int, default=2, help="blocks to decode; the first one reads the files")
    parser.add_argument("--measure", type=Path, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.dtype, arguments.blocks)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        start = time.perf_counter()
        total = write(Path(folder), arguments.layers)
        print(f"wrote {total / 1e9:.2f} GB in {time.perf_counter() - start:.0f} s", flush=True)
        command = [sys.executable, __file__, "--measure", folder, "--dtype", arguments.dtype]
        subprocess.run([*command, "--blocks", str(arguments.blocks)], check=True)


if __name__ == "__main__":
    main()
