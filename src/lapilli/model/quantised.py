"""Linear layers whose weight is held in 4 or 8 bits by bitsandbytes, frozen, for adapters to train beside them (QLoRA).

A weight is quantised as `lapilli quantise` quantises it, from the numbers as they are stored. bitsandbytes is imported
where layers are made: it takes a second, and need not be installed.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import nn

Held = Literal["nf4", "int8"]
"""`nf4`: blocks of 64 numbers on the 16 quantiles of a normal distribution, the blocks' scales in 8 bits themselves
(Dettmers et al. 2023). `int8`: a scale per row (Dettmers et al. 2022)."""

BLOCK = 64
_OUTLIER = 6.0
"""LLM.int8()'s threshold: columns of activations beyond it are multiplied in full precision. CUDA only."""


def quantised_linear(
    weight: torch.Tensor, bias: torch.Tensor | None, held: Held, computed: torch.dtype, device: torch.device
) -> nn.Linear:
    """A frozen linear layer over `weight` (out, in) that computes in `computed` and lies on `device`."""
    made = (_nf4 if held == "nf4" else _int8)(weight.to(device), bias is not None, computed)
    if bias is not None:
        made.bias = nn.Parameter(bias.to(device, computed), requires_grad=False)
    return made


def mark_quantised(model: nn.Module, held: Held) -> None:
    """Tell PEFT, in the way it asks, which of its layers belong over these."""
    flags: Any = model
    flags.is_loaded_in_4bit = held == "nf4"
    flags.is_loaded_in_8bit = held == "int8"


def sharing(module: nn.Module) -> dict[int, Any]:
    """What `copy.deepcopy` is to take in a module's place, by id, so that the copy shares the module's numbers.

    Parameters become others over the same storage, so that one that is moved or set anew in a copy stays as it is in
    the others; what bitsandbytes keeps beside its weights, and buffers, are the same.
    """
    memo: dict[int, Any] = {}
    for layer in module.modules():
        for value in _beside(layer):
            memo[id(value)] = value
    memo |= {id(buffer): buffer for buffer in module.buffers()}
    return memo | {id(parameter): _alias(parameter) for parameter in module.parameters()}


def _beside(layer: nn.Module) -> list[Any]:
    """What a layer of bitsandbytes keeps outside its parameters."""
    kind = type(layer).__name__
    if kind == "Linear4bit":
        return [] if layer.quant_state is None else [layer.quant_state]
    if kind != "Linear8bitLt":
        return []
    own: Any = layer
    if own.weight.CB is not None:  # else its first call takes them from the weight, once
        own.init_8bit_state()
    return [tensor for tensor in (own.state.CB, own.state.SCB) if tensor is not None]


def _alias(parameter: nn.Parameter) -> nn.Parameter:
    """Another parameter with the same numbers, frozen."""
    kind: Any = type(parameter)
    if kind.__name__ == "Params4bit":
        made = copy.copy(parameter)
        made.module = None  # type: ignore[attr-defined]
        return made
    if kind.__name__ == "Int8Params":
        return kind(parameter.data, requires_grad=False, has_fp16_weights=False)
    return nn.Parameter(parameter.data, requires_grad=False)


def _nf4(weight: torch.Tensor, bias: bool, computed: torch.dtype) -> nn.Linear:
    import bitsandbytes.nn
    from bitsandbytes.functional import quantize_4bit

    kinds: Any = bitsandbytes.nn
    rows, columns = weight.shape
    layer = kinds.Linear4bit(columns, rows, bias=bias, compute_dtype=computed, quant_type="nf4", device="meta")
    packed, state = quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4", compress_statistics=True)
    layer.weight = kinds.Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        blocksize=BLOCK,
        compress_statistics=True,
        quant_type="nf4",
        module=layer,
        bnb_quantized=True,
    )
    layer.quant_state = state
    # On the CPU it would repack the weight for answering when first asked without gradients, and never learn again.
    layer.support_avx512bf16_for_cpu = False
    return layer


def _int8(weight: torch.Tensor, bias: bool, _computed: torch.dtype) -> nn.Linear:
    import bitsandbytes.nn
    from bitsandbytes.functional import int8_vectorwise_quant

    kinds: Any = bitsandbytes.nn
    rows, columns = weight.shape
    layer = kinds.Linear8bitLt(columns, rows, bias=bias, has_fp16_weights=False, threshold=_OUTLIER, device="meta")
    made, scales, _ = int8_vectorwise_quant(weight.to(torch.float16))
    layer.weight = kinds.Int8Params(made, requires_grad=False, has_fp16_weights=False, CB=made, SCB=scales)
    if not weight.is_cuda:
        # There it rounds activations to 8 bits too, but not while it learns: one arithmetic for both losses.
        layer.train = lambda _mode=True: layer
    return layer
