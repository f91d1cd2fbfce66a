"""Time and memory of one optimizer step of the `t3d` objective, against a plain reference that gives the same losses.

    python benchmarks/train_step.py [--json FILE] [--rounds 5] [--threads 1]

The model is random (hidden 256, 8 layers, 8 heads, 4 KV heads, intermediate 768, vocabulary 8,192), the batch 8
trajectories with prompts of 40-160 and responses of 100-900 tokens, block 4, in float32 on the CPU. A step is: from
drawn states to tensors, forwards, losses, backward, clipping, AdamW. Both sides start every round with equal weights;
times are interleaved medians. Memory is measured in a process of its own for each side: the most it ever had resident
in one step, less what it had before (two models, nothing else).
"""

import argparse
import copy
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from t3d.block_attention import NAME
from t3d.distill import T3DConfig
from t3d.distill.batch import TrainingBatch, collate
from t3d.distill.data import StateDataset
from t3d.distill.objective import Ask
from t3d.distill.recompute import checkpoint_layers, recompute_cheap
from t3d.models import SDARConfig, SDARForCausalLM
from t3d.trajectories import NFE, Trajectory

BLOCK, VOCABULARY, MASK, PAD = 4, 8192, 8191, 0
SIDES = ("plain", "ours")
RECOMPUTE = ("cheap", "nothing", "everything")  # activations that the backward pass of our side computes again


def make_model(seed: int) -> SDARForCausalLM:
    torch.manual_seed(seed)
    config = SDARConfig(
        hidden_size=256,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        intermediate_size=768,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
        max_position_embeddings=2048,
        block_size=BLOCK,
        mask_token_id=MASK,
        pad_token_id=PAD,
    )
    return SDARForCausalLM(config)


def make_trajectories(
    count: int = 8, seed: int = 0, prompts=(40, 161), responses=(100, 901), tokens=(1, MASK)
) -> list[Trajectory]:
    """Random ones; a pair is what numpy draws a length or a token from."""
    rng = np.random.default_rng(seed)
    trajectories = []
    for number in range(count):
        prompt, response = int(rng.integers(*prompts)), int(rng.integers(*responses))
        total = response + -(prompt + response) % BLOCK  # the last block is whole
        trajectories.append(
            Trajectory(
                prompt_ids=rng.integers(*tokens, prompt).tolist(),
                response_ids=rng.integers(*tokens, total).tolist(),
                step_map=np.concatenate([rng.permutation(BLOCK) for _ in range(total // BLOCK + 1)])[:total].tolist(),
                confidence=rng.random(total).tolist(),
                length=response,
                finish_reason="stop",
                nfe=NFE(),
                block_size=BLOCK,
                prompt_id=str(number),
            )
        )
    return trajectories


# ---------------------------------------------------------------------------------------------------------------------
# The plain way: every sequence padded to the longest, a dense mask, four forwards, logits everywhere, losses in loops.


@dataclass
class PlainBatch:
    input_ids: Tensor  # (sequences, length): clean tokens, noisy tokens, padding
    position_ids: Tensor
    mask: Tensor  # (sequences, 1, length, length)
    masked: list[list[tuple[int, int, int]]]  # of each sequence: column, the trajectory's token, commit rank


def plain_batch(trajectories: list[Trajectory], examples: list[dict]) -> PlainBatch:
    """The same states as `examples` hold, in the plain layout."""
    rows, masked = [], []
    for trajectory, example in zip(trajectories, examples, strict=True):
        clean = trajectory.prompt_ids + trajectory.response_ids
        noisy = example["copy"] > 0
        first = int(example["position"][noisy][0])
        rows.append((clean, example["input_ids"][noisy].tolist(), first))
        offset = int(np.flatnonzero(noisy)[0])  # where the noisy tokens begin in the example
        masked.append(
            [
                (len(clean) + int(place) - offset, int(token), int(rank))
                for place, token, rank in zip(example["select"], example["target"], example["rank"], strict=True)
            ]
        )
    length = max(len(clean) + len(noisy) for clean, noisy, _ in rows)
    input_ids = torch.full((len(rows), length), PAD)
    position_ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), 1, length, length, dtype=torch.bool)
    for r, (clean, noisy, first) in enumerate(rows):
        n, m = len(clean), len(noisy)
        input_ids[r, : n + m] = torch.tensor(clean + noisy)
        position_ids[r, : n + m] = torch.cat([torch.arange(n), torch.arange(first, first + m)])
        block = position_ids[r] // BLOCK
        for q in range(n + m):
            if q < n:
                mask[r, 0, q, :n] = block[:n] <= block[q]
            else:
                mask[r, 0, q, :n] = block[:n] < block[q]
                mask[r, 0, q, n : n + m] = block[n : n + m] == block[q]
        mask[r, 0, n + m :, n + m :] = True  # padding sees padding
    return PlainBatch(input_ids, position_ids, mask, masked)


def plain_logprobs(model, batch: PlainBatch) -> Tensor:
    """(sequences, length, vocabulary); the mask token is not part of the distribution."""
    logits = model(batch.input_ids, attention_mask=batch.mask, position_ids=batch.position_ids).logits
    forbidden = torch.zeros(VOCABULARY)
    forbidden[MASK] = -torch.inf
    return (logits + forbidden).log_softmax(-1)


def plain_loss(student, reference, batch: PlainBatch, config: T3DConfig) -> dict[str, Tensor]:
    def of(logprobs: Tensor, tokens: Tensor) -> Tensor:  # (sequences, length)
        return logprobs.gather(-1, tokens[:, :, None])[:, :, 0]

    real = batch.input_ids.clone()
    for r, tokens in enumerate(batch.masked):
        for column, token, _ in tokens:
            real[r, column] = token
    with torch.no_grad():
        reference_logprobs = plain_logprobs(reference, batch)
        fake = reference_logprobs.argmax(-1)
        reference_real = of(reference_logprobs, real)
        del reference_logprobs
        reference_fake = of(plain_logprobs(reference, batch), fake)
    student_real = of(plain_logprobs(student, batch), real)
    student_fake = of(plain_logprobs(student, batch), fake)
    ddo, path = [], []
    levels = math.ceil(BLOCK / config.path_k)
    logsigmoid = torch.nn.functional.logsigmoid
    for r, tokens in enumerate(batch.masked):
        columns = [column for column, _, _ in tokens]
        real_margin = torch.stack([student_real[r, c] - reference_real[r, c] for c in columns]).mean()
        fake_margin = torch.stack([student_fake[r, c] - reference_fake[r, c] for c in columns]).mean()
        ddo.append(-logsigmoid(config.beta * real_margin) - config.alpha * logsigmoid(-config.beta * fake_margin))
        of_levels = []
        for level in range(1, levels + 1):
            inside = [-student_real[r, column] for column, _, rank in tokens if rank < level * config.path_k]
            if inside:
                of_levels.append(torch.stack(inside).mean())
        path.append(sum(of_levels) / levels)
    ddo, path = sum(ddo) / len(ddo), sum(path) / len(path)
    return {"loss": ddo + config.path_lambda * path, "ddo": ddo, "path": path}


# ---------------------------------------------------------------------------------------------------------------------


def our_loss(student, reference, batch: TrainingBatch, config: T3DConfig) -> dict[str, Tensor]:
    mask = batch.layout.attention_mask(NAME)

    def forward(model, head):
        return model(batch.input_ids, mask, batch.position, select=batch.select, head=head)

    def frozen(head):
        with torch.no_grad():
            return forward(reference, head)

    loss, metrics = config.method.loss(batch, Ask(partial(forward, student), frozen, MASK))
    return {"loss": loss, "ddo": metrics["loss/ddo"], "path": metrics["loss/path"]}


class Case:
    """Two models, a batch of states, and one step of either side."""

    def __init__(self, side: str, recompute: str = "cheap"):
        self.side = side
        self.config = T3DConfig(output_dir="unused", use_cpu=True)
        self.trajectories = make_trajectories()
        dataset = StateDataset(self.trajectories, self.config, BLOCK, MASK, VOCABULARY)
        self.examples = [dataset[i] for i in range(len(dataset))]
        self.student, self.reference = make_model(1), make_model(2).requires_grad_(False)
        if side == "ours":
            for model in (self.student, self.reference):
                model.set_attn_implementation(NAME)
            if recompute == "cheap":
                recompute_cheap(self.student)
            elif recompute == "everything":
                checkpoint_layers(self.student)
        self.student.train()
        self.first = copy.deepcopy(self.student.state_dict())

    def restart(self) -> None:
        self.student.load_state_dict(self.first)

    def step(self) -> dict[str, float]:
        optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-4)
        if self.side == "plain":
            losses = plain_loss(
                self.student, self.reference, plain_batch(self.trajectories, self.examples), self.config
            )
        else:
            batch = TrainingBatch(**collate(self.examples, PAD, BLOCK, sys.maxsize))
            losses = our_loss(self.student, self.reference, batch, self.config)
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        optimizer.step()
        self.student.zero_grad()
        return {name: value.item() for name, value in losses.items()}


