"""Answers that another server makes, in the words that answers made here have."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from lapilli.serve.completions import GoneError
from lapilli.serve.elsewhere.pieces import Delta, Usage
from lapilli.serve.refusal import ApiError
from lapilli.serve.reply import DONE, Thoughts, event
from lapilli.serve.request import ChatRequest


class Passing(Protocol):
    """The answers of one request, as they come from elsewhere."""

    async def next(self) -> Delta | Usage | None:
        """What comes next; None after the last. Raises GoneError if the client left, ApiError if no more comes."""
        ...


@dataclass
class Growing:
    """One answer, as far as it has come."""

    text: str = ""
    thought: str = ""
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish: str | None = None
    _thoughts: Thoughts | None = field(default_factory=Thoughts)
    """Tells thoughts from the answer where the other server does not."""
    _blank: str = ""
    """Blanks that belong to the answer if something follows them."""

    def add(self, delta: Delta) -> dict[str, Any]:
        """What of it may be shown now, as a stream's `delta`."""
        thought, text = delta.thought, delta.text
        if delta.thought:
            self._thoughts = None
        if self._thoughts is not None:
            thought, text = self._thoughts.add(text)
            if delta.finish is not None:
                more, rest = self._thoughts.rest()
                thought, text = thought + more, text + rest
        text = self._trimmed(text, ended=delta.finish is not None)
        self.thought += thought
        self.text += text
        self.logprobs += delta.logprobs
        self.finish = delta.finish or self.finish
        return ({"reasoning_content": thought} if thought else {}) | ({"content": text} if text else {})

    def _trimmed(self, text: str, *, ended: bool) -> str:
        """An answer begins and ends without blanks, as answers made here do."""
        text = self._blank + text
        text = text if self.text else text.lstrip()
        shown = text.rstrip()
        self._blank = "" if ended else text[len(shown) :]
        return shown


@dataclass
class Words:
    """What every part of one reply repeats."""

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answers: Sequence[Growing], usage: Usage | None, logprobs: bool) -> dict[str, Any]:
        """The body of a reply that is not streamed; `answers` in the order of their indices."""
        choices = []
        for index, answer in enumerate(answers):
            message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
            if answer.thought:
                message["reasoning_content"] = answer.thought
            told = {"content": answer.logprobs, "refusal": None} if logprobs else None
            choices.append({"index": index, "message": message, "logprobs": told, "finish_reason": answer.finish})
        return self._head("chat.completion") | {"choices": choices, "usage": _counted(usage)}

    def chunk(
        self, index: int, delta: dict[str, Any], logprobs: Sequence[dict[str, Any]] = (), finish: str | None = None
    ) -> bytes:
        """One event of a stream."""
        told = {"content": list(logprobs), "refusal": None} if logprobs else None
        choice = {"index": index, "delta": delta, "logprobs": told, "finish_reason": finish}
        return event(self._head("chat.completion.chunk") | {"choices": [choice]})

    def usage_chunk(self, usage: Usage) -> bytes:
        """The event before `[DONE]` that brings the usage and no choices."""
        return event(self._head("chat.completion.chunk") | {"choices": [], "usage": _counted(usage)})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def _counted(usage: Usage | None) -> dict[str, int] | None:
    """OpenAI's `usage`; null where the other server counts none."""
    if usage is None:
        return None
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.written,
        "total_tokens": usage.prompt + usage.written,
    }


async def whole(passage: Passing, words: Words, body: ChatRequest) -> dict[str, Any]:
    """The body of a reply that is not streamed, once all of it is here. Raises as `next` does."""
    answers = [Growing() for _ in range(body.n or 1)]
    usage: Usage | None = None
    while (made := await passage.next()) is not None:
        if isinstance(made, Usage):
            usage = made
        else:
            answers[made.index].add(made)
    return words.whole(answers, usage, bool(body.logprobs))


async def lines(passage: Passing, words: Words, body: ChatRequest) -> AsyncIterator[bytes]:
    """The events of a stream. An error after its beginning is an event of its own, and no `[DONE]` follows."""
    answers = [Growing() for _ in range(body.n or 1)]
    usage: Usage | None = None
    for index in range(len(answers)):
        yield words.chunk(index, {"role": "assistant", "content": "", "refusal": None})
    try:
        while (made := await passage.next()) is not None:
            if isinstance(made, Usage):
                usage = made
                continue
            delta = answers[made.index].add(made)
            logprobs = made.logprobs if body.logprobs else ()
            if delta or logprobs:
                yield words.chunk(made.index, delta, logprobs)
            if made.finish is not None:
                yield words.chunk(made.index, {}, finish=made.finish)
    except ApiError as error:
        yield event(error.body)
        return
    except GoneError:
        return
    if usage is not None and body.stream_options is not None and body.stream_options.include_usage:
        yield words.usage_chunk(usage)
    yield DONE
