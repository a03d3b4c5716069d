"""What a chat request may say: OpenAI's fields, checked.

A field that would change the answer and that is not served here is refused, never ignored. Fields that say something
about the caller and nothing about the answer are accepted: `user`, `metadata`, `safety_identifier` and the like.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

_LONGEST_STOP = 200


def _encodable(text: str) -> str:
    """JSON can spell half of a character (a lone surrogate), which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} is half of one") from error
    return text


Words = Annotated[str, AfterValidator(_encodable)]
"""Text that is whole."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "moderation": (),
    "store": (False,),
}
"""Fields of OpenAI's that are not served, and the values that ask for nothing; null is one of them everywhere."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TextPart(_Strict):
    type: Literal["text"]
    text: Words


class ImageUrl(_Strict):
    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None
    """Accepted and without effect: how a picture is seen is the model's."""


class ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


class Turn(_Strict):
    """One message. `developer` is OpenAI's newer word for `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Words | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]
    name: str | None = None
    refusal: None = None
    annotations: Any = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None
    reasoning_content: str | None = None
    """What the model thought before an earlier answer; not shown to it again."""


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool | None = None


def _tell_neutral(schema: dict[str, Any]) -> None:
    """The description of a field that is not served: the values that it may have all the same."""
    for name, neutral in _NEUTRAL.items():
        schema["properties"][name] = {"enum": [None, *neutral], "default": None, "description": "not served here"}


class ChatRequest(_Strict):
    """Body of POST /v1/chat/completions."""

    model_config = ConfigDict(json_schema_extra=_tell_neutral)

    model: str = Field(max_length=300)
    messages: list[Turn] = Field(min_length=1, max_length=2000)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=-1)
    n: int | None = Field(None, ge=1, le=128)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Words | list[Words] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    frequency_penalty: Any = None
    presence_penalty: Any = None
    logit_bias: Any = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None
    moderation: Any = None
    store: Any = None

    user: Any = None
    metadata: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    service_tier: Any = None
    parallel_tool_calls: Any = None

    @model_validator(mode="after")
    def _served(self) -> ChatRequest:
        for name, neutral in _NEUTRAL.items():
            value = getattr(self, name)
            if value is not None and value not in neutral:
                raise ValueError(f"{name} is not served here; leave it out")
        stops = self.stops
        if len(stops) > 4 or any(not s or len(s) > _LONGEST_STOP for s in stops):
            raise ValueError(f"stop: up to 4 texts of 1 to {_LONGEST_STOP} characters")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs: true")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens mean the same; give one of them")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
