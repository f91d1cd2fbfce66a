"""Trajectories for tests that need no model."""

import random

import numpy as np

from t3d.trajectories import NFE, Trajectory


def make_trajectory(prompt_id="p0", sample=0, block_size=4, prompt=5, blocks=2, seed=0, **fields) -> Trajectory:
    """A valid trajectory with random tokens and a random static step map."""
    rng = random.Random(f"{prompt_id}/{sample}/{seed}")
    n = -prompt % block_size + blocks * block_size
    step_map, position = [], prompt
    while position < prompt + n:
        size = block_size - position % block_size
        step_map += rng.sample(range(size), size)
        position += size
    values = {
        "prompt_ids": [rng.randrange(100) for _ in range(prompt)],
        "response_ids": [rng.randrange(100) for _ in range(n)],
        "step_map": step_map,
        "confidence": [float(np.float32(rng.random())) for _ in range(n)],
        "length": rng.randint(1, n),
        "finish_reason": "stop",
        "nfe": NFE(1, n, blocks),
        "block_size": block_size,
        "seed": rng.randrange(2**62),
        "text": f"answer {seed} <b> é",
        "prompt_id": prompt_id,
        "sample": sample,
        "question": "q?",
        "answer": "3",
        "correct": rng.choice([True, False, None]),
        "extra": {"problem": {"level": 3}},
    }
    return Trajectory(**values | fields)
