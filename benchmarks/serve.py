"""Many streaming clients against `t3d serve` for a while: no error, offline answers, steady memory; tokens per second.

    python benchmarks/serve.py [--model MODEL] [--clients N] [--hostile SHARE] [--seconds S] [--json FILE]

Starts a server on this machine, which nothing else can reach, and stops it. Each client streams one chat answer after
another; a tenth of the requests are broken off half-way. Prompts, steps, temperatures and seeds repeat, and the answer
to each is compared with `Engine.generate`'s, which this process computes before. With `--hostile`, that share of the
clients are those of `hostile.py` instead; then an honest client that is told 429 or 503 comes again, and the time of
its answer counts from its first attempt.

Memory is the server's resident set: the most in a first fifth of the time (caches and arenas have been touched by
then), and at the end. When the clients have gone, the server must hold what it held before they came: no sequences, no
pages of the cache, no more open files. The exit code is 1 where anything of this does not hold.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter

import httpx2
import torch
from hostile import Hostile

from t3d import DecodingConfig, Engine, load_model
from t3d.decoding.sampling import derive_seed
from t3d.embedded import checkpoint
from t3d.tasks import TaskConfig, get_task

CASES = 200


def make_cases(model: str) -> tuple[list[dict], float]:
    """Request bodies, each with the text that the engine gives without a server; and the engine's tokens per second."""
    loaded, tokenizer = load_model(checkpoint(model), device="cpu")
    rng, prompts, configs, bodies = random.Random(0), [], [], []
    problems = get_task(TaskConfig(name="word_problems", num_train=1)).problems("test", CASES)
    for seed, problem in enumerate(problems):
        steps, temperature = rng.choice([1, 2, 4]), rng.choice([0.0, 0.5, 1.0])
        configs.append(DecodingConfig(steps=steps, temperature=temperature, seed=seed, max_tokens=256))
        messages = [{"role": "user", "content": problem.question}]
        prompts.append(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        body = {"messages": messages, "steps": steps, "temperature": temperature, "seed": seed, "max_tokens": 256}
        bodies.append(body)
    engine = Engine(loaded, tokenizer)
    seeds = [derive_seed(config.seed, 0, 0) for config in configs]  # as if each were decoded alone
    start = time.perf_counter()
    answers = engine.generate(prompts, configs, seeds=seeds)
    rate = sum(a.length for a in answers) / (time.perf_counter() - start)
    return [{"body": b, "text": a.text, "tokens": a.length} for b, a in zip(bodies, answers, strict=True)], rate


class Load:
    """What the clients do, and what they have seen."""

    def __init__(self, url: str, cases: list[dict], seconds: float):
        self.url, self.cases, self.seconds = url, cases, seconds
        self.answers = self.broken_off = self.tokens = 0
        self.errors: list[str] = []
        self.refused: Counter[int] = Counter()
        self.first: list[float] = []
        self.whole: list[float] = []

    async def run(self, honest: int, hostile: int, pid: int) -> list[int]:
        """Resident memory of the server in bytes, several times a second."""
        limits = httpx2.Limits(max_connections=honest, max_keepalive_connections=honest)
        self.hostile, memory = Hostile(self.url), []
        async with httpx2.AsyncClient(base_url=self.url, timeout=600, limits=limits) as http:
            self.end = time.monotonic() + self.seconds
            work = asyncio.gather(
                *(self.client(http, number) for number in range(honest)),
                *(self.hostile.client(number, self.end) for number in range(hostile)),
            )
            while not work.done():
                memory.append(resident(pid))
                await asyncio.wait([work], timeout=0.2)
            await work
        return memory

    async def client(self, http, number: int) -> None:
        rng = random.Random(number)
        while time.monotonic() < self.end:
            case, leave, start = rng.choice(self.cases), rng.random() < 0.1, time.perf_counter()
            try:
                while (wait := await self.ask(http, case, leave, start)) and time.monotonic() < self.end:
                    await asyncio.sleep(wait)
            except (httpx2.HTTPError, ValueError, KeyError) as error:
                self.errors.append(f"{type(error).__name__}: {error}")

    async def ask(self, http, case: dict, leave: bool, start: float) -> float:
        """Seconds after which to ask again, where there was no room; else 0."""
        text, finish = "", None
        async with http.stream("POST", "/v1/chat/completions", json=case["body"] | {"stream": True}) as response:
            if response.status_code in (429, 503) and self.hostile.turns:
                self.refused[response.status_code] += 1
                return float(response.headers.get("retry-after", 1))
            if response.status_code != 200:
                self.errors.append(f"{response.status_code} {(await response.aread()).decode()}")
                return 0
            async for line in response.aiter_lines():
                if not line or line == "data: [DONE]":
                    continue
                (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                if choice["delta"].get("content") and not text:
                    self.first.append(time.perf_counter() - start)
                text += choice["delta"].get("content") or ""
                finish = choice["finish_reason"]
                if leave and text:
                    self.broken_off += 1
                    return 0
        if text != case["text"] or not finish:
            self.errors.append(f"seed {case['body']['seed']}: {text!r} is not {case['text']!r}")
        self.answers += 1
        self.tokens += case["tokens"]
        self.whole.append(time.perf_counter() - start)
        return 0


def resident(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def start(model: str, log) -> tuple[subprocess.Popen, str]:
    """The server, which writes to the file `log`, and its address."""
    command = [sys.executable, "-m", "t3d", "serve", model, "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(command, stderr=log)
    while process.poll() is None:
        if found := re.search(r" at (http://\S+) ", read(log)):
            return process, found[1]
        time.sleep(0.1)
    raise SystemExit("the server did not start")


def read(log) -> str:
    log.seek(0)
    return log.read().decode("utf-8", "replace")


def held(url: str, pid: int) -> dict[str, float]:
    """What the server holds for its clients: sequences, pages of the cache, open files, threads."""
    metrics = httpx2.get(f"{url}/metrics", headers={"connection": "close"}).text
    names = ("sequences_running", "sequences_waiting", "kv_cache_tokens", "sequences_cancelled_total")
    found = {name: float(re.search(rf"^t3d_{name}\{{.*\}} (\S+)$", metrics, re.M)[1]) for name in names}
    files, threads = (len(os.listdir(f"/proc/{pid}/{place}")) for place in ("fd", "task"))
    return found | {"files": files, "threads": threads}


def settled(url: str, pid: int, before: dict[str, float]) -> dict[str, float]:
    """`held`, as soon as it is no more than before, or after a while: a connection may take its time to end."""
    end = time.monotonic() + 40
    while True:
        after = held(url, pid)
        if not left_over(before, after) or time.monotonic() > end:
            return after
        time.sleep(0.2)


def left_over(before: dict[str, float], after: dict[str, float]) -> list[str]:
    names = ("sequences_running", "sequences_waiting", "kv_cache_tokens", "files")
    return [name for name in names if after[name] > before[name]]


def milliseconds(times: list[float]) -> dict[str, int]:
    cuts = statistics.quantiles(times, n=100)
    return {f"p{p}": round(1000 * cuts[p - 1]) for p in (50, 95, 99)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--hostile", type=float, default=0.0, metavar="SHARE", help="of the clients, 0 to 1")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--json", help="write the results to this file")
    options = parser.parse_args()
    hostile = round(options.clients * options.hostile)
    cases, offline = make_cases(options.model)
    with tempfile.TemporaryFile() as log:
        process, url = start(options.model, log)
        try:
            before = held(url, process.pid)
            load = Load(url, cases, options.seconds)
            began = time.perf_counter()
            memory = asyncio.run(load.run(options.clients - hostile, hostile, process.pid))
            seconds = time.perf_counter() - began
            after = settled(url, process.pid, before)
        finally:
            process.terminate()
            code = process.wait(300)  # of which it needs seconds, on a machine of its own
        said = read(log)
    if "Traceback" in said:
        load.errors.append("the server's log has a traceback:\n" + said[said.index("Traceback") :][:3000])
    load.errors += load.hostile.faults
    tenths = [max(memory[i * len(memory) // 10 :][: len(memory) // 10 + 1]) for i in range(10)]
    early, late = max(memory[: len(memory) // 5 + 1]), memory[-1]
    found = {
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "clients": options.clients,
        "hostile": hostile,
        "seconds": round(seconds, 1),
        "answers": load.answers,
        "broken_off": load.broken_off,
        "errors": len(load.errors),
        "refused": dict(sorted(load.refused.items())),
        "hostile_turns": dict(load.hostile.turns),
        "hostile_statuses": dict(sorted(load.hostile.statuses.items())),
        "tokens_per_second": round(load.tokens / seconds),
        "offline_tokens_per_second": round(offline),
        "answers_per_second": round(load.answers / seconds, 1),
        "first_text_ms": milliseconds(load.first),
        "answer_ms": milliseconds(load.whole),
        "memory_early_mib": round(early / 2**20),
        "memory_late_mib": round(late / 2**20),
        "memory_tenths_mib": [round(most / 2**20) for most in tenths],
        "before": before,
        "after": after,
        "exit_code": code,
    }
    for key, value in found.items():
        print(f"{key:>25}  {value}")
    for error in load.errors[:5]:
        print(error)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(found, file, indent=1)
    grown = late > early * 1.1
    raise SystemExit(bool(load.errors or left_over(before, after) or grown or code))


if __name__ == "__main__":
    main()
