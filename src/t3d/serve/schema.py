"""The bodies that clients send, checked field by field: OpenAI's fields and ours."""

import json
from collections.abc import Iterable
from dataclasses import Field as Field_
from dataclasses import fields, replace
from math import isfinite
from random import SystemRandom
from typing import Annotated, Any, Literal, get_args, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, create_model, model_validator
from pydantic_core import PydanticCustomError

from t3d.decoding.config import DecodingConfig
from t3d.decoding.flight import FLIGHTS
from t3d.decoding.logprobs import MOST as MOST_LOGPROBS
from t3d.decoding.policy import POLICIES
from t3d.errors import nearest

# OpenAI's fields that mean nothing here, and may therefore have any value
IGNORED = ("user", "metadata", "store", "safety_identifier", "prompt_cache_key", "service_tier")
# those that we cannot honour, with the values that ask for nothing
UNSUPPORTED: dict[str, tuple] = {
    "audio": (),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
MAX_BLOCK = 64  # a request's block size, where the model's own is not larger still
Text = Annotated[str, Field(min_length=1, max_length=1000)]
Id = Annotated[int, Field(ge=0, lt=1 << 31)]
Alternatives = Annotated[int, Field(ge=0, le=MOST_LOGPROBS)]


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _unicode(cls, body: Any) -> Any:
        try:
            json.dumps(body, ensure_ascii=False, default=repr).encode()  # bytes, where it was not sent as JSON
        except UnicodeEncodeError:
            raise PydanticCustomError("invalid_unicode", "the body has half a surrogate pair in it") from None
        return body


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class TextFormat(Strict):
    type: Literal["text"]


class ObjectFormat(Strict):
    type: Literal["json_object"]


class JsonSchema(Strict):
    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    value: dict[str, Any] = Field({}, alias="schema")
    strict: bool | None = Field(None, description="without effect: the schema is always kept to")


class SchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


MOST = 10**9
OTHERWISE: dict[str, Any] = {  # settings that a request gives in another form, or within other bounds
    "temperature": Annotated[float, Field(ge=0, le=2)],
    "n": Annotated[int, Field(ge=1, le=128)],
    "seed": Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)],
    "stop": Text | list[Text],
    "stop_ids": Annotated[list[Id], Field(max_length=64)],
    "negative_prompt": Text,
    # any text, so that an unknown one is answered with the nearest that there is
    "strategy": Annotated[str, WithJsonSchema({"type": "string", "enum": list(POLICIES)})],
    "flight": Annotated[str, WithJsonSchema({"type": "string", "enum": list(FLIGHTS)})],
}


def _setting(f: Field_, kind: Any) -> tuple:
    """The field for a setting of a decode: its type, or OTHERWISE, within its bounds; null is the server's default."""
    about = f.metadata
    if f.name in OTHERWISE:
        kind = OTHERWISE[f.name]
    elif about["choices"]:
        kind = Literal[about["choices"]]
    else:
        kind = next((k for k in get_args(kind) if k is not type(None)), kind)
        if kind in (int, float):
            least = {"gt": about["above"]} if isfinite(about["above"]) else {"ge": max(about["low"], -MOST)}
            most = {"lt": about["below"]} if isfinite(about["below"]) else {"le": min(about["high"], MOST)}
            kind = Annotated[kind, Field(**least, **most)]
    return (kind | None, Field(None, description=about["help"].partition("; default:")[0]))


HINTS = get_type_hints(DecodingConfig)
Settings = create_model(
    "Settings", __base__=Strict, **{f.name: _setting(f, HINTS[f.name]) for f in fields(DecodingConfig)}
)


def refuse(name: str, message: str):
    raise PydanticCustomError("invalid_value", message, {"name": name})


