"""How the next token is chosen, and what an answer is.

Each prompt of a batch has its own `Decoding`. Draws come from a generator of each prompt's own, so an answer depends on
its prompt and its seed, not on what happens to be answered beside it or on the global random state.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import LogitsProcessor

from lapilli.base.errors import ModelError

Finish = Literal["stop", "length", "context", "cancelled"]
"""`stop`: an end token or stop string; `length`: max_new_tokens; `context`: no place left in the model's context."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """How one answer is made. Raises ModelError for values without a meaning.

    `temperature` 0 is greedy; `top_p` keeps the likeliest tokens whose probabilities add up to it. Generation ends
    before any of `stop`. `seed` makes draws repeatable; without one they differ each time.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ModelError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ModelError(f"temperature must be 0 (greedy) or more, not {self.temperature}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ModelError(f"top_p must be above 0 and at most 1, not {self.top_p}")


@dataclass(frozen=True, slots=True)
class Answer:
    """What was generated. `text` is without the stop string and without blanks at its ends.

    `token_ids` are all tokens that were generated, the end token or those of a stop string included.
    """

    text: str
    token_ids: tuple[int, ...]
    finish: Finish
    prompt_tokens: int

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


class Sampler(LogitsProcessor):
    """Chooses the token of each row that has a temperature; greedy rows are left to argmax."""

    def __init__(self, decodings: Sequence[Decoding]) -> None:
        self._decodings = decodings
        self._generators = [torch.Generator() for _ in decodings]
        for decoding, generator in zip(decodings, self._generators, strict=True):
            if decoding.seed is None:
                generator.seed()
            else:
                generator.manual_seed(decoding.seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Scores (B, V) in, and out with all but the chosen token of each sampled row at -inf."""
        chosen = scores.clone()
        for row, (decoding, generator) in enumerate(zip(self._decodings, self._generators, strict=True)):
            if decoding.temperature > 0:
                # On the CPU, so that a seed means the same draws on every device.
                token = draw(scores[row].float().cpu(), decoding.temperature, decoding.top_p, generator)
                chosen[row] = float("-inf")
                chosen[row, token] = 0.0
        return chosen


def draw(scores: torch.Tensor, temperature: float, top_p: float | None, generator: torch.Generator) -> int:
    """Draw one token from scores (V,)."""
    # The maximum goes first: a very small temperature would overflow otherwise.
    probabilities = torch.softmax((scores - scores.max()) / temperature, dim=-1)
    if top_p is not None and top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        outside = ordered.cumsum(0) - ordered >= top_p  # the likeliest token is never outside
        probabilities[order[outside]] = 0.0
    return int(torch.multinomial(probabilities, 1, generator=generator))
