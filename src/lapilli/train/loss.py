"""From a packed Batch to its loss, as one module.

Everything that needs gradients runs inside one `forward`, because that is what parallel wrappers (DDP, FSDP) hook
into. Only positions that are supervised reach the output layer, and where their logits would be large they are
computed in pieces and again in the backward pass, so that memory does not grow with the vocabulary.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lapilli.data.image import ImageSpec, normalise
from lapilli.data.sample import IGNORE, Batch
from lapilli.model.vlm import VisionLanguageModel

IDLE_TOKENS = 8
LOGITS_AT_ONCE = 2**25
"""Logits held at one time, in numbers: 128 MiB in fp32, and as much again for their gradient."""


class LossModule(nn.Module):
    """Sum of the cross entropies of a Batch's supervised tokens, each multiplied by its weight."""

    def __init__(self, model: VisionLanguageModel, image: ImageSpec) -> None:
        super().__init__()
        self.model = model
        self.image = image

    def forward(self, batch: Batch, pictures: bool | None = None) -> torch.Tensor:
        """Return the sum () of fp32 losses of a Batch that is on the model's device.

        What a Batch does not need is left out: one without supervised tokens gives a zero without gradient. Where
        processes hold parts of each other's weights, all of them must take the same way. `pictures` is for them: any
        Batch goes through the whole language model, and with True also through vision encoder and projector. What it
        does not need adds nothing to the loss and gets gradients of zero.
        """
        keep, targets, weights = batch.supervision()
        if pictures is None and len(targets) == 0:
            return batch.labels.new_zeros((), dtype=torch.float32)
        model, places, rows = self.model, None, None
        if batch.places is not None:
            places, rows = batch.places.features, batch.places.rows
        embeds = model.embed(batch.input_ids, self._features(batch, pictures or False), places)
        kind = embeds.device.type
        if torch.is_autocast_enabled(kind):
            # The layers' sums then stay in bf16 from end to end, as in the original's runs, and attention gets its
            # queries in the precision its fast kernels take.
            embeds = embeds.to(torch.get_autocast_dtype(kind))
        if model.config.head != "direct":
            logits = model.packed_logits(embeds, batch.position_ids, batch.cu_seqlens, keep, rows)
            return self._cross_entropy(logits, targets, weights)
        states = model.hidden_states(embeds, batch.position_ids, batch.cu_seqlens, rows)
        return self._loss_of_states(states.index_select(0, keep), targets, weights)

    def idle_batch(self) -> Batch:
        """A Batch on the CPU of a few tokens of which none is supervised, for a process that has nothing left to do."""
        token = 1 if self.model.config.image_token_id == 0 else 0
        tokens = torch.full((IDLE_TOKENS,), token)
        bounds = torch.tensor([0, IDLE_TOKENS], dtype=torch.int32)
        return Batch(tokens, torch.full_like(tokens, IGNORE), torch.arange(IDLE_TOKENS), bounds)

    def _features(self, batch: Batch, pictures: bool) -> torch.Tensor | None:
        if batch.images:
            (pixels,) = batch.images.values()
            tiles = normalise(pixels.tiles, self.image)
            return self.model.encode_images(tiles, pixels.tiles_per_image, pixels.sizes)
        if not pictures:
            return None
        layout, device = self.model.layout, batch.input_ids.device
        width, height = layout.tile_width, layout.tile_height
        count = layout.tiles(width, height)
        blank = torch.zeros(count, 3, height, width, dtype=torch.uint8, device=device)
        sizes = torch.tensor([[width, height]], device=device)
        features = self.model.encode_images(normalise(blank, self.image), torch.tensor([count], device=device), sizes)
        return features[:0]  # no place in the text, and yet a way for gradients

    def _loss_of_states(
        self, states: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None
    ) -> torch.Tensor:
        """Loss of states (S, D) against targets (S,) with weights (S,), through the output layer in pieces."""
        vocabulary = self.model.config.text_config.get_text_config().vocab_size
        rows = max(1, LOGITS_AT_ONCE // vocabulary)
        if len(states) <= rows:
            return self._piece(states, targets, weights)
        total = states.new_zeros((), dtype=torch.float32)
        pieces = [None] * -(-len(states) // rows) if weights is None else weights.split(rows)
        for piece, wanted, worth in zip(states.split(rows), targets.split(rows), pieces, strict=True):
            total = total + checkpoint(self._piece, piece, wanted, worth, use_reentrant=False)
        return total

    def _piece(self, states: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        return self._cross_entropy(self.model.head(states), targets, weights)

    def _cross_entropy(self, logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        logits = self.model.without_image_token(logits.float())
        if weights is None:
            return F.cross_entropy(logits, targets, reduction="sum")
        return (F.cross_entropy(logits, targets, reduction="none") * weights).sum()
