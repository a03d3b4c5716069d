"""How many numbers a parameter stands for, and as what it is held: quantised ones are packed and look smaller.

Read from the parameter itself, so that nothing of bitsandbytes is imported where nothing is quantised.
"""

import torch

_SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


def short(dtype: torch.dtype) -> str:
    """`bf16` for torch.bfloat16."""
    return _SHORT.get(dtype, str(dtype).removeprefix("torch."))


def numel(parameter: torch.Tensor) -> int:
    """Numbers of the weight, whether packed or not."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else torch.Size(state.shape).numel()


def held_as(parameter: torch.Tensor) -> str:
    """`fp32`, `bf16`, `int8`, `nf4`."""
    state = getattr(parameter, "quant_state", None)
    return short(parameter.dtype) if state is None else str(state.quant_type)


def held_bytes(parameter: torch.Tensor) -> int:
    """Bytes of the weight with what is needed to read it: scales of blocks or rows. None on the meta device."""
    if parameter.is_meta:
        return 0
    tensors = [parameter.data]
    state = getattr(parameter, "quant_state", None)
    while state is not None:  # the scales of NF4 are quantised again
        tensors.append(state.absmax)
        state = state.state2
    scales = getattr(parameter, "SCB", None)
    return sum(t.numel() * t.element_size() for t in [*tensors, *([] if scales is None else [scales])])
