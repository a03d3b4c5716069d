"""Names and row orders: what a tensor is called in Cerebras' models, and which of its rows stand elsewhere.

Both of their models hold the same tensors under different prefixes. Three things differ in the numbers: the class
token's row of the position table stands last, the rows of the language model's queries and keys are interleaved for
rotary positions, and the last norm is there twice.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch

from lapilli.base.errors import ModelError, unknown

Model = Literal["mmsimple-llava", "llava"]
MODELS: tuple[Model, ...] = ("mmsimple-llava", "llava")
ALIASES = {"mm_simple": "mmsimple-llava", "multimodal_simple": "mmsimple-llava"}
"""Names in use beside the converter's own: the source document's, and their configurations'."""

_VISION = {"mmsimple-llava": "image_model.image_model_list.0.0.", "llava": "image_model."}
_PROJECTOR = {"mmsimple-llava": "image_model.projection.ffn.", "llava": "projector_image_model.ffn."}
_LANGUAGE = "text_model."
_LAST_NORM = "language.model.norm.weight"
_NORM_COPY = "text_model.ln_f.weight"
OUTPUT, EMBEDDING = "text_model.lm_head.weight", "text_model.embedding_layer.word_embeddings.weight"
"""Two names of one tensor where embeddings are tied."""

_ATTENTION = {
    "self_attn.q_proj": "self_attn.proj_q_dense_layer",
    "self_attn.k_proj": "self_attn.proj_k_dense_layer",
    "self_attn.v_proj": "self_attn.proj_v_dense_layer",
}
_VISION_LAYER = _ATTENTION | {
    "self_attn.out_proj": "self_attn.proj_output_dense_layer",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "mlp.fc1": "ffn.ffn.0.linear_layer",
    "mlp.fc2": "ffn.ffn.1.linear_layer",
}
_VISION_REST = {
    "embeddings.class_embedding": "embedding_layer.cls_embedding",
    "embeddings.patch_embedding": "embedding_layer.linear_proj",
    "embeddings.position_embedding": "embedding_layer.position_embeddings",
    "pre_layrnorm": "embedding_layer.post_embed_ln",
    "post_layernorm": "encoder.transformer_encoder.norm",
}
_LANGUAGE_LAYER = _ATTENTION | {
    "self_attn.o_proj": "self_attn.proj_output_dense_layer",
    "input_layernorm": "norm1",
    "post_attention_layernorm": "norm3",
    "mlp.up_proj": "ffn.ffn.0.linear_layer",
    "mlp.gate_proj": "ffn.ffn.0.linear_layer_for_glu",
    "mlp.down_proj": "ffn.ffn.1.linear_layer",
}
_LANGUAGE_REST = {
    "model.embed_tokens": "embedding_layer.word_embeddings",
    "model.norm": "transformer_decoder.norm",
    "lm_head": "lm_head",
}
_OUR_PROJECTOR = re.compile(r"projector\.(\d+)\.(weight|bias)")
"""LLaVA counts activations as layers too, so that its linear layers are 0, 2, 4..., Cerebras' 0, 1, 2..."""
_THEIR_LINEAR = re.compile(r"(\d+)\.linear_layer\.(weight|bias)")
_NUMBERED = re.compile(r"(\d+)\.(.+)")
_POSITIONS = "vision.embeddings.position_embedding.weight"
_ROTATED = re.compile(r"language\.model\.layers\.\d+\.self_attn\.[qk]_proj\.weight")


def model_name(name: str) -> Model:
    """The converter's own name of a model. Raises ModelError for a name that nobody uses."""
    name = ALIASES.get(name, name)
    for model in MODELS:
        if name == model:
            return model
    raise ModelError(unknown("Cerebras model", name, [*MODELS, *ALIASES]))


@dataclass(frozen=True)
class _Part:
    """One part's prefixes and stems; stems are followed by `.weight`, `.bias` or nothing."""

    ours: str
    theirs: str
    our_layers: str
    their_layers: str
    layer: dict[str, str]
    rest: dict[str, str]


