"""In what a run computes: where weights are held in which type, which attention kernel, TF32; and whether it is so.

Asking for bf16 does not make a model compute in it: a layer may leave autocast, an engine may cast otherwise. So the
multiplications of the first step are watched, below autocast and below every wrapper, and what they really
multiplied is printed beside what was asked. A part whose very first one is of another type ends the run before any
weight has changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from lapilli.base.errors import RunError
from lapilli.model.attention import Kernel
from lapilli.model.freeze import part_of
from lapilli.model.held import short
from lapilli.model.language import native_attention, use_attention
from lapilli.model.vlm import VisionLanguageModel
from lapilli.recipe.schema import Run
from lapilli.train.device.choose import Device

Say = Callable[[str], None]

_PROMISED = {"fp32": torch.float32, "bf16": torch.bfloat16}
_MULTIPLIES = (
    "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::convolution",
    "aten::mkldnn_linear", "bitsandbytes::",
)  # fmt: skip
_NAMED = 3
"""Layers that a warning names."""


def settle(model: VisionLanguageModel, run: Run, device: Device, say: Say) -> None:
    """Move the model to its device, each weight in the precision it is held in, and choose kernels.

    Frozen weights are held in what they are computed in, trained ones in fp32. Raises RunError for an attention kernel
    that the run can't use.
    """
    choose_attention(model, run, device)
    computed = _PROMISED[run.precision]
    for parameter in model.parameters():
        if not parameter.dtype.is_floating_point:
            continue  # quantised
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else computed)
    if run.engine not in ("fsdp", "deepspeed"):  # which move and split it part by part
        model.to(device.device)  # type: ignore[arg-type]
    said = device.use_tf32(run.tf32)
    if said:
        say(said)


def choose_attention(model: VisionLanguageModel, run: Run, device: Device) -> None:
    """Let every layer use `run.attention`. Raises RunError, with the reason, where it can't be used."""
    kernel: Kernel = run.attention
    if kernel == "flash_attention_2":
        why = _why_no_flash(model, run, device)
        if why:
            raise RunError(f"run.attention: flash_attention_2 {why}; use auto, which takes it where it can be used")
    for part in (model.vision_encoder, model.language_model):
        if kernel == "sdpa" and native_attention(part) != "sdpa":
            raise RunError(f"run.attention: sdpa: {type(part).__name__} has no such attention; use auto or eager")
    model.attention_kernel = kernel
    if kernel in ("sdpa", "eager"):
        vision: PreTrainedModel = model.vision_encoder
        use_attention(vision, kernel)


def _why_no_flash(model: VisionLanguageModel, run: Run, device: Device) -> str:
    if device.device.type != "cuda":
        return f"is a kernel for CUDA, and this run is on {device.device.type}"
    if run.precision != "bf16":
        return f"computes in half precision, and run.precision is {run.precision}"
    if model.config.packing != "varlen":
        return f"needs packed sequences, and {type(model.language_model).__name__} is fed padded ones"
    return ""


# ---- what is really multiplied ----------------------------------------------------------------------------------


class _FirstProduct(TorchDispatchMode):
    """Notes the types of the first matrix product inside the context."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: tuple[torch.dtype, ...] = ()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.dtypes and func.name().startswith(_MULTIPLIES):
            self.dtypes = tuple(a.dtype for a in args if isinstance(a, torch.Tensor))
        return func(*args, **(kwargs or {}))


@dataclass
class _Seen:
    """What one part multiplied: its layers by type, the first one, and those that are not as promised."""

    first: str = ""
    layers: Counter[str] = field(default_factory=Counter)
    others: list[str] = field(default_factory=list)


class Audit:
    """Watches every layer with a matrix the first time it runs. Raises RunError, from the forward pass, as told above.

    Layers are watched one by one and let go at once, so that nothing is left to slow a run down.
    """

    def __init__(self, model: VisionLanguageModel, precision: str) -> None:
        self._precision = precision
        self._seen: dict[str, _Seen] = {}
        self._waiting: dict[str, list[RemovableHandle]] = {}
        for name, module in model.named_modules():
            if _has_matrix(module):
                self._watch(name, module)

    def _watch(self, name: str, module: nn.Module) -> None:
        mode = _FirstProduct()

        def before(_module: nn.Module, _args: Any) -> None:
            mode.__enter__()

        def after(module: nn.Module, _args: Any, _output: Any) -> None:
            mode.__exit__(None, None, None)
            for handle in self._waiting.pop(name, ()):
                handle.remove()
            self._note(name, module, mode.dtypes)

        self._waiting[name] = [
            module.register_forward_pre_hook(before),
            module.register_forward_hook(after, always_call=True),
        ]

    def _note(self, name: str, module: nn.Module, dtypes: tuple[torch.dtype, ...]) -> None:
        if not dtypes:
            return
        part = part_of(name)
        promised = _PROMISED[self._precision]
        packed = any(not dtype.is_floating_point for dtype in dtypes)
        right = packed or set(dtypes) == {promised}
        kinds = " x ".join(dict.fromkeys(short(dtype) for dtype in dtypes[-2:]))
        seen = self._seen.setdefault(part, _Seen())
        seen.layers[kinds] += 1
        if not right:
            seen.others.append(name)
        if not seen.first:
            seen.first = f"{kinds} ({name})"
            if not right:
                raise RunError(
                    f"run.precision is {self._precision}, but the first matrix product of the {part}, in {name} "
                    f"({type(module).__name__}), is in {kinds}: its code, or the engine, does not compute as asked (no "
                    f"weight was changed); use another run.precision or engine"
                )

    def lines(self) -> list[str]:
        """What was seen since the last call, and a warning for each part with layers of another type."""
        made = []
        for part, seen in self._seen.items():
            counted = ", ".join(f"{count} in {kinds}" for kinds, count in seen.layers.items())
            made.append(f"computed: {part}: first matrix product {seen.first}; layers: {counted}")
            if seen.others:
                names = ", ".join(seen.others[:_NAMED]) + (", ..." if len(seen.others) > _NAMED else "")
                made.append(
                    f"warning: {len(seen.others)} layers of the {part} do not compute in {self._precision}: {names}"
                )
        self._seen = {}
        return made


def _has_matrix(module: nn.Module) -> bool:
    """Whether this is a layer that multiplies by a weight: linear, convolution, whoever wrote it."""
    if next(module.children(), None) is not None or isinstance(module, nn.Embedding):
        return False
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and (weight.ndim > 1 or getattr(weight, "quant_state", None) is not None)
