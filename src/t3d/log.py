"""Where messages go: to the terminal and to RUN/log.txt, what libraries warn about only to the latter."""

import contextlib
import logging
import sys
from pathlib import Path

log = logging.getLogger("t3d")
_LIBRARIES = ("transformers", "huggingface_hub", "datasets", "py.warnings")
_SOURCES = ("t3d", *_LIBRARIES)


def to_terminal() -> None:
    """Send what t3d has to say to stderr, and keep the libraries' warnings off it."""
    from transformers.utils import logging as transformers_logging

    logging.captureWarnings(True)
    logging.raiseExceptions = False  # a full disk is reported once, not for every line of the log
    transformers_logging.disable_default_handler()
    transformers_logging.disable_progress_bar()  # one for every file it reads or writes
    for name in _LIBRARIES:
        logging.getLogger(name).propagate = False
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).addHandler(logging.NullHandler())
    logging.getLogger("DeepSpeed").addFilter(_NotToStdout())
    log.setLevel(logging.DEBUG)
    log.propagate = False
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setLevel(logging.INFO)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)


class _NotToStdout(logging.Filter):
    """For a library whose own handler writes to stdout, which belongs to results: to the log instead."""

    def filter(self, record: logging.LogRecord) -> bool:
        log.debug("%s: %s", record.name, record.getMessage())
        return False


@contextlib.contextmanager
def to_file(path: Path):
    """Inside, messages are also added to the file `path`."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in _SOURCES:
        logging.getLogger(name).addHandler(handler)
    try:
        yield
    finally:
        for name in _SOURCES:
            logging.getLogger(name).removeHandler(handler)
        with contextlib.suppress(OSError):  # its last lines find no room: whatever ended the run says so
            handler.close()
