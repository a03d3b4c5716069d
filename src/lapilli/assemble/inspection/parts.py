"""The parts of a model as the headers of its weight files show them: numbers, dtypes, and what hangs together.

Every layout has its own names; which part a tensor belongs to is told by them alone, so nothing is read and no model
is made.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from lapilli.base.layout import ImageLayout
from lapilli.checkpoint.stream import Lazy

PARTS = ("vision encoder", "projector", "language model", "adapters", "other")

_COMPUTED = ("rotary_emb.inv_freq", "embeddings.position_ids", "attn.masked_bias")
_RULES = tuple(
    (part, re.compile(pattern))
    for part, pattern in (
        ("adapters", r"(^|\.)lora_([AB]|embedding|magnitude)"),
        ("projector", r"(^|\.)(mm_projector|multi_modal_projector|projector|projection\.ffn|projector_image_model)\."),
        ("projector", r"(^|\.)image_newline$"),
        ("vision encoder", r"(^|\.)(vision_tower|vision_encoder|vision_model|visual|image_model(_list)?)\."),
        ("vision encoder", r"^embeddings\.(patch|class|cls|position)|^encoder\.layers?\.\d|^(pre_layr|post_layer)norm"),
        ("language model", r"(^|\.)(embed_tokens|embed_in|embed_out|wte|lm_head|norm_f|word_embeddings|text_model)\b"),
        ("language model", r"(^|\.)(layers|blocks|h|norm|decoder|language_model|transformer|gpt_neox)\b"),
    )
)
"""First match wins."""


@dataclass
class Part:
    """One part of a model."""

    name: str
    parameters: int = 0
    tensors: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)
    """Parameters by dtype."""
    what: str = ""
    """Kind of model, and its sizes."""
    place: str = ""
    """Where it lies, if not in the folder itself."""

    def count(self, name: str, tensor: Lazy) -> None:
        """Add a tensor; tables of positions, which configurations give, are no parameters."""
        if name.endswith(_COMPUTED):
            return
        size, dtype = prod(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        self.parameters += size
        self.tensors += 1
        self.dtypes[dtype] = self.dtypes.get(dtype, 0) + size

    def add(self, other: Part) -> None:
        """Add another part's numbers."""
        self.parameters += other.parameters
        self.tensors += other.tensors
        self.dtypes = dict(Counter(self.dtypes) + Counter(other.dtypes))


def part_of(name: str) -> str:
    """The part that a tensor belongs to, by its name in any layout."""
    return next((part for part, rule in _RULES if rule.search(name)), "other")


def count(tensors: Mapping[str, Lazy]) -> dict[str, Part]:
    """The parts that tensors make up."""
    made: dict[str, Part] = {}
    for name, tensor in tensors.items():
        made.setdefault(part_of(name), Part(part_of(name))).count(name, tensor)
    return {name: made[name] for name in PARTS if name in made and made[name].tensors}


def projector_kind(tensors: Iterable[str]) -> str:
    """`linear`, `mlpNx_gelu` or `?` by the names of a projector's tensors."""
    ends = {name.rsplit("projector.", 1)[-1].removesuffix(".weight") for name in tensors if name.endswith(".weight")}
    if ends & {"linear_1", "linear_2"}:
        return "mlp2x_gelu"
    if all(end.isdecimal() for end in ends) and ends:
        return f"mlp{len(ends)}x_gelu"
    return "linear" if len(ends) == 1 else "?"


def language_sizes(fields: Mapping[str, Any]) -> str:
    """Kind and sizes of a language model, from its configuration."""
    said = [str(fields.get("model_type", "?"))]
    for words, names in (
        ("layers", ("num_hidden_layers", "n_layers", "n_layer")),
        ("wide", ("hidden_size", "d_model", "n_embd")),
        ("heads", ("num_attention_heads", "n_heads", "n_head")),
        ("tokens", ("vocab_size",)),
    ):
        value = next((fields[name] for name in names if fields.get(name)), None)
        if value is not None:
            said.append(f"{value:,} {words}" if isinstance(value, int) else f"{value} {words}")
    groups = fields.get("num_key_value_heads")
    if groups and groups != fields.get("num_attention_heads"):
        said.append(f"{groups} key-value heads")
    return ", ".join(said)


def vision_sizes(fields: Mapping[str, Any]) -> str:
    """Kind and sizes of a vision encoder, from its configuration."""
    fields = fields.get("vision_config") or fields
    said = [str(fields.get("model_type", "?"))]
    if fields.get("image_size"):
        said.append(f"{fields['image_size']} pixels")
    if fields.get("patch_size"):
        said.append(f"patches of {fields['patch_size']}")
    for words, name in (("layers", "num_hidden_layers"), ("wide", "hidden_size")):
        if fields.get(name):
            said.append(f"{fields[name]:,} {words}")
    return ", ".join(said)


def tokens_per_image(layout: ImageLayout) -> str:
    """In words: one number, or the range over all canvases."""
    if layout.mode == "anyres":
        counts = [layout.tokens(*canvas) for canvas in layout.pinpoints]
        return f"{min(counts)} to {max(counts)} (anyres, by the picture's shape)"
    tile = f"{layout.tile_height}x{layout.tile_width}"
    return f"{layout.tokens_per_tile} ({layout.grid_height}x{layout.grid_width} patches of a {tile} picture)"


def dtypes_in_words(part: Part) -> str:
    """`float16`, or each dtype with its share."""
    if len(part.dtypes) == 1:
        return next(iter(part.dtypes))
    return ", ".join(f"{dtype} {share:,}" for dtype, share in Counter(part.dtypes).most_common())
