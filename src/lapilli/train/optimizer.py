"""Which parameter learns how fast, and the optimiser that does it.

Groups are those of the original trainer: matrices decay, biases and norms don't; the projector and the vision encoder
may have learning rates of their own. The schedule scales every group by the same factor.
"""

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lapilli.base.errors import RunError
from lapilli.model.freeze import part_of
from lapilli.recipe.schema import Train
from lapilli.train.adamw_bf16 import AdamWBf16

_EIGHT_BITS = "bitsandbytes::optimizer_update_8bit_blockwise"
_KEYS = {"cpu": "CPU", "cuda": "CUDA", "hpu": "HPU", "xpu": "XPU"}
"""PyTorch's names of devices where it keeps kernels."""


def state_bytes_per_parameter(train: Train) -> float:
    """Memory of the optimiser's state, in bytes for each trained number; weight and gradient come on top."""
    match train.optimizer:
        case "adamw":
            return 8.0
        case "adamw_bf16":
            return 4.0
        case "adamw_8bit":  # two bytes, and two fp32 scales for each 256 numbers; below 4,096 numbers it is in fp32
            return 2.0 + 8 / 256
        case _:
            return 4.0 if train.momentum else 0.0


def check_optimizer(train: Train, engine: str, device: torch.device) -> None:
    """Raise RunError, with the reason, for an optimiser that can't be had on this device or under this engine."""
    if train.optimizer == "adamw_bf16" and engine == "deepspeed":
        raise RunError("train.optimizer: adamw_bf16 is not for run.engine: deepspeed; use adamw, or another engine")
    if train.optimizer != "adamw_8bit":
        return
    if engine not in ("single", "ddp"):
        raise RunError(
            f"train.optimizer: adamw_8bit scales blocks of whole weights, and run.engine: {engine} splits them; use "
            "adamw_bf16 or adamw, or run.engine: ddp"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RunError(
            "train.optimizer: adamw_8bit needs bitsandbytes, which is not installed: pip install 'lapilli[quantise]'"
        )
    import bitsandbytes

    key = _KEYS.get(device.type)
    if key is None or not torch._C._dispatch_has_kernel_for_dispatch_key(_EIGHT_BITS, key):
        raise RunError(
            f"train.optimizer: adamw_8bit: bitsandbytes {bitsandbytes.__version__} has no such optimiser for "
            f"{device.type}; install a newer one, or use adamw_bf16"
        )


@dataclass
class ParameterGroup:
    """Parameters that share learning rate and weight decay."""

    name: str
    learning_rate: float
    weight_decay: float
    names: list[str] = field(default_factory=list)
    parameters: list[nn.Parameter] = field(default_factory=list)

    @property
    def numel(self) -> int:
        return sum(p.numel() for p in self.parameters)


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay applies: not to vectors (norms, newlines) and nothing called bias."""
    return parameter.ndim > 1 and "bias" not in name


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], train: Train) -> list[ParameterGroup]:
    """Sort the trainable parameters into groups, two (decay, no decay) per learning rate; a group may be empty.

    Parts without a learning rate of their own share the first two groups.
    """
    own = {"projector": train.projector_learning_rate, "vision_encoder": train.vision_learning_rate}
    rates = {"model": train.learning_rate, **{part: rate for part, rate in own.items() if rate is not None}}
    groups = {
        (part, decay): ParameterGroup(
            f"{part}, {'decay' if decay else 'no decay'}", rate, train.weight_decay if decay else 0.0
        )
        for part, rate in rates.items()
        for decay in (True, False)
    }
    for name, parameter in named:
        if parameter.requires_grad:
            part = part_of(name)
            group = groups[part if part in rates else "model", decays(name, parameter)]
            group.names.append(name)
            group.parameters.append(parameter)
    return list(groups.values())


def build_optimizer(groups: Iterable[ParameterGroup], train: Train) -> torch.optim.Optimizer:
    """Return the optimiser over the groups that hold something.

    `fused` updates all moments in one pass over memory; its arithmetic is per element, so it is repeatable bit for bit.
    """
    filled = [
        {"params": g.parameters, "lr": g.learning_rate, "weight_decay": g.weight_decay, "peak": g.learning_rate}
        for g in groups
        if g.parameters
    ]
    if train.optimizer == "sgd":
        return torch.optim.SGD(filled, lr=train.learning_rate, momentum=train.momentum)
    how: dict[str, Any] = {"lr": train.learning_rate, "betas": train.betas, "eps": train.eps}
    if train.optimizer == "adamw_bf16":
        return AdamWBf16(filled, **how)
    if train.optimizer == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(filled, **how)
    fused = all(p.dtype == torch.float32 for group in filled for p in group["params"])
    return torch.optim.AdamW(filled, **how, fused=fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Scale every group's peak learning rate by `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
