"""From text and pictures to what the model takes, exactly as in training.

`Processor` is called like any transformers processor and gives what `VisionLanguageModel` takes; `Prompt` is the same
for one conversation in the form the engine batches: not padded, pixels as uint8 until they are on the device.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from transformers import BatchFeature

from lapilli.assemble.load import Loaded
from lapilli.base.errors import DataError
from lapilli.data.encode import Encoder
from lapilli.data.image import ImageLimits, normalise, to_tiles
from lapilli.data.sample import IMAGE_PLACEHOLDER, Image, Message
from lapilli.data.template import Template
from lapilli.generate.conversation import Chat, Picture, open_picture, read_chat, split_placeholders

_VERBATIM = Template(name="verbatim", answer_end="\n")
"""Adds nothing to a text that is rendered already."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One conversation, ready to be answered.

    `input_ids` (T,) int64 with the image token repeated once per feature; `tiles` one (tiles, 3, H, W) uint8 tensor
    per picture, in order; `sizes` each picture's (width, height) in pixels.
    """

    input_ids: np.ndarray
    tiles: tuple[torch.Tensor, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    image_tokens: int = 0
    keys: tuple[bytes, ...] = ()
    """What tells the pictures apart: a hash of each one's tiles."""

    @property
    def length(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A picture as the model takes it, for any number of prompts: see `Prompt`."""

    tiles: torch.Tensor
    size: tuple[int, int]
    key: bytes


class Processor:
    """Prepares texts, conversations and pictures for one model. `limits` bounds the pictures that are opened."""

    def __init__(self, loaded: Loaded, limits: ImageLimits | None = None) -> None:
        self.tokenizer = loaded.tokenizer
        self.template = loaded.template
        self.image_spec = loaded.image_spec
        self.layout = loaded.layout
        self.image_token = loaded.spec.image_token
        self.im_start_end = loaded.spec.im_start_end
        self.limits = limits
        self._conversations = loaded.encoder()
        self._texts = Encoder(self.tokenizer, _VERBATIM, self.layout, self.image_token)
        self._rendered = Encoder(
            self.tokenizer, _VERBATIM, self.layout, self.image_token, im_start_end=self.im_start_end
        )

    @property
    def pad_token_id(self) -> int:
        """Id that fills the left of shorter texts; what it is does not matter, for it is masked."""
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(int(i) for i in ids if i is not None)  # type: ignore[arg-type]

    def __call__(
        self,
        text: str | Sequence[str],
        images: Picture | Sequence[Picture] | Sequence[Sequence[Picture]] | None = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Prepare one text or a batch of them, each rendered already, with `<image>` where a picture stands.

        Returns `input_ids` and `attention_mask` (B, T) int64, and where there are pictures `pixel_values`
        (tiles, 3, H, W) float32 normalised, `tiles_per_image` (I,) and `image_sizes` (I, 2) as (width, height); all
        pictures of the batch in order. Shorter texts are padded on the left: the pad token's places have
        `attention_mask` 0 and no text attends to them. The text is taken as it is: `template.prompt` adds a
        conversation's marks, and a model built with `im_start_end` expects `<im_start><image><im_end>` in it.
        Raises DataError if a text's places and pictures disagree in number, or a picture can't be used.
        """
        if return_tensors != "pt":
            raise ValueError(f'return_tensors must be "pt", not {return_tensors!r}')
        texts = [text] if isinstance(text, str) else list(text)
        parts = [list(split_placeholders(t, *{self.image_token, IMAGE_PLACEHOLDER})) for t in texts]
        pictures = _share_out(images, [sum(isinstance(p, Image) for p in run) for run in parts])
        prompts = [
            self._prompt(self._texts, (Message("user", tuple(run)),), own)
            for run, own in zip(parts, pictures, strict=True)
        ]
        return BatchFeature(collate(prompts, self))

    def prompt(self, chat: Chat, images: Sequence[Picture] | Sequence[Prepared] | None = None) -> Prompt:
        """Prepare a conversation that waits for an answer; see `conversation.read_chat` for its forms.

        The text is what the template trained the model on. Pictures that several prompts ask about are prepared once,
        by `picture`. Raises DataError for a conversation or picture that can't be used.
        """
        messages, pictures = read_chat(chat, cast(Any, images))
        return self._prompt(self._conversations, messages, pictures)

    def rendered(self, text: str, pictures: Sequence[Picture] | Sequence[Prepared] = ()) -> Prompt:
        """Prepare a text that a template has rendered, with `<image>` where each picture stands.

        A model built with `im_start_end` gets its marks around each of them. Raises DataError if places and pictures
        disagree in number.
        """
        run = list(split_placeholders(text, *{self.image_token, IMAGE_PLACEHOLDER}))
        places = sum(isinstance(part, Image) for part in run)
        if places != len(pictures):
            raise DataError(_disagreement("text", places, len(pictures)))
        return self._prompt(self._rendered, (Message("user", tuple(run)),), pictures)

    def picture(self, picture: Picture) -> Prepared:
        """Open and tile a picture. Raises DataError if it can't be used."""
        opened = open_picture(picture, self.limits)
        tiles = to_tiles(opened, self.image_spec, self.layout)
        return Prepared(tiles, opened.size, _key(tiles))

    def decode(self, token_ids: Any, skip_special_tokens: bool = True) -> str:
        """Text of token ids, as the tokenizer spells them."""
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def batch_decode(self, token_ids: Any, skip_special_tokens: bool = True) -> list[str]:
        """Texts of several rows of token ids."""
        return [self.decode(row, skip_special_tokens) for row in token_ids]

    def _prompt(self, encoder: Encoder, messages: Sequence[Message], pictures: Sequence[Picture | Prepared]) -> Prompt:
        made = [p if isinstance(p, Prepared) else self.picture(p) for p in pictures]
        sizes = [p.size for p in made]
        ids, slots = encoder.encode_prompt(messages, sizes)
        if len(ids) == 0:
            raise DataError("the prompt holds no token; ask something")
        tokens = sum(s.tokens for s in slots)
        return Prompt(ids, tuple(p.tiles for p in made), tuple(sizes), tokens, tuple(p.key for p in made))


def collate(
    prompts: Sequence[Prompt], processor: Processor, device: torch.device | str = "cpu"
) -> dict[str, torch.Tensor]:
    """Lay prompts out as one batch on `device`, padded on the left; see `Processor.__call__` for the entries."""
    longest = max((p.length for p in prompts), default=0)
    ids = torch.full((len(prompts), longest), processor.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        start = longest - prompt.length
        ids[row, start:] = torch.from_numpy(prompt.input_ids)
        mask[row, start:] = 1
    made = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    tiles = [t for p in prompts for t in p.tiles]
    if tiles:
        pixels = torch.cat(tiles).to(device)
        made["pixel_values"] = normalise(pixels, processor.image_spec)
        made["tiles_per_image"] = torch.tensor([len(t) for t in tiles], device=device)
        made["image_sizes"] = torch.tensor([s for p in prompts for s in p.sizes], device=device)
    return made


def _key(tiles: torch.Tensor) -> bytes:
    """A hash of a picture's tiles (tiles, C, H, W) uint8: what the model sees of it."""
    made = hashlib.blake2b(str(tuple(tiles.shape)).encode(), digest_size=16)
    made.update(tiles.contiguous().numpy().data)
    return made.digest()


def _share_out(images: Any, places: Sequence[int]) -> list[list[Picture]]:
    """Each text's pictures, from one picture, a flat list over all texts, or a list per text."""
    if images is None:
        flat: list[Any] = []
    elif isinstance(images, list | tuple):
        flat = list(images)
    else:
        flat = [images]
    if flat and all(isinstance(own, list | tuple) for own in flat):
        if len(flat) != len(places):
            raise DataError(f"images: {len(flat)} lists of pictures for {len(places)} texts")
        shared = [list(own) for own in flat]
    else:
        if len(flat) != sum(places):
            raise DataError(_disagreement("text" if len(places) == 1 else "texts", sum(places), len(flat)))
        rest = iter(flat)
        shared = [[next(rest) for _ in range(count)] for count in places]
    for i, (own, count) in enumerate(zip(shared, places, strict=True), 1):
        if len(own) != count:
            raise DataError(_disagreement(f"text {i}", count, len(own)))
    return shared


def _disagreement(what: str, places: int, pictures: int) -> str:
    return (
        f"{what}: {places} {IMAGE_PLACEHOLDER} but {pictures} pictures; "
        f"write {IMAGE_PLACEHOLDER} once for each picture, where it belongs"
    )
