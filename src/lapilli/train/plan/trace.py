"""One training step without memory: the run's own code over tensors that have shapes and no numbers.

Formulas for activations know one architecture, one kernel and one way of recomputing; a traced step knows what the run
will do, whatever the model is. Weights and all that is computed from them are PyTorch's fake tensors, which allocate
nothing; numbers that decide shapes (tokens, boundaries, labels) are real. Storages are counted from birth to death, so
that what is alive together at the worst moment is known, and by kind.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

Kind = Literal["activations", "logits", "gradients"]
KINDS: tuple[Kind, ...] = ("activations", "logits", "gradients")
GRADIENT = -1
"""In the place of a size: the storage has become a parameter's gradient."""

_AS_GIVEN = ("full", "arange", "scalar_tensor")
"""Factories that make integers of integers."""
_FACTORIES = ("empty", "zeros", "ones", "full", "rand", "arange", "eye", "scalar_tensor", "linspace")


@dataclass
class Traced:
    """What a traced step held, in bytes, and computed, in floating-point operations."""

    peak: dict[Kind, int] = field(default_factory=dict)
    """By kind, at the moment when most was alive."""
    peak_activations: int = 0
    """Most that was alive at once beside gradients."""
    logits: int = 0
    """Most of logits and their gradients that was alive at once."""
    flops: int = 0
    events: tuple[tuple[int, int], ...] = ()
    """(number, size) of each storage when it is born, (number, 0) when it dies, (number, GRADIENT) when it has become
    one."""
    casts: int = 0
    """Of weights in another precision, made in the pass."""

    @property
    def peak_bytes(self) -> int:
        return sum(self.peak.values())


def hollow(model: nn.Module, fake: FakeTensorMode) -> None:
    """Replace every parameter and buffer of a model on the meta device by a fake tensor on the CPU, ties kept.

    Frozen parameters and trained ones keep their dtype.
    """
    made: dict[int, torch.Tensor] = {}

    def replaced(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            one: torch.Tensor = FakeTensor(fake, empty, torch.device("cpu"))
            made[id(tensor)] = nn.Parameter(one, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else one
        return made[id(tensor)]

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = replaced(parameter)  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = replaced(buffer)


class Tracer(TorchDispatchMode):
    """Counts what lives while it is active. `vocabulary`: width of what counts as logits."""

    def __init__(self, fake: FakeTensorMode, vocabulary: int) -> None:
        super().__init__()
        self.fake, self.vocabulary = fake, vocabulary
        self.seen = Traced()
        self.events: list[tuple[int, int]] = []
        self._live: dict[int, tuple[Kind, int, int]] = {}
        self._weights: set[int] = set()
        self._now: dict[Kind, int] = dict.fromkeys(KINDS, 0)

    def ignore(self, module: nn.Module) -> None:
        """Leave a model's own weights out of the count."""
        for tensor in [*module.parameters(), *module.buffers()]:
            key = tensor.untyped_storage()._cdata
            self._live[key] = ("activations", 0, -1)
            self._weights.add(key)

    def is_gradient(self, parameter: torch.Tensor) -> None:
        """Count a parameter's gradient as what it is."""
        if parameter.grad is None:
            return
        key = parameter.grad.untyped_storage()._cdata
        if key in self._live:
            kind, size, number = self._live[key]
            self._now[kind] -= size
            self._now["gradients"] += size
            self._live[key] = ("gradients", size, number)
            self.events.append((number, GRADIENT))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        if not any(isinstance(leaf, FakeTensor) for leaf in leaves):
            if any(isinstance(leaf, torch.Tensor) for leaf in leaves) or not _makes_floats(func, args, kwargs):
                return func(*args, **kwargs)
            with self.fake:
                made = func(*args, **kwargs)
        else:
            if func.overloadpacket in _INDEXED:
                args = (args[0], _without_masks(args[1]), *args[2:])
            args, given = tree_map_only(torch.Tensor, self._as_fake, (args, kwargs))
            kwargs = dict(given)
            made = func(*args, **kwargs)
        self._note(func, args, kwargs, made)
        return made

    def _as_fake(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.fake.from_tensor(tensor)

    def _note(self, func: Any, args: Any, kwargs: Any, made: Any) -> None:
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.seen.flops += int(count(*args, **kwargs, out_val=made))
        elif func.overloadpacket in _CPU_FLASH:
            self.seen.flops += _CPU_FLASH[func.overloadpacket](args)
        for tensor in tree_leaves(made):
            if isinstance(tensor, FakeTensor):
                self._born(tensor)
        if func.overloadpacket is torch.ops.aten._to_copy and args[0].untyped_storage()._cdata in self._weights:
            self.seen.casts += made.untyped_storage().nbytes()

    def _born(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._live or not size:
            return
        logits = tensor.ndim > 0 and tensor.shape[-1] == self.vocabulary and tensor.is_floating_point()
        kind: Kind = "logits" if logits else "activations"
        number = len(self.events)
        self._live[key] = (kind, size, number)
        self.events.append((number, size))
        weakref.finalize(storage, self._died, key)
        self._now[kind] += size
        seen, beside = self.seen, self._now["activations"] + self._now["logits"]
        seen.peak_activations = max(seen.peak_activations, beside)
        seen.logits = max(seen.logits, self._now["logits"])
        if beside + self._now["gradients"] > seen.peak_bytes:
            seen.peak = dict(self._now)

    def _died(self, key: int) -> None:
        kind, size, number = self._live.pop(key)
        self._now[kind] -= size
        self.events.append((number, 0))


_INDEXED = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_, torch.ops.aten._index_put_impl_)


def _without_masks(indices: Any) -> list[Any]:
    """Indices with each real mask as the numbers of what it selects, whose count is a shape."""
    made: list[Any] = []
    for index in indices:
        if isinstance(index, torch.Tensor) and index.dtype == torch.bool and not isinstance(index, FakeTensor):
            made += index.nonzero(as_tuple=True)
        else:
            made.append(index)
    return made


def _makes_floats(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether an operation without tensors makes a float tensor, which may be large; others decide shapes."""
    name = func.overloadpacket.__name__
    if not name.startswith(_FACTORIES):
        return False
    dtype = kwargs.get("dtype")
    if dtype is None and name.startswith(_AS_GIVEN):
        return any(isinstance(number, float) for number in args)
    return (dtype or torch.get_default_dtype()).is_floating_point


_aten = torch.ops.aten
_CPU_FLASH = {
    _aten._scaled_dot_product_flash_attention_for_cpu: lambda args: sdpa_flop_count(
        args[0].shape, args[1].shape, args[2].shape
    ),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda args: sdpa_backward_flop_count(
        args[0].shape, args[1].shape, args[2].shape, args[3].shape
    ),
}
