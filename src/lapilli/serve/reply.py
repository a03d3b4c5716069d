"""Answers in OpenAI's words: one JSON object, or a stream of server-sent events that ends with `[DONE]`.

What a model thinks aloud before its answer (`<think>`) is told apart, as `reasoning_content`.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from json.encoder import encode_basestring
from typing import Any, Literal

from lapilli.generate.decoding import Answer, TokenLogprob
from lapilli.generate.text import THINK, THOUGHT, Vocabulary

DONE = b"data: [DONE]\n\n"
_CONTENT, _REST = ',"delta":{"content":', '},"logprobs":null,"finish_reason":null}]}\n\n'
"""Of an event that brings text and nothing else: what stands before the text, and after it."""

_FINISH = {"stop": "stop", "length": "length", "context": "length", "cancelled": "stop"}


_json = json.JSONEncoder(ensure_ascii=False, check_circular=False, separators=(",", ":")).encode


class Tokens:
    """Log-probabilities with each token's text, of one answer; `add` is called with its tokens in order."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._before: list[int] = []

    def add(self, logprobs: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
        """OpenAI's `logprobs.content`; special tokens, which leave no text, are not in it."""
        made: list[dict[str, Any]] = []
        for one in logprobs:
            if one.token_id not in self._vocabulary.special:
                top = [self._entry(token, value) for token, value in one.top]
                made.append(self._entry(one.token_id, one.logprob) | {"top_logprobs": top})
            self._before = [*self._before[-3:], one.token_id]
        return made

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        # What a token adds to the ones before it, for by itself it may lose its space.
        before = self._vocabulary.decode(self._before)
        text = self._vocabulary.decode([*self._before, token_id])[len(before) :]
        whole = "\ufffd" not in text and "\ufffd" not in before
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode()) if whole else None}


class Thoughts:
    """Splits a streamed answer that begins with `<think>` into thought and answer, piece by piece."""

    def __init__(self) -> None:
        self._held = ""
        self._state: Literal["unknown", "thought", "between", "answer"] = "unknown"

    def add(self, text: str) -> tuple[str, str]:
        """(thought, answer) that may be shown now."""
        self._held += text
        thought = ""
        if self._state == "unknown":
            if len(self._held) < len(THINK) and THINK.startswith(self._held):
                return "", ""
            self._state = "thought" if self._held.startswith(THINK) else "answer"
            self._held = self._held.removeprefix(THINK)
        if self._state == "thought":
            thought, mark, rest = self._held.partition(THOUGHT)
            if not mark:
                possible = next((n for n in range(len(THOUGHT) - 1, 0, -1) if thought.endswith(THOUGHT[:n])), 0)
                end = len(thought[: len(thought) - possible].rstrip())
                self._held = thought[end:]
                return thought[:end], ""
            self._state, self._held, thought = "between", rest, thought.rstrip()
        if self._state == "between":
            self._held = self._held.lstrip()
            self._state = "answer" if self._held else "between"
        answer, self._held = self._held, ""
        return thought, answer

    def rest(self) -> tuple[str, str]:
        """What was held back, once nothing follows."""
        held, self._held = self._held, ""
        return (held.rstrip(), "") if self._state == "thought" else ("", held)


@dataclass
class Reply:
    """What every part of one reply repeats."""

    model: str
    vocabulary: Vocabulary
    prompt_tokens: int
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answers: Sequence[Answer], logprobs: bool) -> dict[str, Any]:
        """The body of a reply that is not streamed; `answers` in the order of their indices."""
        choices = []
        for index, answer in enumerate(answers):
            message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
            if answer.thinking:
                message["reasoning_content"] = answer.thinking
            told = {"content": Tokens(self.vocabulary).add(answer.logprobs), "refusal": None} if logprobs else None
            choices.append(
                {"index": index, "message": message, "logprobs": told, "finish_reason": _FINISH[answer.finish]}
            )
        usage = self.usage(sum(len(a.token_ids) for a in answers))
        return self._head("chat.completion") | {"choices": choices, "usage": usage}

    def usage(self, completion_tokens: int) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self.prompt_tokens + completion_tokens,
        }

    def chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: list[dict[str, Any]] | None = None,
        answer: Answer | None = None,
    ) -> bytes:
        """One event of a stream; `answer` is given with the last one of its index."""
        if logprobs is None and answer is None and delta.keys() == {"content"}:  # nearly all events, made nearly free
            return f"{self._begin}{index}{_CONTENT}{encode_basestring(delta['content'])}{_REST}".encode()
        told = None if logprobs is None else {"content": logprobs, "refusal": None}
        rest = {"delta": delta, "logprobs": told, "finish_reason": None if answer is None else _FINISH[answer.finish]}
        return f"{self._begin}{index},{_json(rest)[1:]}]}}\n\n".encode()

    def usage_chunk(self, completion_tokens: int) -> bytes:
        """The event before `[DONE]` that brings the usage and no choices."""
        usage = self.usage(completion_tokens)
        return event(self._head("chat.completion.chunk") | {"choices": [], "usage": usage})

    @cached_property
    def _begin(self) -> str:
        """An event up to its choice's index, which comes first in it."""
        return f'data: {_json(self._head("chat.completion.chunk"))[:-1]},"choices":[{{"index":'

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def event(body: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return f"data: {_json(body)}\n\n".encode()