class Decoding(Settings):
    """What both endpoints take. A field that is null or missing has the server's default."""

    model: str | None = Field(None, description="one of /v1/models; default: the first")
    stream: bool | None = None
    response_format: TextFormat | ObjectFormat | SchemaFormat | None = Field(
        None, description="JSON, of a schema or any object", discriminator="type"
    )
    stream_options: StreamOptions | None = None
    return_details: bool | None = Field(None, description="adds `t3d` to every choice: TPF, forwards, step map, ...")
    stream_steps: bool | None = Field(None, description="with stream: a chunk for every denoising step")

    @model_validator(mode="before")
    @classmethod
    def _others(cls, body: Any) -> Any:
        """Drop what asks for nothing; say clearly what is not there."""
        if not isinstance(body, dict):
            return body
        kept = {}
        for name, value in body.items():
            if name in cls.model_fields:
                kept[name] = value
            elif name in UNSUPPORTED:
                if value is not None and not any(_same(value, nothing) for nothing in UNSUPPORTED[name]):
                    raise PydanticCustomError(
                        "unsupported_parameter", "'{name}' is not supported by this server", {"name": name}
                    )
            elif name not in IGNORED:
                close = nearest(name, [*cls.model_fields, *UNSUPPORTED])
                raise PydanticCustomError(
                    "unknown_parameter",
                    "Unrecognized request argument supplied: {name}{close}",
                    {"name": ascii(name)[1:-1], "close": close},
                )
        return kept

    @model_validator(mode="after")
    def _together(self) -> "Decoding":
        if self.temperature is not None and 0 < self.temperature < 1e-4:
            refuse("temperature", "temperature is 0 (greedy) or at least 0.0001")
        if isinstance(self.stop, list) and len(self.stop) > 16:
            refuse("stop", "at most 16 stop strings")
        if self.stream_options is not None and not self.stream:
            refuse("stream_options", "stream_options is only for stream = true")
        if self.json_schema is not None and self.stop_ids is not None:
            refuse("stop_ids", "response_format ends an answer with the model's own stop token; leave stop_ids out")
        if self.stream_steps and not self.stream:
            refuse("stream_steps", "stream_steps is only for stream = true")
        return self

    @property
    def json_schema(self) -> dict | None:
        """What the answer keeps to, if that is wanted."""
        asked = self.response_format
        if asked is None or asked.type == "text":
            return None
        return {"type": "object"} if asked.type == "json_object" else asked.json_schema.value

    def decoding(self, default: DecodingConfig, max_tokens: int) -> DecodingConfig:
        """The settings, unset ones from `default`. Without a seed, one is drawn. Raises T3DError as the settings do."""
        asked_otherwise = {"stop", "seed", "max_tokens"}
        names = [f.name for f in fields(DecodingConfig) if f.name not in asked_otherwise]
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        stop = default.stop if self.stop is None else [self.stop] if isinstance(self.stop, str) else self.stop
        seed = SystemRandom().randrange(1 << 63) if self.seed is None else self.seed
        return replace(default, **{"n": 1} | given, stop=tuple(stop), seed=seed, max_tokens=max_tokens)


class Part(BaseModel):
    """A part of a message's content. Text only."""

    model_config = ConfigDict(strict=True)
    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")  # clients send answers back as they got them
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates want it."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatBody(Decoding):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = Field(None, description="with logprobs: of so many likeliest tokens, too")

    @model_validator(mode="after")
    def _top(self) -> "ChatBody":
        if self.top_logprobs and not self.logprobs:
            refuse("top_logprobs", "top_logprobs is only for logprobs = true")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """How many tokens' log-probabilities are wanted beside the answer's; None: not even those."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def echo(self) -> None:
        """A chat's prompt is not given back."""


class CompletionBody(Decoding):
    prompt: str | list[str] | list[Id] | list[list[Id]]
    echo: bool | None = Field(None, description="give the prompt back before the answer")
    logprobs: Literal[False] | Alternatives | None = Field(None, description="of so many likeliest tokens, too")

    @property
    def limit(self) -> int:
        return self.max_tokens or 16  # OpenAI's default

    @property
    def alternatives(self) -> int | None:
        """As of a chat."""
        return None if self.logprobs is False else self.logprobs

    def prompts(self) -> list[str] | list[list[int]]:
        """One item per prompt."""
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]
        return self.prompt


class TokenizeBody(Strict):
    """As vLLM's endpoint of this name takes it."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = Field(None, description="a chat, instead")
    add_generation_prompt: bool = Field(True, description="with messages: and the beginning of the answer")
    add_special_tokens: bool = Field(False, description="those that the tokenizer puts around a text")
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one(self) -> "TokenizeBody":
        if (self.prompt is None) == (self.messages is None):
            refuse("prompt", "give either prompt or messages")
        return self


class DetokenizeBody(Strict):
    """As vLLM's endpoint of this name takes it."""

    model: str | None = None
    tokens: Annotated[list[Id], Field(max_length=1 << 20)]


class UpdateBody(Strict):
    """As SGLang's endpoint of this name takes it."""

    model: str | None = None
    model_path: Annotated[str, Field(min_length=1)] = Field(
        description="a checkpoint folder on the server's machine, or a hub id"
    )
    flush_cache: Literal[True] = Field(True, description="what the old weights computed is never used with the new")


def _same(value: Any, other: Any) -> bool:
    """Equal, and not only because True is 1."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def explain(errors: Iterable[dict]) -> tuple[str, str | None, str | None]:
    """(message, param, code) of pydantic's errors: the first one."""
    first = next(iter(errors))
    where = [ascii(str(part))[1:-1] for part in first["loc"] if part != "body"]
    kind, message = first["type"], first["msg"]
    if kind in ("unsupported_parameter", "unknown_parameter", "invalid_value"):
        return message, first["ctx"]["name"], kind
    if kind == "json_invalid":
        return f"We could not parse the JSON body of your request: {first['ctx']['error']}", None, "json_invalid"
    if kind == "invalid_unicode":
        return message, None, kind
    if not where:
        return "the body must be a JSON object, sent with the header content-type: application/json", None, None
    if kind == "missing":
        return f"you must provide a {where[-1]} parameter", ".".join(where), "missing_required_parameter"
    return f"{'.'.join(where)}: {message}", where[0], "invalid_value"
