"""Volume, resume and memory of `t3d eval`: a random checkpoint with a real vocabulary on a file of prompts.

    python benchmarks/evaluation.py PROMPTS.jsonl TOKENIZER_FOLDER [--task gsm8k] [--kill-after 70] [--max-tokens 64]

The first evaluation is killed (SIGKILL) after some seconds, the second continues it to the end, the third finds it
complete. For each: seconds, peak memory of the process, answers on disk. The answers are noise; the work is real.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml

from t3d.models import SDARConfig, SDARForCausalLM, load_tokenizer, save_model
from t3d.trajectories import TrajectoryDataset


def make_checkpoint(folder: Path, tokenizer_folder: str) -> None:
    torch.manual_seed(0)
    tokenizer = load_tokenizer(tokenizer_folder)
    config = SDARConfig(
        vocab_size=151936,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=256,
        max_position_embeddings=4096,
        block_size=4,
        mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    save_model(SDARForCausalLM(config), folder, tokenizer)


def attempt(recipe: Path, answers: Path, kill_after: float | None = None) -> dict:
    """Run `t3d eval`; seconds, exit code, peak memory in MB, answers on disk, and how old the newest file is."""
    start = time.time()
    process = subprocess.Popen([sys.executable, "-m", "t3d", "eval", str(recipe)], stdout=subprocess.DEVNULL)
    status = usage = None
    while status is None:
        pid, code, usage = os.wait4(process.pid, os.WNOHANG)
        status = code if pid else None
        if kill_after is not None and time.time() - start > kill_after:
            process.send_signal(signal.SIGKILL)
            kill_after = None
        time.sleep(0.05)
    process.returncode = os.waitstatus_to_exitcode(status)
    end, files = time.time(), list(answers.rglob("shard-*.parquet"))
    return {
        "seconds": round(end - start, 1),
        "exit code": process.returncode,
        "peak MB": usage.ru_maxrss // 1024,
        "answers": sum(len(TrajectoryDataset(folder)) for folder in {file.parent for file in files}),
        "files": len(files),
        "last saved before the end, s": round(end - max((f.stat().st_mtime for f in files), default=start), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts")
    parser.add_argument("tokenizer")
    parser.add_argument("--task", default="gsm8k")
    parser.add_argument("--kill-after", type=float, default=70)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_checkpoint(root / "model", options.tokenizer)
        recipe = {
            "run_dir": str(root / "run"),
            "model": {"path": str(root / "model"), "device": "cpu"},
            "task": {"name": options.task, "path": str(Path(options.prompts).resolve())},
            "engine": {"max_batch_size": options.batch},
            "eval": {"grid": [{"steps": options.steps}], "max_tokens": options.max_tokens},
        }
        (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        for name, kill_after in (("killed", options.kill_after), ("continued", None), ("complete", None)):
            print(name, attempt(root / "recipe.yaml", root / "run" / "eval", kill_after), flush=True)


if __name__ == "__main__":
    main()
