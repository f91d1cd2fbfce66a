"""What is answered, as `/openapi.json` describes it; OpenAI's objects, with ours under `t3d`."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Reply(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Error(Reply):
    message: str
    type: Literal["invalid_request_error", "authentication_error", "rate_limit_error", "timeout_error", "server_error"]
    param: str | None
    code: str | None


class ErrorReply(Reply):
    error: Error


class CachedTokens(Reply):
    cached_tokens: int


class Usage(Reply):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class Likely(Reply):
    token: str
    logprob: float
    bytes: list[int]


class Logprob(Likely):
    top_logprobs: list[Likely]


class ChatLogprobs(Reply):
    content: list[Logprob]
    refusal: None


class CompletionLogprobs(Reply):
    """One entry per token; null for those of the prompt, which are not predicted."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class ChatMessage(Reply):
    role: Literal["assistant"]
    content: str
    refusal: None


class Choice(Reply):
    index: int
    finish_reason: Literal["stop", "length"]
    t3d: dict[str, Any] = Field({}, description="with return_details")


class ChatChoice(Choice):
    message: ChatMessage
    logprobs: ChatLogprobs | None


class CompletionChoice(Choice):
    text: str
    logprobs: CompletionLogprobs | None


class Answered(Reply):
    id: str
    created: int
    model: str
    usage: Usage


class ChatReply(Answered):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class CompletionReply(Answered):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class TokenizeReply(Reply):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeReply(Reply):
    prompt: str


class UpdateReply(Reply):
    success: Literal[True]
    message: str
    num_paused_requests: int = Field(description="how many waited for it")


class Card(Reply):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    t3d: dict[str, Any] = Field(description="context, and the settings that a request does not give")


class Cards(Reply):
    object: Literal["list"]
    data: list[Card]


class Setting(Reply):
    name: str
    type: str
    default: Any
    help: str
    low: float | None = None
    high: float | None = None
    choices: list[str] | None = None


class Flight(Reply):
    id: str
    description: str
    settings: list[Setting]


class Knob(Reply):
    name: str
    slow: float | None
    fast: float | None


class Strategy(Flight):
    knob: Knob | None = Field(description="the setting that trades speed for quality")


class Flights(Reply):
    object: Literal["list"]
    data: list[Flight]


class Strategies(Reply):
    object: Literal["list"]
    data: list[Strategy]


class Health(Reply):
    status: Literal["ok", "failing"]
    models: dict[str, str] = Field({}, description="why each one that fails does")


STREAM = {  # the schema is of one event
    "text/event-stream": {
        "schema": {
            "type": "object",
            "description": "with stream: a server-sent event",
            "properties": {"data": {"type": "string", "description": "one of OpenAI's chunks as JSON, or [DONE]"}},
            "required": ["data"],
        }
    }
}
ERRORS = {"4XX": {"model": ErrorReply}, "5XX": {"model": ErrorReply}}
