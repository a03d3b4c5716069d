"""The weights split over all processes (PyTorch's FSDP2), gathered layer by layer where they are computed with.

Each process holds its rows of every trained weight, of its gradient and of the optimiser's state. The layers of the
language model, and of the vision encoder where it trains, are units: gathered together before they run, let go after.
Everything else (embeddings, output layer, projector) is one more unit, which stays gathered from the beginning of a
pass to its end. Gradients are summed, because a step's loss is normalised over all processes before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from lapilli.base.errors import ModelError, RunError
from lapilli.model.vision import find_layers
from lapilli.model.vlm import VisionLanguageModel
from lapilli.recipe.schema import Run, Stage
from lapilli.train.loss import LossModule
from lapilli.train.parallel.lockstep import Lockstep
from lapilli.train.parallel.world import World

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def check_fsdp(stage: Stage, world: World) -> None:
    """Raise RunError for settings that this PyTorch or this number of processes can't have."""
    if not hasattr(FSDPModule, "reset_iter_state"):
        raise RunError(f"run.engine: fsdp needs PyTorch 2.13 or newer, and this is {torch.__version__}; update it")
    if world.size == 1:
        raise RunError(
            "run.engine: fsdp splits weights over several processes, and one was started; start more with torchrun, "
            "or use auto"
        )
    reshard = stage.run.fsdp.reshard
    if not isinstance(reshard, bool) and (reshard == 1 or reshard >= world.size or world.size % reshard):
        raise RunError(
            f"run.fsdp.reshard: {reshard} processes can't share the weights between forward and backward pass: give a "
            f"part of {world.size}, as the number of processes of one machine, or true or false"
        )
    if not isinstance(reshard, bool) and stage.train.evaluate:
        raise RunError(
            f"run.fsdp.reshard: {reshard}: the model can't be gathered for train.evaluate then; use true or false"
        )


