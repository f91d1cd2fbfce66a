"""From a job's events to the objects that OpenAI's clients read, whole or as a stream."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass

from t3d.decoding.logprobs import Logprobs
from t3d.engine.request import Request
from t3d.engine.session import Event, FailedEvent, FinishedEvent, StepEvent
from t3d.serve.errors import ApiError
from t3d.serve.logprobs import Tokens, Told, joined
from t3d.serve.model import Served
from t3d.serve.schema import ChatBody, CompletionBody
from t3d.serve.text import TextStream
from t3d.serve.worker import Job
from t3d.trajectories.pieces import Pieces
from t3d.trajectories.record import Trajectory


@dataclass(frozen=True)
class New:
    """What has come: text, the ids that brought it, their steps and, if asked for, OpenAI's `logprobs` of them."""

    text: str
    ids: list[int]
    steps: list[int]
    logprobs: dict | None


class Choice:
    """One answer while it grows. echo: the prompt, if it is given back. told: writes log-probabilities, if asked."""

    def __init__(self, number: int, request: Request, tokenizer, echo: str | None, told: Told | None):
        self.number, self.request, self.tokenizer = number, request, tokenizer
        self.text, self.echo, self.told = TextStream(tokenizer, request.config.stop), echo, told
        self.trajectory: Trajectory | None = None
        self.start = time.perf_counter()
        self._taken = 0

    def given(self) -> New:
        """What is there before anything is decoded: the prompt, or nothing."""
        if self.echo is None:
            return New("", [], [], None)
        return New(self.echo, [], [], self.told and self.told.prompt(self.request.prompt_ids))

    def take(self, event: Event) -> New:
        """What a block has brought, or the end."""
        first = self._taken
        if not isinstance(event, FinishedEvent):
            self._taken += len(event.token_ids)
            return self._new(self.text.push(event.token_ids), event.token_ids, event.step_map, event.logprobs)
        t = self.trajectory = event.trajectory
        self.cached = event.cached
        self.seconds = time.perf_counter() - self.start
        rest = slice(first, t.length)
        text = self.text.push(t.response_ids[rest]) + self.text.finish()
        return self._new(text, t.response_ids[rest], t.step_map[rest], t.logprobs and t.logprobs[rest])

    def _new(self, text: str, ids: list[int], steps: list[int], noted: Logprobs | None) -> New:
        return New(text, ids, steps, self.told.answer(ids, noted) if self.told and ids else None)

    @property
    def finish_reason(self) -> str:
        return "stop" if self.text.stopped else self.trajectory.finish_reason

    def details(self) -> dict:
        """Our own part of an answer. Everything is about the tokens that count, through the stop token."""
        t, n = self.trajectory, self.trajectory.length
        tail = t.tail
        return {
            "tpf": round(n / t.nfe.predicting, 4),
            "tpf_all": round(n / t.nfe.total, 4),
            "nfe": asdict(t.nfe) | {"total": t.nfe.total},
            "seconds": round(self.seconds, 4),
            "seed": self.request.config.seed,
            "block_size": t.block_size,
            "steps": self.request.config.steps,
            "prompt_tokens": len(t.prompt_ids),
            "token_ids": t.response_ids[:n],
            "tokens": Pieces(self.tokenizer).of(t)[tail : tail + n],
            "step_map": t.step_map[:n],
            "confidence": [round(c, 4) for c in t.confidence[:n]],
        }


@dataclass(frozen=True)
class Form:
    """What differs between the two endpoints."""

    prefix: str
    whole: str
    piece: str
    chat: bool

    def choice(self, text: str) -> dict:
        return {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}

    def delta(self, text: str | None, role: bool = False) -> dict:
        if not self.chat:
            return {"text": text or ""}
        return {"delta": ({"role": "assistant"} if role else {}) | ({} if text is None else {"content": text})}


CHAT = Form("chatcmpl-", "chat.completion", "chat.completion.chunk", chat=True)
COMPLETION = Form("cmpl-", "text_completion", "text_completion", chat=False)


