"""The nouns of the data room: Sample as the user wrote it, Example as numbers, Batch as the model takes it.

Everything a user can bring becomes a `Sample` at the first station; after that there is one path.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    import torch

Role = Literal["system", "user", "assistant"]

IGNORE = -100
"""Label of a position that is not supervised (the convention of PyTorch and transformers)."""

IMAGE_PLACEHOLDER = "<image>"
"""How the text of LLaVA-style files says where a picture stands. The model's own image token may be another."""


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of a message. `weight`: how much its tokens count in the loss, 0 for not at all; None: as the message."""

    text: str
    weight: float | None = None


@dataclass(frozen=True, slots=True)
class Image:
    """A picture: a path as the record gives it (relative to an image root), or its encoded bytes."""

    path: str | None = None
    data: bytes | None = None


Part = Text | Image


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `weight` is for an answer's tokens in the loss; a question is trained only where a part says so."""

    role: Role
    parts: tuple[Part, ...]
    weight: float = 1.0

    @property
    def text(self) -> str:
        """The message's text with each picture as `<image>`."""
        return "".join(p.text if isinstance(p, Text) else IMAGE_PLACEHOLDER for p in self.parts)

    def part_weight(self, part: Text) -> float:
        """How much the tokens of one of the parts count in the loss."""
        if part.weight is not None:
            return part.weight
        return self.weight if self.role == "assistant" else 0.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One conversation. `where` says file and record for error messages, e.g. `chat.json: record 17 (id 000123)`."""

    id: str
    messages: tuple[Message, ...]
    where: str = ""

    @property
    def images(self) -> tuple[Image, ...]:
        return tuple(p for m in self.messages for p in m.parts if isinstance(p, Image))


@dataclass(frozen=True, slots=True)
class ImageSlot:
    """One picture of an Example: its source and the run of positions that its features take."""

    image: Image
    start: int
    tokens: int
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation as numbers.

    `input_ids` (T,) int64 with the image token repeated once per feature; `labels` (T,) int64, -100 where not
    supervised, not shifted (`labels[t]` is `input_ids[t]` or -100). `weights` (T,) float32 says how much each label
    counts, 0 where there is none; None: all labels count 1.
    """

    id: str
    input_ids: np.ndarray
    labels: np.ndarray
    images: tuple[ImageSlot, ...] = ()
    where: str = ""
    weights: np.ndarray | None = None

    @property
    def length(self) -> int:
        return len(self.input_ids)

    @property
    def supervised(self) -> int:
        """Positions that give a loss; the first position of an Example is never predicted."""
        return int((self.labels[1:] != IGNORE).sum())


@dataclass(slots=True)
class Pixels:
    """The pictures of a Batch for one vision encoder, in order of their slots.

    `tiles` (tiles, C, H, W) uint8, not normalised; `tiles_per_image` (I,) int64; `sizes` (I, 2) int64 holds each
    picture's own (width, height) in pixels.
    """

    tiles: torch.Tensor
    tiles_per_image: torch.Tensor
    sizes: torch.Tensor


@dataclass(slots=True)
class Places:
    """What stands where in a Batch of a fixed shape, in lists of fixed length, so that no device has to look for it.

    The Batch is `rows` sequences of equal length; `filled` of its T positions belong to Examples. `features` (F,) int64
    is the position of each image feature, T for those of padding. A supervised token is predicted from the state at
    `states` (S,) int64, is token `targets` (S,) int64 and counts `weights` (S,) float32, 0 where it is padding.
    """

    rows: int
    filled: int
    features: torch.Tensor
    states: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor


@dataclass(slots=True)
class Batch:
    """Several Examples laid end to end: one micro-batch.

    `input_ids`, `labels`, `position_ids` are (T,) int64, positions restarting with each Example; `cu_seqlens` (N+1,)
    int32 holds where Examples begin and end; `ids` names the N Examples; `images` maps encoder name to Pixels;
    `weights` (T,) float32 says how much each label counts; None: all count 1.

    With `places` it has a fixed shape: each Example begins a row, the rows are what `cu_seqlens` bounds, and T counts
    padding too.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    images: dict[str, Pixels] = field(default_factory=dict)
    ids: tuple[str, ...] = ()
    weights: torch.Tensor | None = None
    places: Places | None = None

    @property
    def tokens(self) -> int:
        """Positions that belong to Examples."""
        return int(self.input_ids.shape[0]) if self.places is None else self.places.filled

    @property
    def supervised(self) -> int:
        """Positions that give a loss (first position of each Example excluded; its label is always -100)."""
        return int((self.labels != IGNORE).sum())

    @property
    def weight(self) -> float:
        """What the summed loss is divided by: the supervised positions, each as much as it counts."""
        return float(self.supervised) if self.weights is None else float(self.weights.double().sum())

    def supervision(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return the positions (S,) of the states that predict a token, these tokens (S,) and their weights (S,).

        `labels[t]` is token t itself; it is predicted from the state of position t - 1 of the same Example. Weights
        are None where all count 1.
        """
        if self.places is not None:
            return self.places.states, self.places.targets, self.places.weights
        at = (self.labels != IGNORE).nonzero().flatten()
        return at - 1, self.labels[at], None if self.weights is None else self.weights[at]

    def to(self, device: torch.device | str) -> Batch:
        """Return this Batch with every tensor on `device`."""
        move = lambda t: t.to(device, non_blocking=True)  # noqa: E731
        p = self.places
        return Batch(
            move(self.input_ids),
            move(self.labels),
            move(self.position_ids),
            move(self.cu_seqlens),
            {k: Pixels(move(p.tiles), move(p.tiles_per_image), move(p.sizes)) for k, p in self.images.items()},
            self.ids,
            None if self.weights is None else move(self.weights),
            None
            if p is None
            else Places(p.rows, p.filled, move(p.features), move(p.states), move(p.targets), move(p.weights)),
        )
