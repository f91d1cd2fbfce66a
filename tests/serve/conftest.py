"""A real server, started by the command line in a process of its own, and the models it serves."""

import os
import re
import signal
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from tests.conftest import make_model
from tests.e2e.program import Done, Program

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def byte_tokenizer():
    """Every byte a token, as a byte-level BPE has them: a random model writes halves of characters all the time."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ã", "¤"), ("t", "h"), ("th", "e"), ("Ġ", "the"), ("ð", "Ł")]  # ä, and the first half of an emoji
    vocab = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in merges)])}
    inner = Tokenizer(models.BPE(vocab, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(s, normalized=False, special=True) for s in ("<|end|>", "<|mask|>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|end|>",
        pad_token="<|end|>",
        mask_token="<|mask|>",
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A checkpoint folder: random weights, a byte-level tokenizer, a context that takes seconds to fill."""
    from t3d.models import save_model

    tokenizer = byte_tokenizer()
    model = make_model(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, max_position_embeddings=16384)
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_model(model, folder, tokenizer)
    return folder


@pytest.fixture(scope="session")
def broken(tmp_path_factory) -> Path:
    """As `tiny`, but a prompt with a z in it gives logits that are not numbers."""
    from t3d.models import save_model

    tokenizer = byte_tokenizer()
    model = make_model(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids("z")] = torch.nan
        model.lm_head.weight[tokenizer.convert_tokens_to_ids("z")] = 0
    folder = tmp_path_factory.mktemp("model") / "broken"
    save_model(model, folder, tokenizer)
    return folder


class Server:
    """`t3d serve` in a process; `url` once it answers."""

    def __init__(self, program: Program, *arguments: str):
        self.program = program
        self.process = program.start("serve", *arguments, "--port", "0", "--device", "cpu")
        stderr = self.process.output / "stderr"
        end = time.monotonic() + 120
        while not (found := re.search(r" at (http://\S+) ", stderr.read_text() if stderr.exists() else "")):
            assert self.process.is_alive(), program.finish(self.process)
            assert time.monotonic() < end
            time.sleep(0.02)
        self.url = found[1]

    def stop(self, number: int = signal.SIGTERM, seconds: float = 60) -> Done:
        if self.process.is_alive():
            os.kill(self.process.pid, number)
        return self.program.finish(self.process, seconds)


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """Starts servers; they are stopped at the end, and none may have died or logged a fault."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.pop("T3D_API_KEY", None)
    context = get_context("forkserver")
    context.set_forkserver_preload(["t3d.serve.server", "t3d.cli"])
    servers: list[Server] = []

    def start(*arguments: str) -> Server:
        servers.append(Server(Program(tmp_path_factory.mktemp("serve"), context), *arguments))
        return servers[-1]

    start.context = context
    yield start
    for server in servers:
        done = server.stop()
        assert done.code == 0, done.stderr
        assert "Traceback" not in done.stderr


@pytest.fixture(scope="session")
def server(start, tiny, broken) -> Server:
    return start(str(tiny), f"broken={broken}", "--max-batch-size", "16")


@pytest.fixture(scope="session")
def offline(tiny):
    """An engine with the served model."""
    from t3d import Engine, load_model

    return Engine(*load_model(tiny, device="cpu"))
