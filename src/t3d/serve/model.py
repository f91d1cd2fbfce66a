"""A checkpoint that is served: what a client asks for becomes requests for its worker."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from t3d.blocks import geometry
from t3d.chat_template import render
from t3d.decoding.config import DecodingConfig
from t3d.decoding.constrained import Grammar, check, grammar_tokenizer
from t3d.engine.intake import make_requests, resolve
from t3d.engine.request import Request
from t3d.engine.session import check_fits
from t3d.errors import T3DError
from t3d.models.recommended import recommended
from t3d.serve.errors import ApiError
from t3d.serve.logprobs import Tokens
from t3d.serve.schema import MAX_BLOCK, ChatBody, CompletionBody, Decoding, DetokenizeBody, Message, TokenizeBody
from t3d.serve.worker import Worker
from t3d.tasks.retrieval import Documents, Passage, fill


class Served:
    """A name, a worker and a tokenizer. The methods take time for long prompts, and may run in any thread.

    documents: what every chat's question is looked up in. template: what the question becomes with what was found.
    """

    def __init__(
        self,
        worker: Worker,
        default: DecodingConfig,
        path: str = "",
        documents: Documents | None = None,
        template: str = "{question}",
    ):
        self.worker, self.default, self.name, self.path = worker, default, worker.name, path
        self.documents, self.template = documents, template
        self.updating = asyncio.Lock()
        self.model, self.tokenizer = worker.engine.model, worker.engine.tokenizer
        self.tokenizer.encode("a", add_special_tokens=False)  # the first call may still change its settings
        self.tokens = Tokens(self.tokenizer)

    @cached_property
    def grammar_tokenizer(self):
        """Raises T3DError."""
        return grammar_tokenizer(self.tokenizer, self.model.config.vocab_size)

    def chat(self, body: ChatBody) -> list[Request]:
        """Raises ApiError."""
        return self._requests(
            [self._rendered(body.messages)],
            body,
            body.limit,
            "messages",
            lambda text: self._rendered(body.messages, text),
        )

    def _rendered(self, messages: list[Message], last: str | None = None, answer: bool = True) -> str:
        """The chat as text; with `last` in the place of what its last message of a user says; `answer`: up to where
        the answer begins. Raises ApiError."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise ApiError(400, f"{self.name} has no chat template; use /v1/completions", param="messages")
        messages = [message.plain() for message in messages]
        asked = _question(messages)
        if last is not None and asked is None:
            raise ApiError(400, "negative_prompt stands for the user's message, but there is none", param="messages")
        if asked is not None:
            if last is not None:
                asked["content"] = last
            if self.documents is not None:
                asked["content"] = fill(self.template, asked["content"], self.documents)
        try:
            return render(self.tokenizer, messages, add_generation_prompt=answer)
        except T3DError as error:
            raise ApiError(400, str(error), param="messages") from error

    def retrieved(self, messages: list[Message]) -> list[Passage]:
        """The passages that a chat was given, the best first."""
        asked = _question([message.plain() for message in messages])
        return [] if self.documents is None or asked is None else self.documents.search(asked["content"])

    def complete(self, body: CompletionBody) -> list[Request]:
        """Raises ApiError."""
        return self._requests(body.prompts(), body, body.limit, "prompt")

    def tokenize(self, body: TokenizeBody) -> dict:
        """Raises ApiError."""
        text = body.prompt
        if text is None:
            text = self._rendered(body.messages, answer=body.add_generation_prompt)
        ids = self.tokenizer.encode(text, add_special_tokens=body.add_special_tokens)
        names = self.tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None
        return {"count": len(ids), "max_model_len": self.worker.longest, "tokens": ids, "token_strs": names}

    def detokenize(self, body: DetokenizeBody) -> dict:
        """Raises ApiError."""
        most = len(self.tokenizer) - 1
        if body.tokens and max(body.tokens) > most:
            raise ApiError(400, f"token ids of {self.name} lie in 0..{most}, got {max(body.tokens)}", param="tokens")
        return {"prompt": self.tokenizer.decode(body.tokens)}

    def _requests(
        self, prompts: list, body: Decoding, limit: int | None, param: str, render: Callable[[str], str] = str
    ) -> list[Request]:
        """render: what a negative prompt becomes."""
        if not prompts:
            raise ApiError(400, "there is no prompt", param=param)
        encoded = [
            self.tokenizer.encode(p, add_special_tokens=False) if isinstance(p, str) else list(p) for p in prompts
        ]
        own = self.model.config.window or 1  # none: the whole response, of any length
        anchored = geometry(self.model.config)["anchored"]
        block = body.block_size or self.default.block_size or own
        if block > max(own, MAX_BLOCK):
            raise ApiError(400, f"block_size must be at most {max(own, MAX_BLOCK)}, got {block}", param="block_size")
        longest = max(map(len, encoded))
        most = self.worker.longest if anchored else self.worker.longest // block * block
        room = most - longest
        if room < (limit or 1):
            whole = "" if anchored else f", in whole blocks of {block}"
            asked = f"{longest} in the {param}" + (f", {limit} for the answer" if limit else "")
            raise ApiError(
                400,
                f"This model's maximum context length is {self.worker.longest} tokens{whole}. "
                f"However, you requested {longest + (limit or 1)} tokens ({asked}). Please reduce them.",
                param=param,
                code="context_length_exceeded",
            )
        try:
            config = body.decoding(self.default, limit or room)
            if config.negative_prompt is not None:
                config = replace(config, negative_prompt=render(config.negative_prompt))
            requests = make_requests(encoded, config, None, None, self.model, self.tokenizer, body.alternatives)
            if body.json_schema is not None:
                check(requests[0].config)
                grammar = Grammar.of_schema(body.json_schema, self.grammar_tokenizer)
                requests = [replace(request, grammar=grammar) for request in requests]
            for request in requests:  # a flight may need more than the text itself
                check_fits(request, *self.worker.size)
            return requests
        except T3DError as error:
            raise ApiError(400, str(error)) from error


def _question(messages: list[dict]) -> dict | None:
    """The last message of a user."""
    return next((message for message in reversed(messages) if message["role"] == "user"), None)


def recommended_decoding(path: str, model, tokenizer, settings: dict) -> DecodingConfig:
    """How to decode where a request does not say: `settings`, then what the checkpoint recommends. Raises T3DError."""
    try:
        default = DecodingConfig(**recommended(model) | settings)
        resolve(default, model, tokenizer)  # says what does not fit this model
    except (T3DError, TypeError) as error:
        raise T3DError(f"{path}: {error}") from error
    return default


def name_of(argument: str, exists: Callable[[str], bool] = lambda path: Path(path).exists()) -> tuple[str, str]:
    """(name, checkpoint) of `[NAME=]MODEL`; a folder's name is its last part, a hub id is its own."""
    name, equals, path = argument.partition("=")
    if equals and name and not exists(argument):
        return name, path
    return (Path(argument).resolve().name if exists(argument) else argument), argument
