"""Feeds damaged input to what reads other people's bytes, and says what answered with anything but one clear line.

    python benchmarks/fuzz.py prompts --seconds 180

Inputs are seeds with some bytes changed. Where atheris is installed (`pip install atheris`), libFuzzer changes them and
keeps those that reach new code; without it a seeded generator does, which sees no coverage. One case may take `LIMIT`
seconds, and a target's process 8 GB of address space. Seconds are those of CPU time, so that other programs change
nothing. The exit code is 1 where something was found.
"""

# ruff: noqa: E501

import argparse
import contextlib
import gzip
import importlib
import io
import json
import multiprocessing
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
from pathlib import Path

try:
    import atheris
except ImportError:
    atheris = None

LIMIT = 10.0  # seconds for one case
INSTRUMENTED = ["t3d", "omegaconf", "yaml", "jinja2", "safetensors", "gguf"]  # Python whose coverage guides
READERS = (
    "config",
    "models.load",
    "models.gguf",
    "serve.schema",
    "tasks.base",
    "tasks.prompts",
    "trajectories.upstream",
)
TOKENS = (
    b"\0",
    b'"',
    b"[",
    b"{",
    b"null",
    b"-1",
    b"1e999",
    b"\xff",
    b"${",
    b"\\ud800",
    b"{% for",
    b"{{",
    b"!!",
    b"&a ",
    b"*a",
)
FOLDER = Path(tempfile.mkdtemp(prefix="t3d-fuzz-"))


def written(name: str, data: bytes) -> Path:
    path = FOLDER / name
    path.write_bytes(data)
    return path


def prompts(data: bytes) -> None:
    from t3d.tasks import TaskConfig, get_task

    name = ("a.jsonl", "a.csv", "a.tsv", "a.csv.gz")[data[0] % 4] if data else "a.jsonl"
    get_task(TaskConfig(name="prompts", path=str(written(name, data[1:])))).problems("train")


def trajectories(data: bytes) -> None:
    from t3d.trajectories import read_trajectories
    from t3d.trajectories.dataset import read_metadata

    path = written("shard-00000.parquet", data)
    read_metadata(path)
    list(read_trajectories(path))


def config(data: bytes) -> None:
    from t3d.models.load import load_model

    folder = FOLDER / "config"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(data)
    load_model(folder, device="cpu")  # at the latest, there are no weights


def safetensors(data: bytes) -> None:
    from t3d.models.files import check_weights

    check_weights(written("model.safetensors", data).parent)


def index(data: bytes) -> None:
    from t3d.models.files import check_weights

    folder = FOLDER / "index"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors.index.json").write_bytes(data)
    check_weights(folder)


def gguf(data: bytes) -> None:
    from t3d.models.gguf import as_folder

    with as_folder(written("a.gguf", data), FOLDER, ("qwen3", "llama")):
        pass


def template(data: bytes) -> None:
    from t3d.models.load import load_tokenizer
    from t3d.tasks.base import _rendered

    global _tokenizer
    if _tokenizer is None:
        import t3d

        _tokenizer = load_tokenizer(Path(t3d.__file__).parent / "assets" / "teacher")
    _tokenizer.chat_template = data.decode("utf-8", "replace") or "x"
    _rendered([{"role": "user", "content": "a"}], _tokenizer, "template")


def recipe(data: bytes) -> None:
    from t3d.config import load_recipe

    load_recipe(written("a.yaml", data)).to_yaml()


def rollouts(data: bytes) -> None:
    from t3d.models.load import load_tokenizer
    from t3d.trajectories.upstream import import_rollouts

    global _tokenizer
    if _tokenizer is None:
        import t3d

        _tokenizer = load_tokenizer(Path(t3d.__file__).parent / "assets" / "teacher")
    with tempfile.TemporaryDirectory(dir=FOLDER) as out:
        import_rollouts(written("r.json", data), Path(out) / "out", _tokenizer, (0,))


def http(data: bytes) -> None:
    """The body of a request as the server checks it; no model is asked."""
    from fastapi.exceptions import RequestValidationError
    from pydantic import ValidationError

    from t3d.serve.schema import ChatBody, CompletionBody, explain

    for kind in (ChatBody, CompletionBody):
        try:
            kind.model_validate(json.loads(data))
        except ValidationError as error:
            explain(error.errors())
        except (ValueError, RecursionError, RequestValidationError):
            pass


