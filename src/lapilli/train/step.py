"""One optimiser step: count, forward and backward per micro-batch, check, clip, update.

This is the one place where the loss is normalised. With `tokens` a step's loss and gradients don't depend on how its
samples were split into micro-batches; `microbatch_mean` is the original trainer's arithmetic, which does. Neither
depends on how the micro-batches were dealt to processes.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields

import torch

from lapilli.base.errors import RunError
from lapilli.data.sample import Batch
from lapilli.recipe.schema import Train
from lapilli.train.parallel.single import Single
from lapilli.train.parallel.world import World


class NonFinite(RunError):
    """A step's loss or gradient is not finite, which `what` says; no weight was changed."""

    def __init__(self, where: str, what: str, samples: Iterable[str]) -> None:
        self.what = what
        super().__init__(f"{where}: {what} (no weight was changed); samples: {', '.join(samples)}")


@dataclass(frozen=True)
class StepResult:
    loss: float
    grad_norm: float
    """Before clipping."""
    tokens: int
    supervised_tokens: int
    samples: int
    """All three on all processes."""


@dataclass(frozen=True)
class StepTotals:
    """What the micro-batches of a step hold together, on all processes."""

    micro_batches: int = 0
    samples: int = 0
    tokens: int = 0
    supervised: int = 0
    weight: float = 0.0
    """Supervised tokens, each counted as much as it weighs."""

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> "StepTotals":
        return cls(
            len(batches),
            sum(len(b.ids) for b in batches),
            sum(b.tokens for b in batches),
            sum(b.supervised for b in batches),
            sum(b.weight for b in batches),
        )

    @classmethod
    def sum(cls, parts: Iterable["StepTotals"]) -> "StepTotals":
        parts = list(parts)
        return cls(**{field.name: sum(getattr(part, field.name) for part in parts) for field in fields(cls)})


def loss_weights(supervised: Sequence[float], reduction: str, whole: StepTotals | None = None) -> list[float]:
    """Return what each micro-batch's summed loss is multiplied by, from their (weighted) numbers of supervised tokens.

    `whole` is the step on all processes, if these are not all of its micro-batches. One without supervised tokens
    counts 0.
    """
    total, count = (sum(supervised), len(supervised)) if whole is None else (whole.weight, whole.micro_batches)
    if reduction == "tokens":
        return [1 / total if total else 0.0] * len(supervised)
    return [1 / (tokens * count) if tokens else 0.0 for tokens in supervised]


def accumulate(
    engine: Single,
    batches: Sequence[Batch],
    reduction: str,
    device: torch.device,
    autocast: AbstractContextManager[None],
    whole: StepTotals | None = None,
    cut: Callable[[], None] = lambda: None,
) -> list[float]:
    """Add the step's gradients to the parameters; return each micro-batch's part of the loss, which sum to the loss.

    `whole` is the step on all processes, if these are not all of its micro-batches; `cut` is called after each backward
    pass, for devices that collect what they are to compute.
    """
    weights = loss_weights([b.weight for b in batches], reduction, whole)
    losses: list[torch.Tensor] = []
    for number, (batch, pictures) in enumerate(engine.level(batches)):
        with autocast:
            total = engine.module(batch.to(device), pictures)
        loss = total * (weights[number] if number < len(weights) else 0.0)
        if loss.requires_grad:
            engine.backward(loss)
        cut()
        if number < len(batches):
            losses.append(loss.detach())
    return torch.stack(losses).tolist() if losses else []


def train_step(
    engine: Single,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    train: Train,
    device: torch.device,
    *,
    autocast: AbstractContextManager[None],
    where: str = "this step",
    whole: StepTotals | None = None,
    cut: Callable[[], None] = lambda: None,
) -> StepResult:
    """Learn from one step's micro-batches; `where` names the step in errors, `whole` is the step on all processes.

    `cut` is called after each backward pass and after the optimiser's step.
    Raises NonFinite, on all processes and before any weight is changed, if loss or gradient is not finite; the message
    names the samples.
    """
    whole = StepTotals.of(batches) if whole is None else whole
    engine.clear(optimizer)
    with engine.passing():
        losses = accumulate(engine, batches, train.loss_reduction, device, autocast, whole, cut)
    loss = _finite_sum(engine.world, losses, batches, where)
    grad_norm = engine.update(optimizer, train.max_grad_norm)
    cut()
    if not math.isfinite(grad_norm):
        ids = [i for ids in engine.world.exchange([i for b in batches for i in b.ids]) for i in ids]
        raise NonFinite(where, f"the gradient norm is {grad_norm}", ids)
    return StepResult(loss, grad_norm, whole.tokens, whole.supervised, whole.samples)


def _finite_sum(world: World, losses: Sequence[float], batches: Sequence[Batch], where: str) -> float:
    """Return the loss of all processes. Raises NonFinite, on all of them, naming the samples of what is not finite."""
    broken = [(loss, batch.ids) for loss, batch in zip(losses, batches, strict=True) if not math.isfinite(loss)]
    parts = world.exchange([0.0 if broken else math.fsum(losses), broken[:1]])
    found = [one for _, broken in parts for one in broken]
    if found:
        raise NonFinite(where, f"the loss is {found[0][0]}", [i for _, ids in found for i in ids])
    return math.fsum(part for part, _ in parts)
