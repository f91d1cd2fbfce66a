"""What a client is told when something is wrong, in the form that OpenAI's clients read."""

import json


class ApiError(Exception):
    """An HTTP status and an error body. `retry` False tells OpenAI's clients that trying again will not help."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
        retry: bool = True,
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = (headers or {}) | ({} if retry else {"x-should-retry": "false"})

    @property
    def type(self) -> str:
        known = {401: "authentication_error", 429: "rate_limit_error", 408: "timeout_error", 504: "timeout_error"}
        return known.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> dict:
        return {"error": {"message": str(self), "type": self.type, "param": self.param, "code": self.code}}

    async def __call__(self, scope, receive, send) -> None:
        """As an ASGI application: answers with this error."""
        body = json.dumps(self.body()).encode()  # ASCII: a message may quote what is not valid Unicode
        headers = {"content-type": "application/json", "content-length": str(len(body))} | self.headers
        raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": self.status, "headers": raw})
        await send({"type": "http.response.body", "body": body})