class Fsdp(Lockstep):
    """Each process has its rows of the weights. All of them start from the first one's trained weights."""

    name = "fsdp"

    def __init__(self, module: LossModule, world: World, run: Run, device: torch.device) -> None:
        super().__init__(module, world)
        self.device, self._reshard = device, run.fsdp.reshard
        whole = unsplit(module.model, run)
        layers = [layer for layer in _layers(module.model) if not whole.issuperset(layer.parameters())]
        with self.passing():  # weights are sent
            self._split(module, layers, whole, run)
        self.units: list[FSDPModule] = [m for m in module.modules() if isinstance(m, FSDPModule)]
        """The root first, then the layers in order."""
        for unit in self.units:
            # A sum, which Gloo knows too: a step's loss is normalised over all processes before.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
        for part in module.modules():
            # Else transformers' `generate` waits for all processes, where the first one asks the model by itself. It
            # is a note to the compiler, which does not compile what is split here.
            part._is_fsdp_managed_module = False  # type: ignore[assignment]
        self._trained = [(name, p) for name, p in module.model.named_parameters() if p.requires_grad]

    def _split(self, module: LossModule, layers: Sequence[nn.Module], whole: set[nn.Parameter], run: Run) -> None:
        options: dict[str, Any] = {
            "mesh": init_device_mesh(self.device.type, (self.world.size,)),
            "mp_policy": _precision(run),
            "ignored_params": whole,
        }
        if run.fsdp.offload:
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
        for layer in layers:
            layer.to(self.device)
            self._share(layer)
            fully_shard(layer, **options, reshard_after_forward=self._reshard)
        _move_rest(module, self.device, set(layers))
        self._share(module)
        fully_shard(module, **options)

    def _share(self, module: nn.Module) -> None:
        with torch.no_grad():
            trained = (p for p in module.parameters() if p.requires_grad and not isinstance(p, DTensor))
            self.world.share(p.data for p in trained)

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trainable parameters, DTensors of which this process has its rows, under their canonical names."""
        return iter(self._trained)

    def finite_gradients(self, optimizer: torch.optim.Optimizer) -> bool:
        return all(bool(_local(p.grad).isfinite().all()) for _, p in self.trained() if p.grad is not None)

    def gradient_norm(self, parameters: list[nn.Parameter]) -> torch.Tensor:
        rows = [_local(p.grad) for p in parameters if p.grad is not None]
        square = nn.utils.get_total_norm(rows).square()
        self.world.add_up([square])
        return square.sqrt()

    def clip(self, parameters: list[nn.Parameter], max_norm: float, norm: torch.Tensor) -> None:
        gradients = [_local(p.grad) for p in parameters if p.grad is not None]
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils does it for whole gradients
        for gradient in gradients:
            gradient.mul_(factor.to(gradient.device))

    def resting(self) -> None:
        # Also forgets the order of these passes, from which the next backward pass would fetch weights ahead.
        self.units[0].reset_iter_state()

    @contextmanager
    def whole_model(self) -> Iterator[None]:
        root: Any = self.units[0]
        with self.passing():
            # Else, before a run's first pass, the layer that runs first would take itself for the root.
            root._get_fsdp_state()._lazy_init()
            for unit in self.units:
                unit.unshard()
                if not self.world.first:
                    unit.reshard()
        self._keep_gathered(True)
        try:
            yield
        finally:
            self._keep_gathered(False)
            self.resting()

    def _keep_gathered(self, keep: bool) -> None:
        for unit in self.units[1:]:
            unit.set_reshard_after_forward(self._reshard is True and not keep, recurse=False)

    def collect(self) -> None:
        model = self._model
        shards = {id(p): p for p in model.parameters() if isinstance(p, DTensor)}
        whole: dict[int, nn.Parameter] = {}
        with self.passing(), torch.no_grad():
            for key, shard in shards.items():
                moved: Any = shard.to(self.device)
                tensor = moved.full_tensor()
                if self.world.first:
                    whole[key] = nn.Parameter(tensor.cpu(), shard.requires_grad)
        if not self.world.first:
            return
        for unit in self.units:
            _forget(unit)
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if id(parameter) in whole:
                    module._parameters[name] = whole[id(parameter)]
        model.to("cpu")  # type: ignore[arg-type]


def unsplit(model: VisionLanguageModel, run: Run) -> set[nn.Parameter]:
    """The parameters that every process keeps whole: frozen ones, unless they are split too, and frozen numbers."""
    single = [name for name, p in model.named_parameters() if p.requires_grad and p.ndim == 0]
    if single:
        raise RunError(f"run.engine: fsdp can't split {single[0]}, a single number; freeze it, or use ddp")
    return {p for p in model.parameters() if p.ndim == 0 or (not p.requires_grad and run.fsdp.frozen == "replicate")}


def _precision(run: Run) -> MixedPrecisionPolicy:
    """Weights are gathered in what is computed with; gradients are summed in `run.fsdp.reduce`."""
    computed = None if run.precision == "fp32" else torch.bfloat16
    # Autocast decides about inputs, as in every other engine.
    return MixedPrecisionPolicy(computed, _DTYPES[run.fsdp.reduce], cast_forward_inputs=False)


def _layers(model: VisionLanguageModel) -> list[nn.Module]:
    try:
        return [layer for part in (model.vision_encoder, model.language_model) for layer in find_layers(part)]
    except ModelError as error:
        raise RunError(
            f"run.engine: fsdp gathers weights layer by layer, and {type(model.language_model).__name__} has no plain "
            "list of layers; use ddp or deepspeed"
        ) from error


def _move_rest(module: nn.Module, device: torch.device, layers: set[nn.Module]) -> None:
    """Move what is in none of the layers, which are there already or lie on the CPU for good."""
    if layers.isdisjoint(module.modules()):
        module.to(device)
    elif module not in layers:
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            tensor.data = tensor.data.to(device)
        for child in module.children():
            _move_rest(child, device, layers)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's rows."""
    assert isinstance(tensor, DTensor)
    return tensor.to_local()


def _forget(unit: Any) -> None:
    """Make a unit the module that it was, so that whole weights can be put into it; it can't run any more."""
    unit.__class__ = type(unit).__bases__[1]