def _parts(model: Model) -> tuple[_Part, _Part]:
    encoder = ("encoder.layers.", "encoder.transformer_encoder.layers.")
    decoder = ("model.layers.", "transformer_decoder.layers.")
    return (
        _Part("vision.", _VISION[model], *encoder, _VISION_LAYER, _VISION_REST),
        _Part("language.", _LANGUAGE, *decoder, _LANGUAGE_LAYER, _LANGUAGE_REST),
    )


def to_theirs(name: str, model: Model) -> tuple[str, ...]:
    """What a tensor with a canonical name is called in their model; nothing if it has no place there."""
    if match := _OUR_PROJECTOR.fullmatch(name):
        index, odd = divmod(int(match[1]), 2)
        return () if odd else (f"{_PROJECTOR[model]}{index}.linear_layer.{match[2]}",)
    for part in _parts(model):
        if name.startswith(part.ours):
            found = _stems(
                name.removeprefix(part.ours), part.our_layers, part.their_layers, part.layer, part.rest, part.theirs
            )
            return (*found, _NORM_COPY) if name == _LAST_NORM else found
    return ()


def to_ours(name: str, model: Model) -> str | None:
    """The canonical name of a tensor of theirs; None if it has no place (the last norm's copy: see `is_copy`)."""
    if name.startswith(_PROJECTOR[model]):
        match = _THEIR_LINEAR.fullmatch(name.removeprefix(_PROJECTOR[model]))
        return match and f"projector.{int(match[1]) * 2}.{match[2]}"
    for part in _parts(model):
        if name.startswith(part.theirs):
            layer, rest = _turned(part.layer), _turned(part.rest)
            tail = name.removeprefix(part.theirs)
            return next(iter(_stems(tail, part.their_layers, part.our_layers, layer, rest, part.ours)), None)
    return None


def is_copy(name: str) -> bool:
    """Whether a tensor of theirs is the last norm's second place."""
    return name == _NORM_COPY


def model_of(names: set[str]) -> Model | None:
    """Which of their models has tensors of these names; None for neither."""
    if any(name.startswith("image_model.image_model_list.") for name in names):
        return "mmsimple-llava"
    if any(name.startswith(("image_model.embedding_layer.", "projector_image_model.")) for name in names):
        return "llava"
    return None


def other_encoders(names: set[str]) -> set[str]:
    """Tensors of further vision encoders, and of projectors that belong to one encoder alone."""
    inside = "image_model.image_model_list."
    first = _VISION["mmsimple-llava"]
    return {n for n in names if (n.startswith(inside) and not n.startswith(first)) or n.startswith("projector_text_")}


def _turned(table: dict[str, str]) -> dict[str, str]:
    return {theirs: ours for ours, theirs in table.items()}


def _stems(
    tail: str, layers: str, new_layers: str, layer: dict[str, str], rest: dict[str, str], prefix: str
) -> tuple[str, ...]:
    """The new name as a tuple of one, or of none if no rule holds."""
    head, table = prefix, rest
    if tail.startswith(layers):
        match = _NUMBERED.fullmatch(tail.removeprefix(layers))
        if match is None:
            return ()
        head, tail, table = f"{prefix}{new_layers}{match[1]}.", match[2], layer
    stem, dot, end = tail.rpartition(".")
    if end not in ("weight", "bias"):
        stem, dot, end = tail, "", ""
    return (f"{head}{table[stem]}{dot}{end}",) if stem in table else ()


# ---- row orders -------------------------------------------------------------------------------------------------


def reordered(name: str, tensor: torch.Tensor, head_dim: int, *, theirs: bool) -> torch.Tensor:
    """The tensor with canonical `name` in their row order, or (`theirs` false) from theirs in ours.

    `head_dim` is the language model's rows per attention head; grouped-query keys have fewer heads, not other rows.
    """
    if name == _POSITIONS:
        return torch.roll(tensor, -1 if theirs else 1, dims=0)
    if not _ROTATED.fullmatch(name):
        return tensor
    rows = tensor.shape[0]
    halves = (2, head_dim // 2) if theirs else (head_dim // 2, 2)
    return tensor.reshape(rows // head_dim, *halves, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def is_reordered(name: str) -> bool:
    """Whether rows of the tensor with this canonical name stand elsewhere in their models."""
    return name == _POSITIONS or bool(_ROTATED.fullmatch(name))
