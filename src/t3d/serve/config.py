"""What a server allows, and how it decodes where a request does not say."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from t3d.decoding.config import DecodingConfig
from t3d.errors import T3DError

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def _help(text: str, **kwargs):
    return field(metadata={"help": text}, **kwargs)


@dataclass(frozen=True)
class ServeConfig:
    """Settings of `t3d serve`, checked when they are made."""

    host: str = _help("address to listen at; the default can be reached from this machine only", default="127.0.0.1")
    port: int = _help("port to listen at; 0 chooses one", default=8000)
    api_key: str | None = _help("key that clients must send", default=None)
    allow_hosts: tuple[str, ...] = _help("further names (Host header) to answer to on loopback", default=())
    max_queue: int = _help("sequences that may wait besides those being decoded", default=256)
    max_body: int = _help("bytes of a request's body", default=1 << 20)
    timeout: float = _help("seconds for one request, from its body's arrival to the end of its answer", default=600.0)
    body_timeout: float = _help("seconds for a request's head to arrive, and for its body", default=30.0)
    grace: float = _help("seconds that answers in progress get when the server is stopped", default=30.0)
    weight_updates: bool = _help(
        "read new weights at SIGHUP, from the same folders, and at POST /update_weights_from_disk", default=False
    )
    decoding: dict = _help(
        "fields of DecodingConfig where a request does not say; others as the checkpoint recommends",
        default_factory=dict,
    )

    def __post_init__(self):
        DecodingConfig(**self.decoding)  # says what is wrong with it before anything is loaded
        if not 0 <= self.port < 65536:
            raise T3DError(f"--port must lie in 0..65535, got {self.port}")
        for name in ("max_queue", "grace"):
            if getattr(self, name) < 0:
                raise T3DError(f"--{name.replace('_', '-')} must not be negative, got {getattr(self, name)}")
        for name in ("max_body", "timeout", "body_timeout"):
            if getattr(self, name) <= 0:
                raise T3DError(f"--{name.replace('_', '-')} must be positive, got {getattr(self, name)}")
        if self.api_key is not None and not (self.api_key and self.api_key.isascii() and self.api_key.isprintable()):
            raise T3DError("the API key must be one line of printable ASCII characters, and not empty")
        if self.weight_updates and self.api_key is None and self.host not in LOOPBACK:
            raise T3DError(
                f"--weight-updates at {self.host} would let anyone choose what is served; set an API key (T3D_API_KEY)"
            )


def read_key(file: Path | None) -> str | None:
    """The API key: the file's line, else the environment's T3D_API_KEY, else none. Raises T3DError."""
    if file is None:
        return os.environ.get("T3D_API_KEY") or None
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise T3DError(f"cannot read the API key from {file}: {getattr(error, 'strerror', None) or error}") from error
