"""Several processes, each with the whole model: every one learns from its share of a step, and gradients are added.

Gradients are summed, not averaged, because a step's loss is normalised over all processes before. They are summed once,
after the last backward pass, in buckets, with zeros for what a process did not see: every process sends the same
tensors in the same order, whatever its micro-batches were, so none waits for another that has fewer of them, no
pictures, or nothing at all. (Hooks inside the backward pass, as in torch's DistributedDataParallel, would hide the time
of sending behind that of computing, and need every process to see every weight in every pass.)
"""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from lapilli.train.loss import LossModule
from lapilli.train.parallel.single import Single
from lapilli.train.parallel.world import World

BUCKET_BYTES = 2**26
"""Gradients are sent in pieces of about this size."""


class Ddp(Single):
    """The whole model in every process. All of them start from the first one's trained weights."""

    name = "ddp"

    def __init__(self, module: LossModule, world: World) -> None:
        super().__init__(module, world)
        with torch.no_grad():
            world.share(parameter.data for _, parameter in self.trained())

    def complete(self, parameters: Sequence[nn.Parameter]) -> None:
        for bucket in _buckets([p.grad for p in parameters if p.grad is not None]):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            self.world.add_up([flat])
            pieces = flat.split([gradient.numel() for gradient in bucket])
            for gradient, piece in zip(bucket, pieces, strict=True):
                gradient.copy_(piece.view_as(gradient))


def _buckets(gradients: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Neighbours of one dtype, together about BUCKET_BYTES."""
    bucket: list[torch.Tensor] = []
    size = 0
    for gradient in gradients:
        if bucket and (size >= BUCKET_BYTES or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.numel() * gradient.element_size()
    if bucket:
        yield bucket
