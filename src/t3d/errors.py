"""What a user can do something about is a `T3DError`; the command line prints its one line and exits with 2."""

import difflib
from collections.abc import Iterable


class T3DError(Exception):
    """A problem with the input, not with the program: the message says what is wrong and what to do, in one line."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))  # it may quote what a library said in several


class PromptError(T3DError):
    """One prompt cannot be decoded; others may."""


class InUseError(T3DError):
    """Another process holds what this one needs."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the known name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def either(choices: Iterable[object]) -> str:
    """`a, b or c`"""
    *others, last = map(str, choices)
    return f"{', '.join(others)} or {last}" if others else last


def characters(text: str, what: str) -> str:
    """The text, if it is characters: JSON and command lines can hold half of a surrogate pair, tokenizers cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):X}"
        raise T3DError(f"{what} holds {half}, half of a surrogate pair, at character {error.start}") from None
    return text
