"""The thread that decodes: one session of an engine, into which the requests of all clients go."""

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace

from t3d.decoding.config import DecodingConfig
from t3d.engine.engine import Engine
from t3d.engine.request import Request
from t3d.engine.session import BlockEvent, EngineStats, Event, FailedEvent, FinishedEvent
from t3d.errors import T3DError
from t3d.log import log
from t3d.serve.errors import ApiError

ENDS = (FinishedEvent, FailedEvent)
_RECENT = 64  # finished sequences over which the speed is measured


@dataclass(eq=False)
class Job:
    """The sequences of one client's request. Iterating gives lists of events, one per forward that brought some."""

    worker: "Worker"
    requests: list[Request]
    left: int  # sequences that have not ended; the worker counts
    queue: asyncio.Queue = field(default_factory=asyncio.Queue)
    cancelled: bool = False

    async def __aiter__(self) -> AsyncIterator[list[Event]]:
        while self.left or not self.queue.empty():
            yield await self.queue.get()
        if self.cancelled:  # who iterates must not take this for the end
            raise asyncio.CancelledError

    def cancel(self) -> None:
        """Free what is left of it; nothing if it is done. To be called however a request ends."""
        self.worker.cancel(self)


class Worker:
    """Owns an engine's session in a thread of its own; everything else here belongs to the event loop's thread."""

    def __init__(self, engine: Engine, name: str, max_queue: int):
        self.engine, self.name = engine, name
        self.capacity = engine.max_batch_size + max_queue
        self.session = engine.open()
        cache = self.session.cache
        # positions that prompt and answer can come to together
        self.longest = min(engine.model.config.max_position_embeddings, cache.num_pages * cache.page_size)
        self.size = cache.num_pages, cache.page_size
        self.broken: str | None = None
        self._jobs: dict[int, Job] = {}  # index of a prompt -> job
        self._next = 0
        self._left = 0  # sequences submitted and not ended
        self._ends: deque[float] = deque(maxlen=_RECENT)
        self._inbox: list[tuple] = []
        self._wake = threading.Condition()
        self._closed = False
        self._install: tuple[Callable[[], None], asyncio.Future] | None = None  # to be done when nothing is decoded
        self._held: list[tuple[Request, bool]] = []  # what waits for that
        self._thread = threading.Thread(target=self._run, name=f"t3d-{name}", daemon=True)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread.start()

    def close(self) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    @property
    def stats(self) -> EngineStats:
        return self.engine.stats

    def submit(self, requests: list[Request], watch: bool = False) -> Job:
        """Queue the sequences. Raises ApiError if there is no room for them."""
        if self.broken:
            raise ApiError(503, f"the model {self.name} has failed: {self.broken}", code="model_failed")
        if len(requests) > self.capacity:
            raise ApiError(
                400, f"{len(requests)} sequences in one request, but this server takes {self.capacity}", param="n"
            )
        if self._left + len(requests) > self.capacity:
            raise ApiError(
                429,
                f"the queue is full: {self._left} sequences are being decoded or wait, of at most {self.capacity}",
                code="queue_full",
                headers={"retry-after": str(self._seconds_for(self._left + len(requests) - self.capacity))},
            )
        if not self._left:
            self._ends.clear()  # the time of doing nothing says nothing about the speed
        first = self._next
        self._next += max(r.index for r in requests) + 1
        self._left += len(requests)
        requests = [replace(r, index=first + r.index) for r in requests]
        job = Job(self, requests, len(requests))
        self._jobs |= {r.index: job for r in requests}
        self._tell("add", requests, watch)
        return job

    def cancel(self, job: Job) -> None:
        if job.left:
            self._left -= job.left
            job.left, job.cancelled = 0, True
            self._tell("cancel", self._forget(job))

    async def install(self, change: Callable[[], None]) -> int:
        """Change the model's weights, in the worker's thread, when the answers that have begun have ended; the others
        wait for it. Not to be called again before it returns, how many waited. Raises T3DError."""
        if self.broken:
            raise T3DError(f"the model {self.name} has failed: {self.broken}")
        done = self._loop.create_future()
        self._tell("install", [(change, done)])
        return await done

    def _forget(self, job: Job) -> list[int]:
        indices = list({r.index for r in job.requests})
        for index in indices:
            del self._jobs[index]
        return indices

    def _seconds_for(self, sequences: int) -> int:
        """When that many will have ended, going by the last ones since there was nothing to do. 1 to 60."""
        recent = time.monotonic() - self._ends[0] if self._ends else 1.0
        return min(60, max(1, math.ceil(sequences * recent / max(1, len(self._ends)))))

    def _tell(self, *message) -> None:
        with self._wake:
            self._inbox.append(message)
            self._wake.notify()

    def _deliver(self, events: list[Event]) -> None:
        """Runs in the event loop. A sequence's last block is not told: its end says all, and where to cut."""
        ended = {(e.index, e.sample) for e in events if isinstance(e, ENDS)}
        jobs: dict[Job, list[Event]] = {}
        for event in events:
            job = self._jobs.get(event.index)  # None: cancelled meanwhile
            if job is not None and not (isinstance(event, BlockEvent) and (event.index, event.sample) in ended):
                jobs.setdefault(job, []).append(event)
        for job, mine in jobs.items():
            over = sum(isinstance(e, ENDS) for e in mine)
            job.left -= over
            self._left -= over
            self._ends.extend([time.monotonic()] * over)
            if not job.left:
                self._forget(job)
            job.queue.put_nowait(mine)

    # ---- in the worker's own thread ----

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._inbox or self._closed or (self.session and not self.session.done)):
                    self._wake.wait()
                if self._closed:
                    return
                inbox, self._inbox = self._inbox, []
            events: list[Event] = []
            for message in inbox:
                events += self._obey(*message)
            try:
                if self.session and not self.session.done:
                    events += self.session.step(isolate=True)
            except Exception as error:  # out of memory, or a fault of ours: whoever is in flight hears of it
                log.exception("%s: decoding failed", self.name)
                events += self._start_again(error)
            if self._install and (self.session is None or self.session.done):
                events += self._change()
            if events:
                self._loop.call_soon_threadsafe(self._deliver, events)

    def _obey(self, what: str, things: list, watch: bool = False) -> list[Event]:
        failed = []
        for thing in things:
            if what == "install":
                self._hold(thing)
            elif what == "cancel" and self.session:
                self.session.cancel(thing)
                self._held = [held for held in self._held if held[0].index != thing]
            elif what == "add" and self._install:
                self._held.append((thing, watch))
            elif what == "add":
                try:
                    if self.session is None:
                        raise T3DError(f"the model {self.name} has failed")
                    self.session.add(thing, watch)
                except T3DError as error:
                    failed.append(FailedEvent(thing.index, thing.sample, error))
        return failed

    def _hold(self, install: tuple[Callable[[], None], asyncio.Future]) -> None:
        """Begin nothing more; what has begun goes on."""
        self._install, scheduler = install, self.session and self.session.scheduler
        for sequence in [*scheduler.waiting] if scheduler else ():
            if not (sequence.prefill or sequence.denoise or sequence.preemptions):
                scheduler.remove(sequence)
                self._held.append((sequence.request, sequence.watched))

    def _change(self) -> list[FailedEvent]:
        (change, done), self._install = self._install, None
        held, self._held = self._held, []
        try:
            if self.session is None:
                raise T3DError(f"the model {self.name} has failed")
            change()
            self.session.runner.refresh()
            self._loop.call_soon_threadsafe(_resolve, done, len(held))
        except Exception as error:
            self._loop.call_soon_threadsafe(_resolve, done, error)
        return [event for request, watch in held for event in self._obey("add", [request], watch)]

    def _start_again(self, error: Exception) -> list[FailedEvent]:
        """A new session; the sequences of the old one are lost."""
        scheduler = self.session.scheduler
        lost = [s.request for s in [*scheduler.running, *scheduler.waiting]]
        self.session = scheduler = None  # its memory is needed for the next
        try:
            self.session = self.engine.open()
        except Exception as again:
            log.exception("%s: cannot start again", self.name)
            self.broken = f"{type(again).__name__}"
        return [FailedEvent(r.index, r.sample, T3DError(f"decoding failed ({type(error).__name__})")) for r in lost]


def _resolve(future: asyncio.Future, result) -> None:
    if future.done():  # whoever waited has gone
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)


def open_worker(engine: Engine, name: str, max_queue: int) -> Worker:
    """A worker whose model has decoded one token, so that what cannot work is known before anyone asks."""
    token = 1 if engine.model.config.mask_token_id == 0 else 0
    engine.generate([[token]], DecodingConfig(max_tokens=1, steps=1, stop_ids=()))
    return Worker(engine, name, max_queue)
