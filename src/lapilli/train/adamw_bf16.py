"""AdamW with its two averages held in bf16: 4 bytes of state for each trained number instead of 8.

bf16 has 8 significant bits, and the average of squared gradients moves by a thousandth of itself per step: rounded to
the nearest, it would stand still. It is rounded up or down by chance instead, so that it is right in the mean
(stochastic rounding). Weights stay in fp32, and so does all arithmetic.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import sqrt
from typing import Any

import torch
from torch.distributed.tensor import DTensor

_PIECE = 2**22
"""Numbers that are worked on at a time: the fp32 copies of a large table of words would take more than its state."""
_LOW = 16
"""Bits of fp32 that bf16 does not have."""


class AdamWBf16(torch.optim.Optimizer):
    """Decoupled weight decay (Loshchilov & Hutter 2019) as torch.optim.AdamW does it, with averages in bf16.

    Chance depends on the step and the parameter alone, so that processes that hold the same weights round alike, and a
    run that goes on repeats itself bit for bit. Parameters may be DTensors; each process works on its shards.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]] | Iterable[torch.Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        number = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                number += 1
                if parameter.grad is not None:
                    self._update(parameter, group, number)
        return loss

    def _update(self, parameter: torch.Tensor, group: dict[str, Any], number: int) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        state["step"] += 1
        step, lr, (beta1, beta2) = state["step"], group["lr"], group["betas"]
        tensors = [_local(t) for t in (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])]
        chance = torch.Generator(tensors[0].device).manual_seed((number << 32) + step)
        rate, spread = lr / (1 - beta1**step), 1 / sqrt(1 - beta2**step)
        for weight, gradient, first, second in _pieces(tensors):
            wide = gradient.float()
            mean = first.float().lerp_(wide, 1 - beta1)
            square = second.float().mul_(beta2).addcmul_(wide, wide, value=1 - beta2)
            first.copy_(_rounded(mean, chance))
            second.copy_(_rounded(square, chance))
            weight.mul_(1 - lr * group["weight_decay"])
            weight.addcdiv_(mean, square.sqrt().mul_(spread).add_(group["eps"]), value=-rate)


def _local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _pieces(tensors: Sequence[torch.Tensor]) -> Iterator[Sequence[torch.Tensor]]:
    """Views of corresponding pieces."""
    if all(tensor.is_contiguous() for tensor in tensors):
        yield from zip(*(tensor.view(-1).split(_PIECE) for tensor in tensors), strict=True)
    else:
        yield tensors


def _rounded(exact: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
    """fp32 numbers rounded to one of their two neighbours in bf16, to the nearer one more often; still as fp32."""
    bits = exact.view(torch.int32)
    noise = torch.randint(2**_LOW, bits.shape, dtype=torch.int32, device=bits.device, generator=chance)
    return noise.add_(bits).bitwise_and_(-(2**_LOW)).view(torch.float32)
