"""How the next token is chosen, and what an answer is.

Each prompt of a batch has its own `Decoding`. Draws come from a generator of each prompt's own, so an answer depends on
its prompt and its seed, not on what happens to be answered beside it or on the global random state.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from lapilli.base.errors import ModelError

Finish = Literal["stop", "length", "context", "cancelled"]
"""`stop`: an end token or stop string; `length`: max_new_tokens; `context`: no place left in the model's context."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """How one answer is made. Raises ModelError for values without a meaning.

    `temperature` 0 is greedy; `top_p` keeps the likeliest tokens whose probabilities add up to it, `top_k` so many.
    Generation ends before any of `stop`. `seed` makes draws repeatable; without one they differ each time. With
    `num_beams` above 1 the likeliest of so many answers is searched for, greedily. `logprobs`: how many of the
    likeliest tokens are told at each place, beside the one that was taken; None: nothing is told.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    top_k: int | None = None
    num_beams: int = 1
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ModelError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ModelError(f"temperature must be 0 (greedy) or more, not {self.temperature}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ModelError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.top_k is not None and self.top_k < 1:
            raise ModelError(f"top_k must be at least 1, not {self.top_k}")
        if self.num_beams < 1:
            raise ModelError(f"num_beams must be at least 1, not {self.num_beams}")
        if self.num_beams > 1 and (self.temperature > 0 or self.logprobs is not None):
            raise ModelError("num_beams above 1 goes with temperature 0 and without logprobs")
        if self.logprobs is not None and not 0 <= self.logprobs <= 20:
            raise ModelError(f"logprobs must be from 0 to 20, not {self.logprobs}")


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token that was generated, with its log-probability and those of the likeliest tokens at its place."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def token_logprob(scores: torch.Tensor, token_id: int, top: int) -> TokenLogprob:
    """What the model thinks of a token; `scores` (V,) before temperature."""
    values = torch.log_softmax(scores.float(), dim=-1)
    best = values.topk(min(top, len(values)))
    pairs = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return TokenLogprob(token_id, float(values[token_id]), pairs)


@dataclass(frozen=True, slots=True)
class Answer:
    """What was generated. `text` is without the stop string and without blanks at its ends.

    `token_ids` are all tokens that were generated, the end token or those of a stop string included.
    """

    text: str
    token_ids: tuple[int, ...]
    finish: Finish
    prompt_tokens: int
    thinking: str = ""
    """What a model that thinks aloud wrote before its answer, between `<think>` and `</think>`."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each of `token_ids`, if they were asked for."""

    @property
    def note(self) -> str:
        """What the reader of the answer should know about its end; empty for one that ended by itself."""
        if self.finish == "length":
            return f"the answer was cut after {len(self.token_ids)} tokens (max_new_tokens)"
        if self.finish == "context":
            return (
                f"the answer was cut after {len(self.token_ids)} tokens: with {self.prompt_tokens} in the prompt the "
                "model's context is full"
            )
        return "the answer was stopped" if self.finish == "cancelled" else ""


class Draws:
    """The draws of one answer, from a generator of its own."""

    def __init__(self, decoding: Decoding) -> None:
        self._decoding = decoding
        self._generator = torch.Generator()
        if decoding.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(decoding.seed)

    def choose(self, scores: torch.Tensor) -> int | None:
        """The next token from scores (V,); None for the likeliest one."""
        decoding = self._decoding
        if decoding.temperature == 0:
            return None
        # On the CPU, so that a seed means the same draws on every device.
        return draw(scores.float().cpu(), decoding.temperature, decoding.top_p, self._generator, decoding.top_k)


def draw(
    scores: torch.Tensor, temperature: float, top_p: float | None, generator: torch.Generator, top_k: int | None = None
) -> int:
    """Draw one token from scores (V,)."""
    if top_k is not None and top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(top_k).values[-1], float("-inf"))
    # The maximum goes first: a very small temperature would overflow otherwise.
    probabilities = torch.softmax((scores - scores.max()) / temperature, dim=-1)
    if top_p is not None and top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        outside = ordered.cumsum(0) - ordered >= top_p  # the likeliest token is never outside
        probabilities[order[outside]] = 0.0
    return int(torch.multinomial(probabilities, 1, generator=generator))
