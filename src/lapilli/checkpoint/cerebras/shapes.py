"""Which tensors a LLaVA model of Cerebras has, and their shapes: so much and nothing else is read and written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lapilli.base.errors import ModelError
from lapilli.checkpoint.cerebras.config_to import clip_vision_fields
from lapilli.checkpoint.cerebras.tables import LLAMA, MLP, default
from lapilli.checkpoint.stream import Tensors
from lapilli.checkpoint.tensors import some

Shapes = dict[str, tuple[int, ...]]
OUTPUT, EMBEDDING = "language.lm_head.weight", "language.model.embed_tokens.weight"


def shapes_of(llava_fields: Mapping[str, Any], clip_fields: Mapping[str, Any]) -> Shapes:
    """Canonical names to shapes, for fields that `to_cerebras_config` takes. A tied output layer is not among them."""
    made = _vision(clip_vision_fields(clip_fields)) | _language(llava_fields)
    return made | projector_shapes(llava_fields, clip_fields)


def projector_shapes(llava_fields: Mapping[str, Any], clip_fields: Mapping[str, Any]) -> Shapes:
    """The projector's tensors. Raises ModelError for a type that is no MLP."""
    match = MLP.fullmatch(str(default(llava_fields, "mm_projector_type", "mlp2x_gelu")))
    if match is None:
        raise ModelError(f"mm_projector_type {llava_fields.get('mm_projector_type')!r} is no mlp1x_gelu, mlp2x_gelu...")
    made: Shapes = {}
    width, hidden = clip_vision_fields(clip_fields)["hidden_size"], _said(llava_fields)["hidden_size"]
    for layer in range(int(match[1])):
        made[f"projector.{2 * layer}.weight"] = (hidden, width if layer == 0 else hidden)
        made[f"projector.{2 * layer}.bias"] = (hidden,)
    return made


def head_width(llava_fields: Mapping[str, Any]) -> int:
    """Rows of the language model's queries per attention head."""
    said = _said(llava_fields)
    return said["hidden_size"] // said["num_attention_heads"]


def _said(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: default(fields, key, value) for key, value in LLAMA.items()}


def _vision(clip: Mapping[str, Any]) -> Shapes:
    width, inner, patch = clip["hidden_size"], clip["intermediate_size"], clip["patch_size"]
    made: Shapes = {
        "vision.embeddings.class_embedding": (width,),
        "vision.embeddings.patch_embedding.weight": (width, clip["num_channels"], patch, patch),
        "vision.embeddings.position_embedding.weight": ((clip["image_size"] // patch) ** 2 + 1, width),
    }
    linear: Shapes = {f"self_attn.{name}_proj": (width, width) for name in ("q", "k", "v", "out")}
    linear |= {"layer_norm1": (width,), "layer_norm2": (width,), "mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
    stems: Shapes = {"pre_layrnorm": (width,)}
    for layer in range(clip["num_hidden_layers"]):
        stems |= {f"encoder.layers.{layer}.{stem}": shape for stem, shape in linear.items()}
    for stem, shape in (stems | {"post_layernorm": (width,)}).items():
        made |= {f"vision.{stem}.weight": shape, f"vision.{stem}.bias": shape[:1]}
    return made


def _language(fields: Mapping[str, Any]) -> Shapes:
    said = _said(fields)
    hidden, inner, heads = said["hidden_size"], said["intermediate_size"], said["num_attention_heads"]
    grouped = default(fields, "num_key_value_heads", heads) * hidden // heads
    rows = said["vocab_size"]
    linear = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (grouped, hidden),
              "self_attn.v_proj": (grouped, hidden), "self_attn.o_proj": (hidden, hidden), "input_layernorm": (hidden,),
              "post_attention_layernorm": (hidden,), "mlp.up_proj": (inner, hidden), "mlp.gate_proj": (inner, hidden),
              "mlp.down_proj": (hidden, inner)}  # fmt: skip
    made: Shapes = {EMBEDDING: (rows, hidden)}
    for layer in range(said["num_hidden_layers"]):
        made |= {f"language.model.layers.{layer}.{stem}.weight": shape for stem, shape in linear.items()}
    made["language.model.norm.weight"] = (hidden,)
    return made if fields.get("tie_word_embeddings") else made | {OUTPUT: (rows, hidden)}


def check(tensors: Tensors, wanted: Shapes, where: str) -> None:
    """Raise ModelError, naming the tensor, unless `tensors` are those `wanted`, no more, no less, in their shapes."""
    extra = set(tensors) - set(wanted)
    if extra:
        place = tensors[min(extra)].where
        raise ModelError(f"{place}: {len(extra)} tensors have no place in a LLaVA model of Cerebras: {some(extra)}")
    missing = set(wanted) - set(tensors)
    if missing:
        raise ModelError(f"{where}: {len(missing)} tensors are missing: {some(missing)}")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name]:
            raise ModelError(
                f"{tensor.where}: {name} has shape {tensor.shape}, the configuration asks for {wanted[name]}"
            )


def without_tied(tensors: Tensors, fields: Mapping[str, Any]) -> tuple[Tensors, list[str]]:
    """The tensors without an output layer that is the embedding, and what to say about it.

    Raises ModelError if the configuration says so and the two differ.
    """
    if not fields.get("tie_word_embeddings") or OUTPUT not in tensors or EMBEDDING not in tensors:
        return tensors, []
    output, embedding = tensors[OUTPUT], tensors[EMBEDDING]
    if output is not embedding and (
        output.shape != embedding.shape
        or output.dtype != embedding.dtype
        or not torch.equal(output.read(), embedding.read())
    ):
        raise ModelError(f"{output.where}: differs from the embedding, though the configuration says they are one")
    rest = {name: tensor for name, tensor in tensors.items() if name != OUTPUT}
    return rest, ["the output layer is the embedding (tied); it is kept once"]
