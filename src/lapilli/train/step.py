"""One optimiser step: count, forward and backward per micro-batch, check, clip, update.

This is the one place where the loss is normalised. With `tokens` a step's loss and gradients don't depend on how its
samples were split into micro-batches; `microbatch_mean` is the original trainer's arithmetic, which does.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from lapilli.base.errors import RunError
from lapilli.data.sample import Batch
from lapilli.recipe.schema import Train
from lapilli.train.parallel.single import Single


@dataclass(frozen=True)
class StepResult:
    loss: float
    grad_norm: float
    """Before clipping."""
    tokens: int
    supervised_tokens: int


def loss_weights(supervised: Sequence[float], reduction: str) -> list[float]:
    """Return what each micro-batch's summed loss is multiplied by, from their (weighted) numbers of supervised tokens.

    A micro-batch without supervised tokens counts 0.
    """
    if reduction == "tokens":
        total = sum(supervised)
        return [1 / total if total else 0.0] * len(supervised)
    return [1 / (count * len(supervised)) if count else 0.0 for count in supervised]


def accumulate(
    engine: Single,
    batches: Sequence[Batch],
    reduction: str,
    device: torch.device,
    autocast: AbstractContextManager[None],
) -> list[float]:
    """Add the step's gradients to the parameters; return each micro-batch's part of the loss, which sum to the loss."""
    losses: list[torch.Tensor] = []
    for batch, weight in zip(batches, loss_weights([b.weight for b in batches], reduction), strict=True):
        with autocast:
            total = engine.module(batch.to(device))
        loss = total * weight
        if loss.requires_grad:
            engine.backward(loss)
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def train_step(
    engine: Single,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    train: Train,
    device: torch.device,
    *,
    autocast: AbstractContextManager[None],
    where: str = "this step",
) -> StepResult:
    """Learn from one step's micro-batches; `where` names the step in errors.

    Raises RunError, before any weight is changed, if loss or gradient is not finite; the message names the samples.
    """
    parameters: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad(set_to_none=True)
    losses = accumulate(engine, batches, train.loss_reduction, device, autocast)
    for parameter in parameters:
        # A part that saw nothing (the projector in a step of text) has a zero gradient, so that Adam's momentum and
        # weight decay act on it in every step, as they do in the original and under DDP.
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    norm = engine.gradient_norm(parameters)
    grad_norm = float(norm)
    _refuse_non_finite(losses, grad_norm, batches, where)
    if train.max_grad_norm is not None:
        engine.clip(parameters, train.max_grad_norm, norm)
    optimizer.step()
    return StepResult(math.fsum(losses), grad_norm, sum(b.tokens for b in batches), sum(b.supervised for b in batches))


def _refuse_non_finite(losses: Sequence[float], grad_norm: float, batches: Sequence[Batch], where: str) -> None:
    for loss, batch in zip(losses, batches, strict=True):
        if not math.isfinite(loss):
            raise RunError(f"{where}: the loss is {loss} (no weight was changed); samples: {', '.join(batch.ids)}")
    if not math.isfinite(grad_norm):
        ids = ", ".join(i for b in batches for i in b.ids)
        raise RunError(f"{where}: the gradient norm is {grad_norm} (no weight was changed); samples: {ids}")
