"""`t3d serve`: loads the models and answers until it is told to stop."""

import logging
import signal
import socket

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from t3d.embedded import checkpoint
from t3d.engine import Engine
from t3d.errors import T3DError
from t3d.log import log
from t3d.models import load_model
from t3d.models.load import require_tokenizer
from t3d.serve.app import create_app
from t3d.serve.config import LOOPBACK, ServeConfig
from t3d.serve.model import Served, name_of, recommended_decoding
from t3d.serve.worker import open_worker


def serve(models: list[str], config: ServeConfig) -> None:
    """Serve `[NAME=]CHECKPOINT`s until SIGTERM or Ctrl-C; then answers in progress get `config.grace` seconds.

    Raises T3DError if the port is taken, or for a model that does not load or has no tokenizer.
    """
    listener = _listen(config)  # before the models are loaded, which may take minutes
    try:
        served = load(models, config)
        app = create_app(served, config)
        host, port = listener.getsockname()[:2]
        if config.host not in LOOPBACK and config.api_key is None:
            log.warning("anyone who can reach %s may use this server: there is no API key (T3D_API_KEY)", host)
        where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        log.info("serving %s at %s (playground) and %s/v1", ", ".join(s.name for s in served), where, where)
        _run(app, listener, config, sum(s.worker.capacity for s in served))
    finally:
        listener.close()


def load(models: list[str], config: ServeConfig) -> list[Served]:
    loaded, asked = [], (config.documents, config.template)  # first, because reading them may fail
    for argument in models:
        name, path = name_of(argument)
        model, tokenizer = load_model(checkpoint(path), config.dtype, config.device, quantize=config.quantize)
        require_tokenizer(tokenizer, path)
        loaded.append((name, path, model, tokenizer, recommended_decoding(path, model, tokenizer, config.decoding)))
    served = []
    for name, path, model, tokenizer, default in loaded:
        engine = Engine(
            model,
            tokenizer,
            max_batch_size=config.max_batch_size,
            kv_cache_tokens=config.kv_cache_tokens,
            prefix_cache=config.prefix_cache,
            memory_share=0.5 / len(loaded),
        )
        worker = open_worker(engine, name, config.max_queue)
        served.append(Served(worker, default, path, *asked))
    return served


def _listen(config: ServeConfig) -> socket.socket:
    try:
        family = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((config.host, config.port), family=family, backlog=1024)
    except OSError as error:
        raise T3DError(f"cannot listen at {config.host}:{config.port}: {error.strerror or error}") from error


def _run(app, listener: socket.socket, config: ServeConfig, capacity: int) -> None:
    uvicorn_log = logging.getLogger("uvicorn")
    uvicorn_log.handlers, uvicorn_log.propagate = log.handlers, False
    uvicorn_log.setLevel(logging.ERROR)  # what clients do wrong is no news
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            http=_protocol(config.body_timeout),
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=capacity + 128,
            timeout_graceful_shutdown=int(config.grace),
        )
    )
    # uvicorn stops at these signals and then raises them again, for whoever was there before: nobody
    before = {s: signal.signal(s, lambda *_: None) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _protocol(seconds: float) -> type[H11Protocol]:
    """HTTP/1.1 that closes a connection whose request line and headers take too long, which uvicorn's would keep.

    A request whose body is not HTTP gets one answer. uvicorn gives one and lets the application give another, which h11
    refuses: a traceback for every such client.
    """

    class Protocol(H11Protocol):
        head_timer = None

        def connection_made(self, transport):
            super().connection_made(transport)
            self._wait()

        def data_received(self, data):
            super().data_received(data)
            busy = self.cycle is not None and not self.cycle.response_complete
            if busy and self.head_timer is not None:
                self.head_timer.cancel()
                self.head_timer = None
            elif not busy and self.timeout_keep_alive_task is None:
                self._wait()

        def send_400_response(self, msg):
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                super().send_400_response(msg)
            else:
                self.transport.close()
            if self.cycle is not None and not self.cycle.response_complete:
                self.cycle.disconnected = True
                self.cycle.message_event.set()

        def _wait(self):
            if self.head_timer is None:
                self.head_timer = self.loop.call_later(seconds, self._late)

        def _late(self):
            self.head_timer = None
            if (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing():
                self.transport.close()

        def connection_lost(self, exc):
            if self.head_timer is not None:
                self.head_timer.cancel()
            super().connection_lost(exc)

    return Protocol
