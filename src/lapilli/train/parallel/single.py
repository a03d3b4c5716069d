"""One process, one device: the engine that every other one must agree with.

An engine wraps the LossModule from outside the model and does what depends on how gradients and weights are laid out:
which passes each process makes, backward passes, the optimiser and its step, and tensors by their canonical names for
checkpoints.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from lapilli.base.errors import RunError
from lapilli.data.sample import Batch
from lapilli.recipe.schema import Train
from lapilli.train.loss import LossModule
from lapilli.train.optimizer import build_optimizer, parameter_groups
from lapilli.train.parallel.world import ALONE, World
from lapilli.train.tensors import Known, Saved


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

    def optimizer(self, train: Train) -> torch.optim.Optimizer:
        """Build the optimiser over `trained`."""
        return build_optimizer(parameter_groups(self.trained(), train), train)

    def clear(self, optimizer: torch.optim.Optimizer) -> None:
        """Forget the gradients of the step before."""
        optimizer.zero_grad(set_to_none=True)

    def level(self, batches: Sequence[Batch]) -> list[tuple[Batch, bool | None]]:
        """The passes that this process makes for its part of a step: what LossModule takes, its own Batches first.

        Where weights are split, all processes call it together, and all make as many passes of the same kind.
        """
        return [(batch, None) for batch in batches]

    def passing(self) -> AbstractContextManager[None]:
        """Around forward and backward passes: an error inside ends all processes, whatever the others are doing."""
        return self.world.together()

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of `loss`, already normalised over the whole step."""
        loss.backward()

    def update(self, optimizer: torch.optim.Optimizer, max_norm: float | None) -> float:
        """Complete the gradients, clip them to `max_norm` and step; return their norm before clipping.

        With a norm that is not finite, no weight is changed. All processes call it together.
        """
        parameters: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
        for parameter in parameters:
            # A part that saw nothing (the projector in a step of text) has a zero gradient, so that Adam's momentum and
            # weight decay act on it in every step, as they do in the original and under DDP.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.complete(parameters)
        norm = self.gradient_norm(parameters)
        value = float(norm)
        if math.isfinite(value):
            if max_norm is not None:
                self.clip(parameters, max_norm, norm)
            optimizer.step()
        return value

    def resting(self) -> None:
        """After passes without a backward one: give back what was gathered for them, and show the trained weights."""

    def whole_model(self) -> AbstractContextManager[None]:
        """Inside, the first process may run the model by itself, as it stands. All processes enter and leave it."""
        return nullcontext()

    def collect(self) -> None:
        """Put the whole model into the first process, to be exported; no step follows. All processes call it."""

    def complete(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add up, after the last backward pass of a step, the gradients of all processes. Every parameter has one."""

    def finite_gradients(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether this process's part of the gradients, as far as they are added up, is finite."""
        return all(bool(p.grad.isfinite().all()) for _, p in self.trained() if p.grad is not None)

    def gradient_norm(self, parameters: list[nn.Parameter]) -> torch.Tensor:
        """L2 norm of all gradients together."""
        return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

    def clip(self, parameters: list[nn.Parameter], max_norm: float, norm: torch.Tensor) -> None:
        """Scale the gradients so that their norm, now `norm`, is at most `max_norm`."""
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)

    gathers = False
    """Whether `state` gathers what it yields, so that it is gone when the next one is asked for."""

    def state(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, str, torch.Tensor]]:
        """What a checkpoint holds: (`weights`, canonical name, tensor) and (`optimizer`, `<that name>.<key>`, tensor).

        All processes call it, and go through it, together: names and shapes are the same everywhere. A tensor is a
        DTensor, of which each process has its shard, or whole and the same everywhere. Plain numbers of the optimiser
        are given as int64 or float64 tensors ().
        """
        for name, parameter in self.trained():
            yield "weights", name, parameter
        for name, parameter in self.trained():
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    yield "optimizer", f"{name}.{key}", value
                elif isinstance(value, int | float):
                    number = torch.float64 if isinstance(value, float) else torch.int64
                    yield "optimizer", f"{name}.{key}", torch.tensor(value, dtype=number)

    def load_weights(self, saved: Saved, kind: str = "weights") -> None:
        """Put the trained weights of a checkpoint in place. Raises RunError where its names or shapes are others."""
        trained: dict[str, torch.Tensor] = dict(self.trained())
        unknown = min(saved.known(kind).keys() - trained.keys(), default=None)
        if unknown is not None:
            shape = tuple(saved.known(kind)[unknown].shape)
            raise RunError(f"{saved.folder}: weight {unknown} {shape} does not fit this run's model, which trains none")
        saved.load(kind, trained)

    def learning(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What the optimiser steps in this process, under names of the engine's own: moving averages are kept of it."""
        return ((name, parameter.detach()) for name, parameter in self.trained())

    def state_of(self, kind: str, values: dict[str, torch.Tensor]) -> Iterator[tuple[str, str, torch.Tensor]]:
        """As `state`, of `values` laid out as `learning`, under the canonical names of the weights."""
        return ((kind, name, value) for name, value in values.items())

    def load_values(self, saved: Saved, kind: str, values: dict[str, torch.Tensor]) -> None:
        """Put what `state_of` saved, by whatever engine, into `values`. Raises RunError if they do not fit."""
        saved.load(kind, values)

    def load_state(self, saved: Saved, optimizer: torch.optim.Optimizer) -> None:
        """Put the weights and the optimiser's state in place, by whatever engine and number of processes it was saved.

        Raises RunError where names or shapes are not those of this run.
        """
        self.load_weights(saved)
        trained = dict(self.trained())
        targets: dict[str, torch.Tensor] = {}
        for name, known in saved.known("optimizer").items():
            owner, _, key = name.rpartition(".")
            if owner not in trained:
                raise RunError(f"{saved.folder}: optimiser tensor {name} belongs to no trained weight")
            # As the optimiser itself places them: counters stay where its kernels look for them.
            on_device = key != "step" or optimizer.defaults.get("fused")
            targets[name] = _like(trained[owner], known, on_device=bool(on_device))
        saved.load("optimizer", targets)
        for name, tensor in targets.items():
            owner, _, key = name.rpartition(".")
            number = tensor.ndim == 0 and tensor.dtype in (torch.int64, torch.float64)
            optimizer.state[trained[owner]][key] = tensor.item() if number else tensor


def _like(parameter: nn.Parameter, known: Known, *, on_device: bool) -> torch.Tensor:
    """An empty tensor for the optimiser, laid out as the parameter it belongs to where it has its shape."""
    if known.shape == parameter.shape and on_device:
        return torch.empty_like(parameter.detach(), dtype=known.dtype)
    return torch.empty(known.shape, dtype=known.dtype, device=parameter.device if on_device else "cpu")
