"""Tokens in, text out, as soon as it is certain."""

from collections.abc import Sequence

_PENDING = 8  # tokens over which the bytes of one character may be spread; UTF-8 has at most 4 bytes


class TextStream:
    """Decodes a growing list of token ids; what `push` and `finish` return joins to the text of all of them.

    Never half a character, never special tokens; from the first stop string on, nothing. A text that may become a stop
    string is held back until it is certain.
    """

    def __init__(self, tokenizer, stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, stop
        self.stopped = False
        self._ids: list[int] = []
        self._start = self._read = 0  # the ids before `_read` have been given out; those from `_start` are context
        self._held = ""

    def push(self, ids: Sequence[int]) -> str:
        self._ids += ids
        return self._release(self._new(final=False), final=False)

    def finish(self) -> str:
        return self._release(self._new(final=True), final=True)

    def _decode(self, start: int, end: int) -> str:
        return self.tokenizer.decode(self._ids[start:end], skip_special_tokens=True)

    def _new(self, final: bool) -> str:
        """What the ids since the last call add. Context matters: some tokenizers drop the first word's space."""
        before, end = self._decode(self._start, self._read), len(self._ids)
        text = self._decode(self._start, end)
        if text.endswith("\ufffd") and not final:  # bytes that are not a character yet, or never will be one
            end = max(self._read, end - _PENDING)
            certain = self._decode(self._start, end)
            if not text.startswith(certain):
                return ""
            text = certain
        if len(text) <= len(before):
            return ""
        self._start, self._read = self._read, end
        return text[len(before) :]

    def _release(self, text: str, final: bool) -> str:
        if self.stopped:
            return ""
        held = self._held + text
        found = [place for place in map(held.find, self.stop) if place >= 0]
        if found:
            self.stopped = True
            return held[: min(found)]
        keep = 0 if final else max((_overlap(held, stop) for stop in self.stop), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
