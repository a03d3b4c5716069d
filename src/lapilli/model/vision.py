"""Vision encoders: any Hugging Face image model whose layers are one plain list.

Nothing above the last layer that is read is ever run: a hook takes the wanted layers' outputs and leaves the forward
pass early. What must be known about an encoder (width, patch grid, tokens before the patches, form of its input) is
found by running it once, shrunken, when a model is built.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from lapilli.base.errors import ModelError
from lapilli.model.shrink import SHRINK_ERRORS, shrunken


class _Leave(Exception):
    """Leaves an encoder's forward pass once the last wanted layer has run."""


@dataclass(frozen=True)
class VisionGeometry:
    """What an encoder makes of one tile of `tile_height` x `tile_width` pixels."""

    tile_height: int
    tile_width: int
    grid_height: int
    grid_width: int
    prefix_tokens: int
    """Tokens before the patches: class token, registers."""
    hidden_size: int
    flat_patches: bool
    """The encoder takes flattened patches with their shapes (SigLIP2-NaFlex), not pictures."""


def takes_flat_patches(encoder: nn.Module) -> bool:
    """Whether the encoder's forward pass asks for patches and their shapes instead of a picture."""
    return "spatial_shapes" in inspect.signature(encoder.forward).parameters


def find_layers(encoder: PreTrainedModel) -> nn.ModuleList:
    """Return the encoder's list of layers.

    Raises ModelError if it has no single list as long as its configuration says, as hierarchical encoders have none.
    """
    depth = getattr(encoder.config, "num_hidden_layers", None)
    lists = [m for m in encoder.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not lists:
        raise ModelError(
            f"{type(encoder).__name__} can't be used as a vision encoder: it has no plain list of "
            f"{depth} layers whose outputs could be read (use a ViT-like encoder)"
        )
    return lists[0]


def resolve_layers(layers: Sequence[int], depth: int) -> list[int]:
    """Turn indices into hidden states (negative ones from the end) into indices 0..depth.

    Raises ModelError for an index outside the encoder.
    """
    resolved = []
    for index in layers:
        absolute = index if index >= 0 else depth + 1 + index
        if not 0 <= absolute <= depth:
            raise ModelError(
                f"feature layer {index} does not exist: the vision encoder has hidden states 0 (embeddings) to "
                f"{depth} (last layer), or -1 to {-depth - 1} counted from the end"
            )
        resolved.append(absolute)
    return resolved


def to_flat_patches(pixels: torch.Tensor, patch_size: int) -> dict[str, torch.Tensor]:
    """Cut pictures (B, C, H, W) into the inputs of an encoder that takes flattened patches.

    Returns `pixel_values` (B, P, patch*patch*C) with the channel last inside a patch, `pixel_attention_mask` (B, P)
    and `spatial_shapes` (B, 2) as (rows, columns).
    """
    batch, channels, height, width = pixels.shape
    rows, columns = height // patch_size, width // patch_size
    x = pixels[:, :, : rows * patch_size, : columns * patch_size]
    x = x.reshape(batch, channels, rows, patch_size, columns, patch_size)
    x = x.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, patch_size * patch_size * channels)
    mask = torch.ones(batch, rows * columns, dtype=torch.long, device=pixels.device)
    shapes = torch.tensor([[rows, columns]] * batch, device=pixels.device)
    return {"pixel_values": x, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def read_layers(encoder: PreTrainedModel, pixels: torch.Tensor, layers: Sequence[int]) -> list[torch.Tensor]:
    """Return the hidden states (B, tokens, D) at the given indices for pictures (B, C, H, W).

    Layers above the highest index are not run. The last layer's state is read as the encoder itself reports it,
    because some encoders normalise it and some don't.
    """
    inputs = (
        to_flat_patches(pixels, encoder.config.patch_size) if takes_flat_patches(encoder) else {"pixel_values": pixels}
    )
    blocks = find_layers(encoder)
    wanted = resolve_layers(layers, len(blocks))
    if max(wanted) == len(blocks):
        states = encoder(**inputs, output_hidden_states=True).hidden_states
        return [states[index] for index in wanted]

    found: dict[int, torch.Tensor] = {}
    last = max(wanted)

    def before_first(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found[0] = args[0] if args else kwargs["hidden_states"]
        if last == 0:
            raise _Leave

    def after(index: int) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            found[index] = output[0] if isinstance(output, tuple) else output
            if index == last:
                raise _Leave

        return hook

    handles = [blocks[0].register_forward_pre_hook(before_first, with_kwargs=True)]
    handles += [blocks[i - 1].register_forward_hook(after(i)) for i in sorted(set(wanted)) if i > 0]
    try:
        encoder(**inputs)
    except _Leave:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return [found[index] for index in wanted]


def vision_part(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the vision half of a dual encoder's configuration (CLIP, SigLIP), or the configuration itself."""
    return getattr(config, "vision_config", None) or config


def patch_of(config: PreTrainedConfig) -> int:
    """Side of a square patch in pixels. Raises ModelError if the configuration has none or it is not square."""
    patch = getattr(config, "patch_size", None)
    if isinstance(patch, (list, tuple)):
        patch = patch[0] if len(set(patch)) == 1 else None
    if not isinstance(patch, int):
        raise ModelError(
            f"{config.model_type} can't be used as a vision encoder: its configuration has no square `patch_size`"
        )
    return patch


def native_size(config: PreTrainedConfig) -> tuple[int, int]:
    """Return (height, width) in pixels of the pictures the encoder was made for, as its configuration says."""
    size = getattr(config, "image_size", None)
    if isinstance(size, (list, tuple)):
        return int(size[0]), int(size[1])
    if size is None and getattr(config, "num_patches", None):
        # Encoders of free resolution are used on the square grid that their position table holds.
        size = int(config.num_patches**0.5) * patch_of(config)
    if size is None:
        raise ModelError(f"{config.model_type} can't be used as a vision encoder: no `image_size` in its configuration")
    return int(size), int(size)


def probe_vision(config: PreTrainedConfig, tile: tuple[int, int]) -> VisionGeometry:
    """Find an encoder's geometry for tiles of (height, width) pixels by running a shrunken copy of it.

    Raises ModelError, with the reason, for an encoder that can't be used, among them one whose layers read by
    `read_layers` differ from the hidden states that it reports itself.
    """
    patch = patch_of(config)
    height, width = tile
    grid_height, grid_width = height // patch, width // patch
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        encoder = shrunken(config, AutoModel.from_config).eval()
        pixels = torch.rand(2, getattr(config, "num_channels", 3), height, width)
        try:
            (state,) = read_layers(encoder, pixels, [-2])
            flat = takes_flat_patches(encoder)
            inputs = to_flat_patches(pixels, patch) if flat else {"pixel_values": pixels}
            reported = encoder(**inputs, output_hidden_states=True).hidden_states[-2]
        except SHRINK_ERRORS as error:
            raise ModelError(
                f"{config.model_type} can't be used as a vision encoder for {width}x{height} pictures: {error}"
            ) from error
    if state.ndim != 3 or not torch.allclose(state, reported, atol=1e-5):
        raise ModelError(
            f"{config.model_type} can't be used as a vision encoder: its layer outputs are not token lists"
        )
    prefix = state.shape[1] - grid_height * grid_width
    if prefix < 0:
        raise ModelError(
            f"{config.model_type} can't be used as a vision encoder: it makes {state.shape[1]} tokens of a picture "
            f"with {grid_height}x{grid_width} patches, fewer than one per patch"
        )
    return VisionGeometry(height, width, grid_height, grid_width, prefix, config.hidden_size, flat)
