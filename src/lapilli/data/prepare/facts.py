"""What decided the tokens of a prepared folder, kept with it and compared whenever it is opened.

Prepared numbers look right whatever made them, so a tokenizer, a template or an image layout that is not the model's
own would train in silence on the wrong text. Every such fact is stored and a difference is refused with both values.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from lapilli.base.errors import DataError

if TYPE_CHECKING:
    from lapilli.data.encode import Encoder


@dataclass(frozen=True)
class Facts:
    """What an Encoder is made of, as plain values. `tokenizer` and `template` are SHA-256 sums of all they say."""

    tokenizer: str
    vocabulary: int
    template: str
    template_name: str
    layout: dict[str, Any] | None
    """The image layout; None: pictures can't be held."""
    tokens_per_image: int | None
    """None: it depends on the picture's size (anyres), or there is no layout."""
    image_token_id: int | None
    prefix: tuple[int, ...]
    """Ids before every text: the tokenizer's BOS, or nothing."""
    max_length: int | None
    too_long: str

    @classmethod
    def of(cls, encoder: Encoder) -> Facts:
        """The facts of this Encoder."""
        tokenizer: Any = encoder.tokenizer
        layout = encoder.layout
        return cls(
            tokenizer=_sha256(tokenizer.backend_tokenizer.to_str()),
            vocabulary=len(tokenizer),
            template=_sha256(json.dumps(encoder.template.model_dump(mode="json"), sort_keys=True)),
            template_name=encoder.template.name,
            layout=None if layout is None else layout.model_dump(mode="json"),
            tokens_per_image=None if layout is None or layout.mode == "anyres" else layout.tokens_per_tile,
            image_token_id=encoder.image_token_id,
            prefix=tuple(encoder.prefix),
            max_length=encoder.max_length,
            too_long=encoder.too_long,
        )

    @classmethod
    def from_json(cls, value: Any, where: str) -> Facts:
        """What `as_json` wrote. Raises DataError naming `where` if it is something else."""
        names = {f.name for f in fields(cls)}
        if not isinstance(value, dict) or set(value) != names:
            raise DataError(f"{where}: does not say how it was prepared; prepare the data again")
        return cls(**{**value, "prefix": tuple(value["prefix"])})

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "prefix": list(self.prefix)}

    def check(self, encoder: Encoder, where: str) -> None:
        """Raise DataError naming `where` and every fact in which `encoder` differs, with both values."""
        wanted = Facts.of(encoder)
        problems = [line for name in _SAID if (line := self._difference(wanted, name)) is not None]
        if problems:
            raise DataError(
                f"{where}: prepared for something else: {'; '.join(problems)}. Prepare the data again, or use the "
                "model and recipe that they were prepared for"
            )

    def _difference(self, wanted: Facts, name: str) -> str | None:
        have, want = getattr(self, name), getattr(wanted, name)
        if have == want or (name == "max_length" and want is None) or (name == "too_long" and not wanted.max_length):
            return None
        if name == "layout" and None not in (self.tokens_per_image, wanted.tokens_per_image):
            return None  # how a picture of so many places is scaled or cut does not show in the tokens
        if name == "tokenizer":
            have, want = (f"{f.tokenizer[:12]} ({f.vocabulary} tokens)" for f in (self, wanted))
        if name == "template":
            have, want = (f"{f.template[:12]} ({f.template_name})" for f in (self, wanted))
        return f"{_SAID[name]} is {_shown(have)} in the prepared data, {_shown(want)} here"


_SAID = {
    "tokenizer": "tokenizer",
    "template": "template",
    "tokens_per_image": "tokens per image",
    "layout": "image layout",
    "image_token_id": "image token id",
    "prefix": "text prefix",
    "max_length": "max_length",
    "too_long": "too_long",
}
"""What is compared, and what it is called; the other facts follow from these."""


def _shown(value: Any) -> str:
    if isinstance(value, dict):  # an image layout, without what is at its default
        return ", ".join(f"{k} {v}" for k, v in value.items() if v)
    return "none" if value is None else str(list(value)) if isinstance(value, tuple) else str(value)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
