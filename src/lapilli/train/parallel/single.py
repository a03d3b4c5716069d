"""One process, one device: the engine that every other one must agree with.

An engine wraps the LossModule from outside the model and does what depends on how gradients and weights are laid out:
backward passes, the norm of all gradients, and tensors by their canonical names for checkpoints.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from lapilli.train.loss import LossModule
from lapilli.train.parallel.world import ALONE, World


class Single:
    """Everything is here, whole."""

    name = "single"

    def __init__(self, module: LossModule, world: World = ALONE) -> None:
        self.module: nn.Module = module
        self.world = world
        self._model = module.model

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trainable parameters under their canonical names: those of the model, without wrappers."""
        return ((name, p) for name, p in self._model.named_parameters() if p.requires_grad)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of `loss`, already normalised over the whole step."""
        loss.backward()

    def complete(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add up, after the last backward pass of a step, the gradients of all processes. Every parameter has one."""

    def gradient_norm(self, parameters: list[nn.Parameter]) -> torch.Tensor:
        """L2 norm of all gradients together."""
        return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

    def clip(self, parameters: list[nn.Parameter], max_norm: float, norm: torch.Tensor) -> None:
        """Scale the gradients so that their norm, now `norm`, is at most `max_norm`."""
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
