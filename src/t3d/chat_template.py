"""A chat as a model reads it. The template is code of the checkpoint: it runs in Jinja's sandbox, and its loops end."""

import sys
import time

from t3d.errors import T3DError

SECONDS = 10.0  # of CPU time for one chat; a thousand messages take some hundredths


def render(tokenizer, messages: list[dict], **options) -> str:
    """The messages in the tokenizer's chat template; `options` are those of `apply_chat_template`.

    Python's tracing sees every line of the template and so ends loops, in any thread. It cannot end a single operation.

    Raises:
        T3DError: the template refuses the messages, is broken, or is still running after `SECONDS`.
    """
    end, before = time.thread_time() + SECONDS, sys.gettrace()

    def line(*_):
        if time.thread_time() > end:
            raise TimeoutError(f"it takes more than {SECONDS:g} s")
        return line

    sys.settrace(lambda frame, *_: line if frame.f_code.co_filename == "<template>" else None)
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # whatever its code raises
        raise T3DError(f"the tokenizer's chat template refuses it: {error or type(error).__name__}") from error
    finally:
        sys.settrace(before)
