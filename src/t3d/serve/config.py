"""What a server allows, and how it decodes where a request does not say."""

import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from t3d.components import check_values, setting
from t3d.decoding.config import DecodingConfig
from t3d.errors import T3DError
from t3d.tasks.retrieval import Documents, check_template

TEMPLATE = "{context}\n\n{question}"
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class ServeConfig:
    """Settings of `t3d serve`, checked when they are made."""

    host: str = setting("127.0.0.1", "address to listen at; by default only this machine can reach it")
    port: int = setting(8000, "port to listen at; 0 chooses one", low=0, high=65535)
    allow_host: tuple[str, ...] = setting(
        (), "another host name to answer to, for a proxy on this machine; may be repeated"
    )
    max_batch_size: int = setting(64, "sequences decoded at once, per model", low=1)
    kv_cache_tokens: int | None = setting(None, "size of the cache in tokens, per model; default: what fits", low=1)
    prefix_cache: bool = setting(True, "compute only once what requests have in common at the beginning")
    max_queue: int = setting(256, "sequences that may wait; further clients get 429", low=0)
    max_body: int = setting(1 << 20, "largest size of a request in bytes", low=1)
    timeout: float = setting(600.0, "longest time for one request in seconds", above=0)
    body_timeout: float = setting(30.0, "longest time for a request to arrive in seconds", above=0)
    weight_updates: bool = setting(
        False, "read new weights at SIGHUP, from the same folders, and at POST /update_weights_from_disk"
    )
    retrieve: str | None = setting(
        None, "folder or file of documents: the best passages for a chat's question go into the template"
    )
    retrieve_passages: int = setting(3, "of retrieve: most passages for a question", low=1)
    retrieve_words: int = setting(128, "of retrieve: most words in a passage", low=1)
    template: str = setting(TEMPLATE, "of retrieve: what the last message of the user becomes")
    grace: float = setting(30.0, "seconds to finish answers when stopped", low=0)
    dtype: str | None = setting(None, "float32, bfloat16, ...; default: the checkpoint's")
    device: str | None = setting(None, "cpu, cuda, ...; default: cuda if there is one")
    quantize: str | None = setting(None, "int8 or int4: weights of so few bits")
    api_key: str | None = field(default=None, repr=False)  # that clients must send
    decoding: dict = field(default_factory=dict)  # where a request does not say; else as the checkpoint recommends

    def __post_init__(self):
        check_values(self)
        check_template(self.template, "template", True)
        if self.retrieve is None and self.template != TEMPLATE:
            raise T3DError("template is filled from documents; say where they are with --retrieve")
        DecodingConfig(**self.decoding)  # says what is wrong with it before anything is loaded
        if self.api_key is not None and not (self.api_key and self.api_key.isascii() and self.api_key.isprintable()):
            raise T3DError("the API key must be one line of printable ASCII characters, and not empty")
        if self.weight_updates and self.api_key is None and self.host not in LOOPBACK:
            raise T3DError(
                f"--weight-updates at {self.host} would let anyone choose what is served; set an API key (T3D_API_KEY)"
            )

    @cached_property
    def documents(self) -> Documents | None:
        """Those of `retrieve`. Raises T3DError if there are none."""
        if self.retrieve is None:
            return None
        return Documents(self.retrieve, self.retrieve_passages, self.retrieve_words)


def read_key(file: Path | None) -> str | None:
    """The API key: the file's line, else the environment's T3D_API_KEY, else none. Raises T3DError."""
    if file is None:
        return os.environ.get("T3D_API_KEY") or None
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise T3DError(f"cannot read the API key from {file}: {getattr(error, 'strerror', None) or error}") from error
