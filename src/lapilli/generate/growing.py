"""One answer in the making: which token comes next, when it ends, and what has been said of it.

Slots and padded batches alike hand it the scores of each place and then the token that was taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lapilli.generate.decoding import Answer, Decoding, Draws, Finish, TokenLogprob, token_logprob
from lapilli.generate.text import TextStream, without_thinking


class Growing:
    """An answer in the making. `room`: how many tokens it may have; `end_ids` end it."""

    def __init__(
        self,
        prompt_tokens: int,
        decoding: Decoding,
        room: int,
        end_ids: set[int],
        stream: TextStream,
        cancelled: Callable[[], bool] | None = None,
    ) -> None:
        self.decoding, self.room = decoding, room
        self.finish: Finish | None = None
        self._draws = Draws(decoding)
        self._prompt_tokens, self._end_ids = prompt_tokens, end_ids
        self._stream, self._cancelled = stream, cancelled
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._scores: torch.Tensor | None = None

    @property
    def ended(self) -> bool:
        return self.finish is not None

    @property
    def tokens(self) -> int:
        """How many there are so far."""
        return len(self._ids)

    @property
    def logprobs(self) -> Sequence[TokenLogprob]:
        """One for each token so far, if they were asked for."""
        return self._logprobs

    def choose(self, scores: torch.Tensor) -> int | None:
        """The next token from scores (V,); None for the likeliest one."""
        if self.decoding.logprobs is not None:
            self._scores = scores
        return self._draws.choose(scores)

    def push(self, token_id: int) -> None:
        """Take the next token, and end where it is the last."""
        if self.finish is not None:
            return
        self._ids.append(token_id)
        if self._scores is not None:
            self._logprobs.append(token_logprob(self._scores, token_id, self.decoding.logprobs or 0))
        if token_id in self._end_ids:
            self.end("stop")
            return
        self._stream.push(token_id)
        if self._stream.stopped:
            self.end("stop")
        elif len(self._ids) >= self.room:
            self.end("length" if self.room == self.decoding.max_new_tokens else "context")
        else:
            self.look()

    def look(self) -> None:
        """End if whoever asked has gone."""
        if self.finish is None and self._cancelled is not None and self._cancelled():
            self.end("cancelled")

    def end(self, finish: Finish) -> None:
        """End the answer with what it has; does nothing to one that has ended."""
        if self.finish is None:
            self.finish = finish
            self._stream.finish()

    def answer(self) -> Answer:
        """The answer, once it has ended."""
        assert self.finish is not None
        thinking, text = without_thinking(self._stream.text)
        return Answer(text, tuple(self._ids), self.finish, self._prompt_tokens, thinking, tuple(self._logprobs))
