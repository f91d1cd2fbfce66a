"""The application: OpenAI's endpoints, health, metrics and the playground."""

import asyncio
import base64
import hashlib
import re
import signal
from contextlib import asynccontextmanager, suppress
from importlib.resources import files

import anyio
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from t3d import __version__
from t3d.errors import T3DError
from t3d.serve import replies
from t3d.serve.answer import CHAT, COMPLETION, Answer, Form
from t3d.serve.catalogue import catalogue, find
from t3d.serve.config import ServeConfig
from t3d.serve.errors import ApiError
from t3d.serve.guard import Guard
from t3d.serve.metrics import Metrics
from t3d.serve.model import Served
from t3d.serve.schema import ChatBody, CompletionBody, Decoding, DetokenizeBody, TokenizeBody, UpdateBody, explain
from t3d.serve.update import update


def create_app(models: list[Served], config: ServeConfig) -> Guard:
    """An ASGI application that serves the models; their workers run from its startup to its shutdown."""
    named = {served.name: served for served in models}
    if len(named) < len(models):
        raise T3DError("two models have the same name; give names: t3d serve teacher=FOLDER student=FOLDER")
    metrics = Metrics(served.worker for served in models)
    page, policy = _page()

    # the interactive documentation would load its scripts from elsewhere
    app = FastAPI(
        title="t3d",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        lifespan=_lifespan(models, config),
        responses=replies.ERRORS,
    )

    async def respond(form: Form, body: Decoding, request: Request) -> Response:
        served = find(named, body.model)
        clock = metrics.clock(served.name)
        requests = await asyncio.to_thread(served.chat if form.chat else served.complete, body)
        job = served.worker.submit(requests, watch=bool(body.stream_steps))
        answer = Answer(form, body, served, job, config.timeout, clock)
        if body.stream:
            return EventStream(answer)
        try:
            whole = await _unless_gone(answer.whole(), request)
        finally:
            job.cancel()
        return Response(status_code=499) if whole is None else JSONResponse(whole)

    @app.post("/v1/chat/completions", response_model=replies.ChatReply, responses={200: {"content": replies.STREAM}})
    async def chat(body: ChatBody, request: Request):
        """Answer a conversation, as OpenAI's endpoint of this name; `stream` gives server-sent events."""
        return await respond(CHAT, body, request)

    @app.post("/v1/completions", response_model=replies.CompletionReply, responses={200: {"content": replies.STREAM}})
    async def completions(body: CompletionBody, request: Request):
        """Continue one or several prompts, as OpenAI's endpoint of this name."""
        return await respond(COMPLETION, body, request)

    @app.post("/tokenize", response_model=replies.TokenizeReply)
    async def tokenize(body: TokenizeBody):
        """The tokens of a text, or of a conversation through the model's chat template."""
        return await asyncio.to_thread(find(named, body.model).tokenize, body)

    @app.post("/detokenize", response_model=replies.DetokenizeReply)
    async def detokenize(body: DetokenizeBody):
        """The text of tokens."""
        return await asyncio.to_thread(find(named, body.model).detokenize, body)

    if config.weight_updates:

        @app.post("/update_weights_from_disk", response_model=replies.UpdateReply)
        async def update_weights(body: UpdateBody):
            """Serve another checkpoint of the same architecture; answers when its weights are in use."""
            served = find(named, body.model)
            try:
                waited = await update(served, body.model_path, config.decoding)
            except T3DError as error:
                raise ApiError(400, str(error), param="model_path", code="weights_refused") from error
            said = f"{served.name} has the weights of {body.model_path}"
            return {"success": True, "message": said, "num_paused_requests": waited}

    @app.get("/health", response_model=replies.Health, responses={503: {"model": replies.Health}})
    async def health():
        broken = {served.name: served.worker.broken for served in models if served.worker.broken}
        return JSONResponse(
            {"status": "failing", "models": broken} if broken else {"status": "ok"}, 503 if broken else 200
        )

    @app.get("/metrics", response_class=PlainTextResponse)
    async def read_metrics():
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", response_class=HTMLResponse)
    async def playground():
        return HTMLResponse(page, headers={"content-security-policy": policy, "referrer-policy": "no-referrer"})

    catalogue(app, named)
    _answer_faults(app)
    metrics.paths = {route.path for route in app.routes}
    return Guard(app, config, metrics)


def _lifespan(models: list[Served], config: ServeConfig):
    """The workers run from the application's startup to its shutdown; SIGHUP reads weights again, if that is wanted."""
    updates: set[asyncio.Task] = set()  # tasks that nobody else holds

    def hang_up() -> None:
        task = asyncio.ensure_future(read_again())
        updates.add(task)
        task.add_done_callback(updates.discard)

    async def read_again() -> None:
        for served in models:
            with suppress(T3DError):  # the log has it
                await update(served, served.path, config.decoding)

    @asynccontextmanager
    async def lifespan(_):
        for served in models:
            served.worker.start(asyncio.get_running_loop())
        if config.weight_updates:
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, hang_up)
        yield
        for served in models:
            await asyncio.to_thread(served.worker.close)

    return lifespan


def _answer_faults(app: FastAPI) -> None:
    """Whatever goes wrong is answered as OpenAI's endpoints do."""

    @app.exception_handler(ApiError)
    async def api_error(request, error: ApiError):
        return error

    @app.exception_handler(RequestValidationError)
    async def invalid(request, error: RequestValidationError):
        message, param, code = explain(error.errors())
        return ApiError(400, message, param=param, code=code)

    @app.exception_handler(HTTPException)
    async def http_error(request, error: HTTPException):
        known = {
            404: f"there is no {request.url.path!a} here",
            405: f"{request.method} is not for {request.url.path!a}",
        }
        return ApiError(error.status_code, known.get(error.status_code, str(error.detail)), headers=error.headers)

    @app.exception_handler(Exception)
    async def fault(request, error: Exception):
        return ApiError(500, "the server made a mistake; its log says more")


class EventStream(StreamingResponse):
    """Server-sent events; whatever ends them, the answer's sequences are freed."""

    def __init__(self, answer: Answer):
        super().__init__(answer.stream(), media_type="text/event-stream", headers={"cache-control": "no-store"})
        self.answer = answer

    async def __call__(self, scope, receive, send) -> None:
        try:
            # a client that does not read keeps `send` waiting; the stream itself ends in time and says so
            with anyio.move_on_after(self.answer.seconds + 1):
                await super().__call__(scope, receive, send)
        finally:
            self.answer.job.cancel()


async def _unless_gone(work, request: Request):
    """The result of `work`, or None as soon as the client has gone."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        task.cancel()
        gone.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _page() -> tuple[str, str]:
    """The playground and a policy that lets it run its own script and style, and nothing else."""
    html = files("t3d.serve").joinpath("playground.html").read_text(encoding="utf-8")

    def allowed(tag: str) -> str:
        texts = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.S)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(t.encode()).digest()).decode()}'" for t in texts)

    rules = {
        "default-src": "'none'",
        "script-src": allowed("script"),
        "style-src": allowed("style"),
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return html, "; ".join(f"{name} {value}" for name, value in rules.items())
