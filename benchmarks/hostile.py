"""Clients that `benchmarks/serve.py --hostile SHARE` adds: rude ones, broken ones, and too many at once.

They write bytes to sockets of their own, since an HTTP library would refuse to send most of this.
"""

# ruff: noqa: E501

import asyncio
import json
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from urllib.parse import urlsplit

CHAT, COMPLETIONS = b"/v1/chat/completions", b"/v1/completions"
MESSAGES = [{"role": "user", "content": "Tom had 5 apples. He got 3 more. How many now?"}]
LONG = {"messages": MESSAGES, "ignore_eos": True, "temperature": 1.0}  # goes on until the context is full


def post(body: bytes | dict, path: bytes = CHAT, head: bytes = b"content-type: application/json\r\n") -> bytes:
    body = json.dumps(body).encode() if isinstance(body, dict) else body
    length = b"" if b"transfer-encoding" in head else b"content-length: %d\r\n" % len(body)
    return b"POST %s HTTP/1.1\r\nhost: localhost\r\n%s%s\r\n%s" % (path, head, length, body)


def chat(**values) -> bytes:
    return post({"messages": MESSAGES, "max_tokens": 4} | values)


def schema(value: dict) -> bytes:
    return chat(response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": value}})


def nested(depth: int) -> dict:
    return {"type": "object", "properties": {"a": nested(depth - 1)}} if depth else {"type": "null"}


WRONG_BODIES = [
    *map(post, (b"", b"null", b"[]", b"{", b"[" * 200_000, b'{"messages":' * 50_000, b'{"a":' * 900 + b"1" + b"}" * 900)),
    *map(post, (b'{"messages": "\xff\xfe\x80"}', b"\xff\xfe{\0}\0", b'{"model": "\\ud800"}', b'{"n": 1' + b"0" * 9000 + b"}")),
    *(chat(**{name: value}) for name, value in [
        ("messages", 1), ("messages", []), ("messages", [[]]), ("messages", [{"role": 5, "content": {}}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": "file:///etc/passwd"}]}]),
        ("messages", [{"role": "user", "content": "\ud800"}]), ("temperature", "hot"), ("temperature", float("nan")),
        ("n", 10**30), ("n", -1), ("n", True), ("max_tokens", 10**12), ("seed", 2**64), ("stop", ["a"] * 1000), ("stop", ""),
        ("model", "../../etc/passwd"), ("model", {}), ("tools", [{}]), ("steps", 0), ("block_size", 10**6), ("stream", "yes"),
        ("strategy", "none"), ("flight", "\0"), ("stop_ids", [2**31]), ("negative_prompt", ""), ("top_logprobs", 99),
        ("logit_bias", {"1": 100}), ("a" * 10_000, 1), ("response_format", {"type": "json_schema"}),
    ]),
    *map(schema, ({"$ref": "#"}, {"$ref": "http://localhost/a"}, {"type": "string", "pattern": "(a+)+$"}, nested(300),
                  {"type": "string", "pattern": "((.{1000}){1000}){1000}"}, {"type": "array", "maxItems": 10**9},
                  {"enum": [str(n) for n in range(20_000)]})),
    *(post({"prompt": prompt}, COMPLETIONS) for prompt in ([], [[]], [[-1]], [2**31 - 1], ["a", 1], {"a": 1}, None)),
    post({"tokens": [2**31 - 1]}, b"/detokenize"), post({"prompt": "a", "messages": MESSAGES}, b"/tokenize"),
]  # fmt: skip
LARGE = [
    post({"prompt": "apples and " * 90_000}, COMPLETIONS),  # fits into a body, and into no context
    post({"messages": MESSAGES * 9000}), post({"prompt": "5 " * 500_000}, b"/tokenize"),
    post({"prompt": [[1, 2, 3]] * 90_000}, COMPLETIONS), post({"tokens": [5] * 400_000}, b"/detokenize"),
    post(b" " * 1_500_000), post(b"[" * 6_000_000),
    post((b"10000\r\n" + b"a" * 65536 + b"\r\n") * 80, head=b"transfer-encoding: chunked\r\n"),
]  # fmt: skip
WRONG_HTTP = [
    b"\r\n\r\n", b"GET\r\n\r\n", b"\0" * 4096, b"\xff" * 70_000, b"GET / HTTP/9.9\r\n\r\n", b"GET /\r\n\r\n", b"hello " * 30_000,
    b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + b"\x55" * 512, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nhost: evil.example\r\n\r\n", b"GET /%ff%00/..%2f HTTP/1.1\r\nhost: localhost\r\n\r\n",
    b"DELETE /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n", b"GET /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: localhost\r\nupgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-version: 13\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: localhost\r\n" + b"a: b\r\n" * 20_000 + b"\r\n",
    b"GET / HTTP/1.1\r\nhost: localhost\r\na: " + b"b" * 200_000 + b"\r\n\r\n",
    b"GET /metrics HTTP/1.1\r\nhost: localhost\r\n\r\n" * 100,  # one behind the other, unasked
    *(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n" + head + b"\r\n\r\n{}" for head in (
        b"content-length: -1", b"content-length: 99999999999999999999999", b"content-length: 1\r\ncontent-length: 2",
        b"content-length: 2\r\ntransfer-encoding: chunked", b"transfer-encoding: gzip", b"a b: c", b"content-length: 2\r\n c: d",
        b"content-length: 5000000\r\nexpect: 100-continue", b"content-length: x",
    )),
    post(b"zz\r\n{}\r\n", head=b"transfer-encoding: chunked\r\n"), post(b"ffffffffffffffffff\r\n{}", head=b"transfer-encoding: chunked\r\n"),
    *(post(b'{"prompt": "a"}', COMPLETIONS, head) for head in (b"", b"content-type: text/plain\r\n", b"content-type: multipart/form-data\r\n",
                                                             b"content-type: application/json; charset=utf-16\r\n")),
]  # fmt: skip


class Hostile:
    """What hostile clients do until `end`, and the statuses that they are answered with."""

    def __init__(self, url: str):
        self.host, self.port = urlsplit(url).hostname, urlsplit(url).port
        self.statuses: Counter[int] = Counter()
        self.turns: Counter[str] = Counter()
        self.faults: list[str] = []

    async def client(self, number: int, end: float) -> None:
        rng = random.Random(-1 - number)
        attacks = [self.slow, self.leaves, self.cancels, self.wrong, self.wrong, self.large]
        while time.monotonic() < end:
            attack = rng.choice((self.floods, self.connects)) if rng.random() < 0.02 else rng.choice(attacks)
            self.turns[attack.__name__] += 1
            await attack(rng)
            await asyncio.sleep(rng.random())

    async def talk(self, pieces: Iterable[bytes], pause: float = 0.0, patience: float = 40.0) -> None:
        """Send the pieces, `pause` seconds apart, read what comes, and break off after `patience` seconds."""
        with suppress(OSError, asyncio.TimeoutError):
            await asyncio.wait_for(self.exchange(list(pieces), pause), patience)

    async def exchange(self, pieces: list[bytes], pause: float) -> None:
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            await asyncio.gather(self.write(writer, pieces, pause), self.read(reader, pieces[0]))
        finally:
            reset = struct.pack("ii", 1, 0)  # where closing would be polite
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            writer.transport.abort()

    async def write(self, writer: asyncio.StreamWriter, pieces: list[bytes], pause: float) -> None:
        with suppress(OSError):  # there may be an answer all the same
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(pause)

    async def read(self, reader: asyncio.StreamReader, asked: bytes) -> None:
        """Until the answer ends."""
        with suppress(OSError, asyncio.TimeoutError):
            if not (line := await reader.readline()).startswith(b"HTTP/1.1 "):
                return
            status = int(line.split()[1])
            self.statuses[status] += 1
            if status >= 500 and status != 503:
                self.faults.append(f"{status} for {asked[:200]!r}")
            keeps = 2.0 if status < 400 else 0.5  # the connection may be kept, and nothing more come
            while await asyncio.wait_for(reader.read(1 << 16), keeps):
                pass

    async def slow(self, rng: random.Random) -> None:
        """A head or a body, a few bytes at a time; some go on until the server has had enough."""
        data = chat()
        at = rng.choice((10, len(data) - 60))
        await self.talk(
            [data[:at], *(data[i : i + 1] for i in range(at, len(data)))],
            rng.uniform(0.1, 2.0),
            rng.choice((2.0, 5.0, 40.0)),
        )

    async def leaves(self, rng: random.Random) -> None:
        """At any moment: in the head, in the body, right behind it, or a little later."""
        data = chat(max_tokens=256, stream=rng.random() < 0.5, n=rng.choice((1, 1, 4)))
        whole = rng.random() < 0.5
        await self.talk(
            [data if whole else data[: rng.randrange(len(data))]], patience=rng.choice((0.0, 0.05, 0.5, 2.0))
        )

    async def cancels(self, rng: random.Random) -> None:
        """A long stream, broken off."""
        extra = rng.choice(
            ({}, {"stream_steps": True}, {"logprobs": True, "top_logprobs": 5}, {"return_details": True})
        )
        await self.talk([post(LONG | extra | {"stream": True})], patience=rng.uniform(0.05, 3.0))

    async def wrong(self, rng: random.Random) -> None:
        await self.talk([rng.choice(rng.choice((WRONG_BODIES, WRONG_HTTP)))])

    async def large(self, rng: random.Random) -> None:
        data = rng.choice(LARGE)
        await self.talk(data[i : i + 100_000] for i in range(0, len(data), 100_000))

    async def floods(self, rng: random.Random) -> None:
        """More sequences than may wait."""
        patience = rng.uniform(0.5, 3.0)
        await asyncio.gather(*(self.talk([post(LONG | {"n": 16})], patience=patience) for _ in range(40)))

    async def connects(self, rng: random.Random) -> None:
        """More connections than the server takes, and a request on each."""
        await asyncio.gather(*(self.talk([chat()], patience=rng.uniform(0.5, 2.0)) for _ in range(500)))
