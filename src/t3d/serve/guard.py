"""What stands before the application: whom it answers, how large a request may be, how long it may take to come."""

import asyncio
import hmac
import uuid

import anyio

from t3d.serve.config import LOOPBACK, ServeConfig
from t3d.serve.errors import ApiError
from t3d.serve.metrics import Metrics

OPEN = ("/", "/health")  # need no key: nothing secret in them
_DRAIN = 64 << 20  # bytes of a body that is too large which are read, so that the client comes to read the answer


class Guard:
    """An ASGI middleware: checks Host and key before anything is read, then reads the whole body within limits."""

    def __init__(self, app, config: ServeConfig, metrics: Metrics):
        self.app, self.config, self.metrics = app, config, metrics
        self.key = config.api_key.encode() if config.api_key else None
        # Names are checked on loopback only: there they keep web pages from reaching us by DNS rebinding.
        self.hosts = {*LOOPBACK, *config.allow_host} if config.host in LOOPBACK else None

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        identity = b"req_" + uuid.uuid4().hex.encode()

        started = False

        async def answer(message):
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                own = [(b"x-request-id", identity), (b"x-content-type-options", b"nosniff")]
                message = message | {"headers": [*message["headers"], *own]}
                self.metrics.answered(scope, message["status"])
            await send(message)

        headers = dict(scope["headers"])
        try:
            self._check_host(headers)
            self._check_key(scope["path"], headers)
            body = await self._read(headers, receive)
        except ApiError as error:
            error.headers["connection"] = "close"  # what is left of the body must not be taken for the next request
            await error(scope, receive, answer)
            return
        if body is None:
            return
        try:
            await self.app(scope, _replay(body, receive), answer)
        except asyncio.CancelledError:  # stopping, and the time for answers in progress is over
            if not started:
                await ApiError(503, "the server is stopping", headers={"connection": "close"})(scope, receive, answer)

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        if self.hosts is None or b"host" not in headers:
            return
        name = headers[b"host"].decode("latin-1").lower()
        name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
        if name not in self.hosts:
            raise ApiError(
                421, "this server does not answer to that host name; start it with --allow-host to change it"
            )

    def _check_key(self, path: str, headers: dict[bytes, bytes]) -> None:
        if self.key is None or path in OPEN:
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        right = hmac.compare_digest(given.strip(), self.key)  # the time it takes says nothing about the key
        if scheme.lower() != b"bearer" or not right:
            said = "Incorrect API key provided." if given else "You didn't provide an API key."
            raise ApiError(
                401,
                f"{said} Send it in the Authorization header, as: Bearer KEY",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )

    async def _read(self, headers: dict[bytes, bytes], receive) -> bytes | None:
        """The body; None if the client has gone."""
        limit, body, size, more = self.config.max_body, bytearray(), 0, True
        declared = int(headers.get(b"content-length", b"0"))
        if declared > limit and b"expect" in headers:
            more, size = False, declared  # it waits for our word before it sends the body
        with anyio.move_on_after(self.config.body_timeout) as waiting:
            while more and size <= _DRAIN:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                size += len(message.get("body", b""))
                if size <= limit:
                    body += message.get("body", b"")
                more = message.get("more_body", False)
        if max(size, declared) > limit:
            raise ApiError(413, f"the body is larger than {limit:,} bytes", code="body_too_large", retry=False)
        if waiting.cancelled_caught:
            raise ApiError(408, f"the body did not arrive within {self.config.body_timeout:g} s", code="timeout")
        return bytes(body)


def _replay(body: bytes, receive):
    """A `receive` that gives the body that was read, then what comes after it: the client's going."""
    parts = [{"type": "http.request", "body": body, "more_body": False}]

    async def again():
        return parts.pop() if parts else await receive()

    return again