_tokenizer = None


def _parquet() -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = io.BytesIO()
    pq.write_table(pa.table({"question": ["a", "b"], "answer": ["1", "2"]}), out)
    return out.getvalue()


def _shard() -> bytes:
    from t3d.trajectories import TrajectoryWriter
    from t3d.trajectories.record import NFE, Trajectory

    one = Trajectory(prompt_ids=[1, 2], response_ids=[3, 4], step_map=[0, 1], confidence=[0.5, 0.5], length=2,
                     finish_reason="length", nfe=NFE(denoise=2), block_size=2)  # fmt: skip
    folder = FOLDER / "seed"
    with TrajectoryWriter(folder, {"kind": "fuzz"}) as writer:
        writer.write(one)
    return next(folder.glob("*.parquet")).read_bytes()


def _gguf() -> bytes:
    text = b"general.architecture"
    field = struct.pack("<Q", len(text)) + text + struct.pack("<IQ", 8, 5) + b"llama"
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + field + bytes(64)


def seeds(target: str) -> list[bytes]:
    chat = {"messages": [{"role": "user", "content": "a"}], "answer": "1", "question": "b"}
    lines = "\n".join(json.dumps(chat) for _ in range(2)).encode()
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    shape = {"model_type": "sdar", "hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 9, "block_size": 4}
    rollout = {"question": "1+1", "full_output": ["2"], "step_map": [[1]], "correctness": [True]}
    return {
        "prompts": lambda: [b"\0" + lines, b"\0[" + lines.replace(b"\n", b",") + b"]", b"\1question,answer\na,1\n",
                            b"\0" + gzip.compress(lines), b"\0" + _parquet(), b"\0{\"question\": " + b"1" * 5000 + b"}"],
        "trajectories": lambda: [_shard()],
        "config": lambda: [json.dumps(shape).encode(), b"[" * 100_000],
        "safetensors": lambda: [struct.pack("<Q", len(header)) + header + bytes(4)],
        "index": lambda: [b'{"weight_map": {"a": "b.safetensors"}}', b'{"weight_map": {"a": 1, "b": "c"}}', b"[" * 100_000],
        "gguf": lambda: [_gguf()],
        "template": lambda: [b"{% for m in messages %}{{ m['role'] }}: {{ m.content | trim }}{% endfor %}",
                             b"{{ ''.__class__.__mro__[1].__subclasses__() }}", b"{% include '/etc/passwd' %}"],
        "recipe": lambda: [b"seed: 1\ntask: {name: prompts, path: x}\nrun_dir: ${task.path}\n", b"seed: 2020-99-99\n",
                           b"? [a]\n: b\n", b"seed: &a [*a]\n", b"a: " + b"[" * 1_000 + b"]" * 1_000, b"seed: ${oc.env:HOME}\n"],
        "rollouts": lambda: [b"[" + json.dumps(rollout).encode() + b"]", json.dumps(rollout | {"prompt": "x"}).encode()],
        "http": lambda: [json.dumps({"messages": chat["messages"], "max_tokens": 4}).encode(), b'{"prompt": [[1]], "n": 2}'],
    }[target]()  # fmt: skip


TARGETS = {f.__name__: f for f in (prompts, trajectories, config, safetensors, index, gguf, template, recipe, rollouts,
                                   http)}  # fmt: skip


class TooLong(BaseException):
    """Raised inside a case, past everything that catches exceptions."""


class Findings:
    """Runs cases and keeps one of each kind that did not end in a `T3DError` of one line."""

    def __init__(self, target: str, seconds: float):
        self.target, self.run, self.seconds = target, TARGETS[target], seconds
        self.tried, self.slowest, self.found = 0, 0.0, set()
        self.end = time.process_time() + seconds
        signal.signal(signal.SIGPROF, self._late)
        # what is not Python does not come back to hear of it: then the kernel ends the process
        most = int(self.end + 3 * LIMIT)
        resource.setrlimit(resource.RLIMIT_CPU, (most, most))

    @staticmethod
    def _late(*_):
        raise TooLong

    def case(self, data: bytes) -> None:
        """Ends the process, with the report, when the time is over: libFuzzer does not return."""
        from t3d.errors import T3DError

        started = time.process_time()
        if started > self.end:
            self.report()
        written("last", data)  # for what does not come back at all
        signal.setitimer(signal.ITIMER_PROF, LIMIT)
        try:
            self.run(data)
        except T3DError as error:
            if "\n" in str(error):
                self.keep(f"a message of several lines at {place(error)}", data, f": {str(error)!r:.120}")
        except TooLong:
            self.keep("takes too long", data)
        except Exception as error:
            self.keep(f"{type(error).__name__} at {place(error)}", data, f": {str(error)!r:.120}")
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        self.slowest = max(self.slowest, time.process_time() - started)
        self.tried += 1

    def keep(self, kind: str, data: bytes, more: str = "") -> None:
        if kind not in self.found:
            self.found.add(kind)
            name = f"{self.target}-{len(self.found)}"
            print(f"FOUND {kind}{more}; {written(name, data)}: {data[:80]!r}", flush=True)

    def report(self) -> None:
        print(
            f"{self.target}: {self.seconds:g} s, {self.tried} inputs, slowest {self.slowest:.1f} s, "
            f"{len(self.found)} kinds of failure",
            flush=True,
        )
        os._exit(bool(self.found))


def place(error: Exception) -> str:
    """The last line of t3d that an error went through."""
    frames = traceback.extract_tb(error.__traceback__)
    last = ([frame for frame in frames if "/t3d/" in frame.filename] or frames)[-1]
    return f"{Path(last.filename).name}:{last.lineno}"


def mutated(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(out) + 1)
        match rng.randrange(4):
            case 0 if at < len(out):
                out[at] = rng.randrange(256)
            case 1:
                del out[at : at + rng.randrange(1, 9)]
            case 2:
                out[at:at] = rng.choice(TOKENS)
            case _:
                start = rng.randrange(len(out) + 1)
                out[at:at] = out[start : start + rng.randrange(1, 33)]
    return bytes(out)


def fuzz(target: str, seconds: float, seed: int) -> None:
    """Feeds `target` for `seconds`, in a process of its own."""
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    corpus = seeds(target)
    with contextlib.suppress(Exception):
        TARGETS[target](corpus[0])  # what is loaded only then is no part of the time
    findings = Findings(target, seconds)
    for data in corpus:
        findings.case(data)
    if atheris:
        kept = FOLDER / f"corpus-{target}"
        kept.mkdir()
        for number, data in enumerate(corpus):
            (kept / str(number)).write_bytes(data)
        words = "\n".join('"' + "".join(f"\\x{byte:02x}" for byte in token) + '"' for token in TOKENS)
        options = f"-max_len=16384 -timeout=1000000 -rss_limit_mb=0 -verbosity=0 -seed={seed + 1}".split()
        options += [f"-dict={written('words', words.encode())}", f"-artifact_prefix={FOLDER}/"]
        atheris.Setup(["fuzz", str(kept), *options], findings.case)
        atheris.Fuzz()
    rng = random.Random(seed)
    while True:
        findings.case(mutated(rng.choice(corpus), rng))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("targets", choices=TARGETS, nargs="+", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print("guided by coverage" if atheris else "blind: atheris is not installed", f"in {FOLDER}", flush=True)
    os.environ["HF_HUB_OFFLINE"] = "1"
    instrumented = atheris.instrument_imports(INSTRUMENTED) if atheris else contextlib.nullcontext()
    with instrumented, contextlib.redirect_stderr(io.StringIO()):  # atheris tells of every module
        for name in READERS:
            importlib.import_module(f"t3d.{name}")
    failed = False
    for target in args.targets:
        process = multiprocessing.get_context("fork").Process(target=fuzz, args=(target, args.seconds, args.seed))
        process.start()
        process.join()
        if process.exitcode not in (0, 1):
            (FOLDER / "last").rename(FOLDER / f"{target}-last")
            print(f"FOUND {target}: its process ended with {process.exitcode}; the input is {FOLDER / target}-last")
        failed |= process.exitcode != 0
    sys.exit(failed)


if __name__ == "__main__":
    main()
