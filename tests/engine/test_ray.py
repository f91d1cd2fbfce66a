"""Two workers on a local Ray: the results of one engine, also when a worker is killed."""

import os
import random
import signal

import pytest
import torch

from t3d.decoding import DecodingConfig
from t3d.engine import Engine, RayEngine
from t3d.errors import T3DError
from tests.conftest import make_model

ray = pytest.importorskip("ray", reason="needs t3d[ray]")


def precise(seed=0):
    """Of float64: what is decoded together changes the last bit of logits, and in float32, rarely, a token by that."""
    return make_model(seed=seed).double()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=80 * 2**20)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def pool(cluster):
    engine = RayEngine(precise(), workers=2, max_batch_size=4)
    yield engine
    engine.close()


def work(count):
    rng = random.Random(3)
    return [[rng.randrange(6, 60) for _ in range(rng.randint(1, 20))] for _ in range(count)]


def essence(trajectories):
    return [(t.prompt_ids, t.response_ids, t.step_map, t.length, t.finish_reason, t.seed) for t in trajectories]


def test_two_workers_give_what_one_engine_gives(pool):
    config = DecodingConfig(max_tokens=24, temperature=1.0, n=2)
    prompts = work(20)
    assert essence(pool.generate(prompts, config)) == essence(Engine(precise()).generate(prompts, config))
    assert pool.stats.finished == 40


def test_new_weights_reach_the_workers(pool):
    config = DecodingConfig(max_tokens=12)
    prompts = work(4)
    before = essence(pool.generate(prompts, config))
    saved = [p.detach().clone() for p in pool.model.parameters()]
    other = precise(seed=9)
    try:
        with torch.no_grad():
            for mine, new in zip(pool.model.parameters(), other.parameters(), strict=True):
                mine.copy_(new)
        after = essence(pool.generate(prompts, config))
    finally:
        with torch.no_grad():
            for mine, old in zip(pool.model.parameters(), saved, strict=True):
                mine.copy_(old)
    assert after == essence(Engine(other).generate(prompts, config)) != before


def test_a_killed_worker_is_replaced_and_nothing_is_lost(pool):
    config = DecodingConfig(max_tokens=200, temperature=1.0, stop_ids=())
    prompts = work(24)
    found, killed = {}, None
    for event in pool.stream(prompts, config):
        found[event.index] = event.trajectory
        if killed is None and len(found) < 20 and all(pool.pids):
            killed = pool.pids[0]
            os.kill(killed, signal.SIGKILL)
    assert killed is not None
    assert killed not in pool.pids
    assert len(found) == 24
    assert essence(found[i] for i in range(24)) == essence(Engine(precise()).generate(prompts, config))


def test_errors_come_through(pool):
    with pytest.raises(T3DError, match="prompt 1 is empty"):
        pool.stream([[7], []])
    with pytest.raises(T3DError, match="workers = 3, but the Ray cluster has 2 CPUs"):
        RayEngine(make_model(), workers=3)
    broken = make_model()
    with torch.no_grad():
        broken.model.embed_tokens.weight[11] = torch.nan
    pool.close()
    engine = RayEngine(broken, workers=1)
    with pytest.raises(T3DError, match="prompt 1: the model's logits are not numbers"):
        engine.generate([[7], [11]], DecodingConfig(max_tokens=4))
    engine.close()


def test_a_ray_that_does_not_start_in_time_is_one_line(monkeypatch):
    def start(**_):
        raise Exception("The current node timed out during startup.\nLook at the logs.")  # as Ray does

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", start)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(T3DError, match=r"cannot join or start Ray at this machine: .* timed out during startup\.$"):
        RayEngine(make_model(), workers=2)
