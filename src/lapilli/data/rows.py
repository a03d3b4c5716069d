"""From Examples to a Batch of one fixed Shape: one row each, padded, with everything that a model needs to find listed.

Devices that compile a graph per shape must not look for things on the device: where image tokens stand or which labels
give a loss is data, and so would be the number of them. Here they are lists of fixed length, made beside the data.
"""

from collections.abc import Sequence

import numpy as np
import torch

from lapilli.data.buckets import Shape
from lapilli.data.pack import VISION, example_weights
from lapilli.data.sample import IGNORE, Batch, Example, Pixels, Places


def fill_rows(
    examples: Sequence[Example],
    tiles: Sequence[torch.Tensor],
    shape: Shape,
    *,
    tile_size: tuple[int, int],
    tokens_per_picture: int,
    padding_token: int = 0,
) -> Batch:
    """Lay each Example into a row of its own; the rest of the row, other rows, and other pictures are padding.

    `tiles` holds one uint8 tensor (1, 3, H, W) per image slot, in order of Examples and their slots; `tile_size` is
    (H, W), and every picture has `tokens_per_picture` places in the text. Padding has `padding_token`, which is not the
    image token, position 0 and no label; a picture of padding is black, and its features go nowhere. No Example gives a
    Batch that is padding throughout, of weight 0. Raises ValueError for what does not fit the shape.
    """
    slots = [slot for example in examples for slot in example.images]
    if len(slots) != len(tiles):
        raise ValueError(f"{len(slots)} image slots and {len(tiles)} pictures")
    input_ids = np.full((shape.rows, shape.length), padding_token, dtype=np.int64)
    labels = np.full((shape.rows, shape.length), IGNORE, dtype=np.int64)
    weights = np.zeros((shape.rows, shape.length), dtype=np.float32)
    positions = np.zeros((shape.rows, shape.length), dtype=np.int64)
    for row, example in enumerate(examples):
        n = example.length
        input_ids[row, :n], labels[row, 1:n], positions[row, :n] = example.input_ids, example.labels[1:], np.arange(n)
        weights[row, :n] = example_weights(example)
    weights[labels == IGNORE] = 0.0
    whole = len(examples) and any(example.weights is not None for example in examples)
    return Batch(
        input_ids=torch.from_numpy(input_ids.reshape(-1)),
        labels=torch.from_numpy(labels.reshape(-1)),
        position_ids=torch.from_numpy(positions.reshape(-1)),
        cu_seqlens=torch.arange(0, shape.tokens + 1, shape.length, dtype=torch.int32),
        images=_pictures(slots, tiles, shape, tile_size),
        ids=tuple(example.id for example in examples),
        weights=torch.from_numpy(weights.reshape(-1)) if whole else None,
        places=_places(examples, labels.reshape(-1), weights.reshape(-1), shape, tokens_per_picture),
    )


def _pictures(
    slots: Sequence, tiles: Sequence[torch.Tensor], shape: Shape, tile_size: tuple[int, int]
) -> dict[str, Pixels]:
    if len(slots) > shape.pictures:
        raise ValueError(f"{len(slots)} pictures, but room for {shape.pictures}")
    if not shape.pictures:
        return {}
    black = torch.zeros(shape.pictures - len(slots), 3, *tile_size, dtype=torch.uint8)
    sizes = [(slot.width, slot.height) for slot in slots] + [(0, 0)] * len(black)
    return {
        VISION: Pixels(
            tiles=torch.cat([*tiles, black]),
            tiles_per_image=torch.ones(shape.pictures, dtype=torch.int64),
            sizes=torch.tensor(sizes, dtype=torch.int64),
        )
    }


def _places(
    examples: Sequence[Example], labels: np.ndarray, weights: np.ndarray, shape: Shape, tokens_per_picture: int
) -> Places:
    nowhere = shape.tokens
    features = np.full(shape.pictures * tokens_per_picture, nowhere, dtype=np.int64)
    starts = [row * shape.length + slot.start for row, example in enumerate(examples) for slot in example.images]
    for i, start in enumerate(starts):
        features[i * tokens_per_picture : (i + 1) * tokens_per_picture] = np.arange(start, start + tokens_per_picture)
    supervised = np.flatnonzero(labels != IGNORE)
    if len(supervised) > shape.targets:
        raise ValueError(f"{len(supervised)} supervised tokens, but room for {shape.targets}")
    spare = shape.targets - len(supervised)
    return Places(
        rows=shape.rows,
        filled=sum(example.length for example in examples),
        features=torch.from_numpy(features),
        states=torch.from_numpy(np.concatenate([supervised - 1, np.zeros(spare, dtype=np.int64)])),
        targets=torch.from_numpy(np.concatenate([labels[supervised], np.zeros(spare, dtype=np.int64)])),
        weights=torch.from_numpy(np.concatenate([weights[supervised], np.zeros(spare, dtype=np.float32)])),
    )
