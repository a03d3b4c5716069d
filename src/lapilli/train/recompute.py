"""What is kept for the backward pass, what is computed again in it, and layers that are compiled.

`full` keeps a layer's input and computes all of the layer again. `selective` keeps what matrix products, convolutions
and attention made, and computes the cheap rest again: norms, activations, rotations, sums. Compiled layers choose for
themselves what is cheap enough to compute again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lapilli.base.errors import ModelError, RunError
from lapilli.model.vision import find_layers, resolve_layers
from lapilli.model.vlm import VisionLanguageModel
from lapilli.recipe.schema import Stage
from lapilli.train.device.choose import Device

_DEAR = frozenset(
    {
        "aten::mm", "aten::addmm", "aten::linear", "aten::mkldnn_linear", "aten::convolution",
        "torch_attn::_varlen_attn", "bitsandbytes::gemm_4bit", "bitsandbytes::int8_scaled_mm",
    }
)  # fmt: skip
"""Operations whose results `selective` keeps. Not bmm: in attention written out its result is every pair of tokens."""
_ATTENTION = "aten::_scaled_dot_product_"


def keep_for_backward(model: VisionLanguageModel, mode: str) -> None:
    """Let the layers of the parts that train keep less, as `train.gradient_checkpointing` says.

    Raises RunError for a model whose layers can't be run again.
    """
    if mode == "none":
        return
    how: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        how["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    for part in (model.language_model, model.vision_encoder):
        if part.training:
            _recompute_layers(part, how)


def _policy(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    name = operation.name().partition(".")[0]
    if name in _DEAR or name.startswith(_ATTENTION):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _recompute_layers(part: Any, how: dict[str, Any]) -> None:
    # Renamed in transformers 5; the older name warns.
    enable = getattr(part, "activation_checkpointing_enable", None) or part.gradient_checkpointing_enable
    try:
        enable(how)
    except ValueError as error:
        raise RunError(f"train.gradient_checkpointing: {type(part).__name__} can't do it; use none") from error


# ---- compiled layers --------------------------------------------------------------------------------------------


def check_compile(stage: Stage, engine: str) -> None:
    """Raise RunError for settings that don't go with `run.compile`."""
    if not stage.run.compile:
        return
    if stage.run.deterministic:
        raise RunError(
            "run.compile with run.deterministic: how a kernel is compiled depends on the lengths seen first, so that a "
            "run that goes on would not repeat bit for bit; leave one of them out"
        )
    if stage.train.gradient_checkpointing == "selective":
        raise RunError(
            "run.compile with train.gradient_checkpointing: selective: the compiler itself computes again what is "
            "cheap; use none or full"
        )
    if stage.train.lora is not None and stage.train.lora.quantise is not None:
        raise RunError("run.compile with train.lora.quantise: bitsandbytes' layers can't be compiled; use one of them")
    if engine == "deepspeed":
        raise RunError("run.compile with run.engine: deepspeed is not tested; use single, ddp or fsdp")


def compile_layers(model: VisionLanguageModel, device: Device) -> int:
    """Compile every layer that runs, one program for all of a part's layers and all lengths; return their number.

    (On a device that needs fixed shapes, a program for each of them.)
    A layer's first call runs uncompiled, so that what it multiplies can be watched. Attention over packed sequences
    stays as it is, and so does a language model that does not train at the time (it may be generating). Raises
    RunError where nothing can be compiled, as without a C++ compiler, and for a model without a plain list of layers.
    """
    options = device.compile_options()
    _try(device.device, options)
    language, vision = _layers(model.language_model), _layers(model.vision_encoder)
    vision = vision[: max(resolve_layers(model.config.feature_layers, len(vision)))]
    for layers, always in ((language, False), (vision, True)):
        compiled = torch.compile(_run, **options)
        for layer in layers:
            _Compiled(layer, compiled, always=always).install()
    return len(language) + len(vision)


class _Compiled:
    """One layer's forward pass: compiled, and run again in the backward pass where the layer was told so."""

    def __init__(self, layer: Any, compiled: Callable[..., Any], *, always: bool) -> None:
        self._layer, self._compiled, self._always = layer, compiled, always
        self._again = bool(getattr(layer, "gradient_checkpointing", False))
        self._plain = layer.forward
        self._called = False

    def install(self) -> None:
        """Take the place of the layer's own forward pass."""
        self._layer.gradient_checkpointing = False  # else it would be run again inside of what is compiled
        self._layer.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = self._run if self._called and (self._always or self._layer.training) else self._plain
        self._called = True
        if self._again and self._layer.training:
            return checkpoint(run, *args, use_reentrant=False, **kwargs)
        return run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        return self._compiled(self._layer, *args, **kwargs)


def _run(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(layer).forward(layer, *args, **kwargs)


def _layers(part: Any) -> list[nn.Module]:
    try:
        return list(find_layers(part))
    except ModelError as error:
        raise RunError(f"run.compile: {type(part).__name__} has no plain list of layers; leave it out") from error


def _try(device: torch.device, options: dict[str, Any]) -> None:
    """Compile something small, because what is needed for it differs between devices and PyTorch's versions."""
    try:
        torch.compile(lambda x: torch.sin(x) + 1, **options)(torch.ones(8, device=device))
    except (RuntimeError, OSError, ImportError) as error:
        said = " ".join(str(error).strip().splitlines()[:2])
        raise RunError(
            f"run.compile: nothing can be compiled for {device.type} here; it needs a C++ compiler (g++ or $CXX) with "
            f"Python's headers, and Triton for CUDA. {type(error).__name__}: {said}"
        ) from error