def resident(which: str) -> float:
    """MiB: "VmRSS" resident now, "VmHWM" the most so far (ru_maxrss would count the parent's, too)."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(which)) / 1024


def measure_memory(side: str, recompute: str) -> float:
    """MiB that one step needs at its peak, beyond what was there before it."""
    case = Case(side, recompute)
    before = resident("VmRSS")
    case.step()
    return resident("VmHWM") - before


def memory_of(side: str, threads: int, recompute: str = "cheap") -> float:
    command = [sys.executable, __file__, "--memory-of", side, "--threads", str(threads), "--recompute", recompute]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the results to this file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--recompute", choices=RECOMPUTE, default="cheap", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(measure_memory(options.memory_of, options.recompute))
        return

    cases = {side: Case(side) for side in SIDES}
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    difference = 0.0
    for number in range(options.rounds + 1):
        losses = {}
        for side, case in cases.items():
            case.restart()
            start = time.perf_counter()
            losses[side] = case.step()
            if number:  # the first round warms up
                times[side].append(time.perf_counter() - start)
        difference = max(difference, *(abs(losses["plain"][name] - losses["ours"][name]) for name in losses["ours"]))
        print(f"round {number}: {losses['ours']}", flush=True)
    found = {
        "time_ratio": statistics.median(p / o for p, o in zip(times["plain"], times["ours"], strict=True)),
        "seconds": {side: statistics.median(values) for side, values in times.items()},
        "max_loss_difference": difference,
        "memory_mib": {side: memory_of(side, options.threads) for side in SIDES},
        "memory_mib_recomputing": {how: memory_of("ours", options.threads, how) for how in ("nothing", "everything")},
        "rounds": options.rounds,
        "threads": options.threads,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    found["memory_ratio"] = found["memory_mib"]["plain"] / found["memory_mib"]["ours"]
    print(json.dumps(found, indent=1))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
