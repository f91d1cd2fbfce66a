"""Log-probabilities in the two forms that OpenAI's clients read."""

import codecs
import re
from itertools import chain

from transformers.convert_slow_tokenizer import bytes_to_unicode

from t3d.decoding.logprobs import Logprobs

_BYTE = {character: byte for byte, character in bytes_to_unicode().items()}  # as byte-level vocabularies write them
_LEAST = -9999.0  # JSON has no infinity


class Tokens:
    """What tokens look like, each by itself."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.special = set(tokenizer.all_special_ids)
        self._known: dict[int, bytes] = {}

    def bytes(self, token: int) -> bytes:
        """Those it adds to a text, perhaps not of whole characters; a special token's name."""
        if token not in self._known:
            self._known[token] = self._bytes(token)
        return self._known[token]

    def _bytes(self, token: int) -> bytes:
        text = self._decode([token])
        if "\ufffd" not in text:
            return self._decode([token, token])[len(text) :].encode()  # some drop the space that a text begins with
        name = self.tokenizer.convert_ids_to_tokens(token)
        if found := re.fullmatch(r"<0x([0-9A-F]{2})>", name):
            return bytes([int(found[1], 16)])
        return bytes(_BYTE[c] for c in name) if _BYTE.keys() >= set(name) else text.encode()

    def text(self, token: int) -> str:
        """Its text; if that is not whole characters, `bytes:` and the bytes, so that no two tokens look alike."""
        raw = self.bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


class Told:
    """The log-probabilities of one answer while it grows."""

    def __init__(self, tokens: Tokens, chat: bool, top: int):
        self.tokens, self.chat, self.top = tokens, chat, top
        self._offset = 0  # characters so far
        self._reader = codecs.getincrementaldecoder("utf-8")("replace")

    def prompt(self, ids: tuple[int, ...]) -> dict:
        """A completion's part for tokens that were given, which have none."""
        nothing = [None] * len(ids)
        texts, offsets = [self.tokens.text(token) for token in ids], self._offsets(ids)
        return {"tokens": texts, "token_logprobs": nothing, "top_logprobs": nothing, "text_offset": offsets}

    def answer(self, ids: list[int], noted: Logprobs) -> dict:
        """The part of new tokens of the answer."""
        own = [_plain(x) for x in noted.token.tolist()]
        top = [
            list(zip(some, map(_plain, values), strict=True))[: self.top]
            for some, values in zip(noted.ids.tolist(), noted.values.tolist(), strict=True)
        ]
        if self.chat:
            content = [
                self._one(token, value) | {"top_logprobs": [self._one(*other) for other in others]}
                for token, value, others in zip(ids, own, top, strict=True)
            ]
            return {"content": content, "refusal": None}
        text = self.tokens.text
        return {
            "tokens": [text(token) for token in ids],
            "token_logprobs": own,
            "top_logprobs": [
                {text(token): value for token, value in [*others, (mine, logprob)]}
                for mine, logprob, others in zip(ids, own, top, strict=True)
            ],
            "text_offset": self._offsets(ids),
        }

    def _one(self, token: int, logprob: float) -> dict:
        return {"token": self.tokens.text(token), "logprob": logprob, "bytes": list(self.tokens.bytes(token))}

    def _offsets(self, ids) -> list[int]:
        """Where in the text each token begins; special tokens take no room."""
        found = []
        for token in ids:
            raw = b"" if token in self.tokens.special else self.tokens.bytes(token)
            begun, _ = self._reader.getstate()  # bytes of a character that is not whole
            goes_on = raw[:1] and 0x80 <= raw[0] < 0xC0
            found.append(self._offset + bool(begun and not goes_on))
            self._offset += len(self._reader.decode(raw))
        return found


def joined(parts: list[dict]) -> dict | None:
    """Parts that follow each other as one."""
    if not parts:
        return None
    lists = [name for name, value in parts[0].items() if value is not None]
    return parts[0] | {name: list(chain.from_iterable(part[name] for part in parts)) for name in lists}


def _plain(value: float) -> float:
    return round(max(value, _LEAST), 6)