class Answer:
    """All choices of one request."""

    def __init__(
        self, form: Form, body: ChatBody | CompletionBody, served: Served, job: Job, seconds: float, clock: Callable
    ):
        self.form, self.body, self.job, self.tokenizer = form, body, job, served.tokenizer
        self.deadline, self.seconds, self.clock = time.monotonic() + seconds, seconds, clock
        self.choices = {
            (r.index, r.sample): self._choice(number, r, served.tokens) for number, r in enumerate(job.requests)
        }  # in the order of prompts, then samples
        self.found = {}  # what the documents gave, for those who want details
        if form.chat and body.return_details and served.documents is not None:
            self.found = {"context": [asdict(passage) for passage in served.retrieved(body.messages)]}
        self.head = {"id": form.prefix + uuid.uuid4().hex, "created": int(time.time()), "model": served.name}

    def _choice(self, number: int, request: Request, tokens: Tokens) -> Choice:
        echo, told = None, None
        if self.body.echo:
            echo = self.body.prompts()[number // request.config.n]
            echo = echo if isinstance(echo, str) else self.tokenizer.decode(echo)
        if self.body.alternatives is not None:
            told = Told(tokens, self.form.chat, self.body.alternatives)
        return Choice(number, request, self.tokenizer, echo, told)

    def usage(self) -> dict:
        prompts = {r.index: len(r.prompt_ids) for r in self.job.requests}
        prompt = sum(prompts.values())
        cached: dict[int, int] = {}  # a prompt counts once, and its samples share it
        for (index, _), choice in self.choices.items():
            cached[index] = min(cached.get(index, choice.cached), choice.cached)
        completion = sum(c.trajectory.length for c in self.choices.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(cached.values())},
        }

    async def _events(self) -> AsyncIterator[tuple[Choice, Event]]:
        """Raises ApiError when a sequence fails or the time is up."""
        batches, first = aiter(self.job), True
        while True:
            try:
                batch = await asyncio.wait_for(anext(batches), self.deadline - time.monotonic())
            except StopAsyncIteration:
                self.clock(True)
                return
            except asyncio.TimeoutError:
                raise ApiError(
                    504, f"the answer took longer than {self.seconds:g} s", code="timeout", retry=False
                ) from None
            for event in batch:
                if isinstance(event, FailedEvent):
                    message = str(event.error).partition(": ")[2] or str(event.error)
                    raise ApiError(500, message, code="decoding_failed", retry=False)
                if first and not isinstance(event, StepEvent):
                    self.clock(False)
                    first = False
                yield self.choices[event.index, event.sample], event

    async def whole(self) -> dict:
        news = {choice: [choice.given()] for choice in self.choices.values()}
        async for choice, event in self._events():
            news[choice].append(choice.take(event))
        choices = []
        for choice, parts in news.items():
            logprobs = joined([part.logprobs for part in parts if part.logprobs])
            one = {"index": choice.number, "finish_reason": choice.finish_reason, "logprobs": logprobs}
            one |= self.form.choice("".join(part.text for part in parts))
            if self.body.return_details:
                one["t3d"] = choice.details() | self.found
            choices.append(one)
        return self.head | {"object": self.form.whole, "choices": choices, "usage": self.usage()}

    async def stream(self) -> AsyncIterator[bytes]:
        """Server-sent events: a chunk per block that brought text; an error is the last chunk."""
        include_usage = self.body.stream_options is not None and self.body.stream_options.include_usage

        def chunk(
            choice: Choice,
            delta: dict,
            finish: str | None = None,
            t3d: dict | None = None,
            logprobs: dict | None = None,
        ) -> bytes:
            one = {"index": choice.number, "finish_reason": finish, "logprobs": logprobs} | delta
            one |= {} if t3d is None else {"t3d": t3d}
            return sse(
                self.head | {"object": self.form.piece, "choices": [one]} | ({"usage": None} if include_usage else {})
            )

        details = bool(self.body.return_details)
        pieces = Pieces(self.tokenizer)
        try:
            for choice in self.choices.values():
                config = choice.request.config
                about = {
                    "block_size": config.block_size,
                    "steps": config.steps,
                    "prompt_tokens": len(choice.request.prompt_ids),
                    "tail": choice.request.start % config.block_size,  # of them, those in the answer's first block
                }
                given = choice.given()
                if self.form.chat or details or given.text:
                    delta = self.form.delta(given.text, role=True)
                    yield chunk(choice, delta, t3d=about if details else None, logprobs=given.logprobs)
            async for choice, event in self._events():
                if isinstance(event, StepEvent):
                    yield chunk(choice, self.form.delta(None), t3d=self._step(event, choice, pieces))
                    continue
                new = choice.take(event)
                if new.text or new.logprobs or (details and new.ids):
                    brought = {"token_ids": new.ids, "step_map": new.steps} if details else None
                    yield chunk(choice, self.form.delta(new.text), t3d=brought, logprobs=new.logprobs)
                if choice.trajectory is not None:
                    last = choice.details() | self.found if details else None
                    yield chunk(choice, self.form.delta(None), choice.finish_reason, last)
            if include_usage:
                yield sse(self.head | {"object": self.form.piece, "choices": [], "usage": self.usage()})
        except ApiError as error:
            yield sse(error.body())
            return
        yield b"data: [DONE]\n\n"

    def _step(self, event: StepEvent, choice: Choice, pieces: Pieces) -> dict:
        """A step of one block; `block` counts from the one in which the answer begins. A text of null: taken back."""
        start, size = choice.request.start, choice.request.config.block_size
        mask = self.job.worker.engine.model.config.mask_token_id
        return {
            "forward": event.forward,
            "block": (start + event.places[0]) // size - start // size,
            "step": event.step,
            "places": event.places,
            "token_ids": event.token_ids,
            "tokens": [None if token == mask else pieces([token])[0] for token in event.token_ids],
            "confidence": [round(c, 4) for c in event.confidence],
        }


def sse(value: dict) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"
