"""Linear layers whose weight is held in 4 or 8 bits by bitsandbytes, frozen, for adapters to train beside them (QLoRA).

A weight is quantised as `lapilli quantise` quantises it, from the numbers as they are stored. bitsandbytes is imported
where layers are made: it takes a second, and need not be installed.
"""

from __future__ import annotations

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
