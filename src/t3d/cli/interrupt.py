"""Ctrl-C that does not get lost."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator

AGAIN_SECONDS = 1.0


@contextlib.contextmanager
def insistent_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGINT, and again every second until it has left this context.

    Python raises it wherever the program happens to be. Native code that calls back into Python may drop it there or
    make an error of its own of it (NumPy's comparisons do), and destructors drop it: so it comes again unless an
    `except`, `finally` or `with` is dealing with it, and an error that follows it counts as the interrupt.
    Does nothing where SIGINT is ignored, as behind `nohup`, or is handled by the caller, and outside the main thread,
    which alone may set handlers.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    came = False

    def interrupt(*_):
        nonlocal came
        came = True
        signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS, AGAIN_SECONDS)
        raise KeyboardInterrupt

    def again(*_):
        error = sys.exc_info()[1]
        while error is not None and not isinstance(error, KeyboardInterrupt):
            error = error.__context__
        if error is None:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, again)
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except (Exception, SystemExit) as error:
        if came and getattr(error, "code", 1):
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGALRM, before)
