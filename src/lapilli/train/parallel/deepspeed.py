"""DeepSpeed's ZeRO: the optimiser's state (1), gradients (2) and weights (3) split over all processes.

DeepSpeed averages gradients over processes and counts passes; lapilli normalises a step's loss over all processes and
says which pass is the last, so that the loss is multiplied by the number of processes and nothing is left to
DeepSpeed's counting. The optimiser is lapilli's own, over DeepSpeed's flat partitions. In bf16, weights are held and
sent in bf16 beside split fp32 ones, which learn; checkpoints hold the fp32 ones, whole, under canonical names.
"""

from __future__ import annotations

import io
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lapilli.base.errors import RunError
from lapilli.data.sample import Batch
from lapilli.model.freeze import part_of
from lapilli.recipe.schema import Run, Train
from lapilli.train.device.choose import back_ends
from lapilli.train.loss import LossModule
from lapilli.train.optimizer import build_optimizer, parameter_groups
from lapilli.train.parallel.deepspeed_json import DeepSpeedSettings, deepspeed_settings
from lapilli.train.parallel.lockstep import Lockstep
from lapilli.train.parallel.world import World
from lapilli.train.tensors import Saved

_EXPECTED = ("Setting accelerator to", "ZeRO with an untested optimizer", "OVERFLOW! Skipping step")
"""Words of DeepSpeed's warnings about what lapilli does on purpose, or says itself."""


def check_deepspeed(train: Train, run: Run, processes: int, device: str) -> tuple[str, ...]:
    """Return lines about a DeepSpeed JSON's keys. Raises RunError without DeepSpeed, RecipeError for a wrong file."""
    if find_spec("deepspeed") is None:
        raise RunError("run.engine: deepspeed: DeepSpeed is not installed; pip install 'lapilli[deepspeed]'")
    return deepspeed_settings(train, run, processes, device).notes


@dataclass(frozen=True)
class _Piece:
    """The part of one weight that this process updates: `size` numbers from `start` of the flat partition `flat`,
    which are those from `place` of the weight.
    """

    flat: torch.Tensor
    start: int = 0
    place: int = 0
    size: int = 0

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """The same part of what is laid out as the partition is."""
        return flat.detach().narrow(0, self.start, self.size)


class DeepSpeed(Lockstep):
    """ZeRO of the recipe's stage. `optimizer` makes it ready."""

    name = "deepspeed"
    gathers = True

    def __init__(self, module: LossModule, world: World, run: Run, device: torch.device) -> None:
        super().__init__(module, world)
        self._run, self._device, self._loss = run, device, module
        self._pictures_train = any(part_of(n) in ("projector", "vision_encoder") for n, _ in self.trained())
        self._passes = self._done = 0
        self._stepping = False
        self._group_of: dict[str, int] = {}
        self.engine: Any = None
        """DeepSpeed's own engine."""
        self.settings: DeepSpeedSettings | None = None

    @property
    def zero(self) -> Any:
        """DeepSpeed's optimiser, which holds the partitions."""
        return self.engine.optimizer

    @property
    def splits_weights(self) -> bool:
        """Whether this is ZeRO-3."""
        return self.settings is not None and self.settings.stage == 3

    # ---- passes and steps -------------------------------------------------------------------------------------------

    def optimizer(self, train: Train) -> torch.optim.Optimizer:
        groups = [group for group in parameter_groups(self.trained(), train) if group.parameters]
        self._group_of = {name: number for number, group in enumerate(groups) for name in group.names}
        base = build_optimizer(groups, train)
        step = base.step
        base.step = lambda closure=None: self._step(step)  # type: ignore[method-assign]
        self.settings = deepspeed_settings(train, self._run, self.world.size, self._device.type)
        width = self._model.hidden_size
        exact = self._cast()
        with self.passing():
            self.engine = _initialise(self._loss, base, self.settings.sized(width), self.settings, self._device)
            self.module = _WithoutAutocast(self.engine, self._device.type)
            for name, parameter in self.trained():
                if name in exact:
                    self._put(name, parameter, exact.pop(name))
        self._stepping = True
        return base

    def _cast(self) -> dict[str, torch.Tensor]:
        """Hold trained weights in what is computed with; return them as they were, where that loses something."""
        exact: dict[str, torch.Tensor] = {}
        if self._run.precision == "bf16":
            for name, parameter in self.trained():
                exact[name] = parameter.data
                parameter.data = parameter.data.to(torch.bfloat16)
        return exact

    def level(self, batches: Sequence[Batch]) -> list[tuple[Batch, bool | None]]:
        """As all engines of split weights; and every trained weight gets a gradient in every pass.

        DeepSpeed keeps what a weight without one had in the step before.
        """
        passes = super().level(batches)
        if not torch.is_grad_enabled():
            return passes
        self._passes, self._done = len(passes), 0
        return [(batch, self._pictures_train or pictures) for batch, pictures in passes]

    def backward(self, loss: torch.Tensor) -> None:
        self._done += 1
        self.engine.set_gradient_accumulation_boundary(self._done == self._passes)
        self.engine.backward(loss * self.world.size, scale_wrt_gas=False)

    def clear(self, optimizer: torch.optim.Optimizer) -> None:
        if self._done:  # passes without an update
            self.finite_gradients(optimizer)

    def finite_gradients(self, optimizer: torch.optim.Optimizer) -> bool:
        """As all engines, of all processes' gradients; they are then forgotten, as DeepSpeed does when it steps."""
        self._stepping = False
        norm = self.update(optimizer, None)
        self._stepping = True
        return math.isfinite(norm)

    def update(self, optimizer: torch.optim.Optimizer, max_norm: float | None) -> float:
        self.zero.clip_grad = max_norm or 0.0
        with self.passing():
            self.engine.step()
        self._done = 0
        return self._norm()

    def _norm(self) -> float:
        norm = float(self.zero._global_grad_norm)
        return norm if norm >= 0 else math.inf  # its mark of a norm that is no number

    def _step(self, step: Callable[[], Any]) -> None:
        """Step the flat partitions, unless the gradients are to be forgotten or are not finite.

        Some versions of DeepSpeed check the latter themselves, some only in fp16.
        """
        if self._stepping and math.isfinite(self._norm()):
            step()

    def resting(self) -> None:
        if self.splits_weights:
            self.engine.empty_partition_cache()

    # ---- weights and states -----------------------------------------------------------------------------------------

    def _piece(self, name: str, parameter: nn.Parameter) -> _Piece:
        zero: Any = self.zero
        split: Any = parameter
        if self.splits_weights:
            group, start, size = zero.grad_position[zero.get_param_id(parameter)]
            place = size * self.world.rank
            here = max(0, min(size, split.ds_numel - place))  # the last partition is filled up
            return _Piece(zero.fp32_partitioned_groups_flat[group], start, place if here else 0, here)
        flats = getattr(zero, "single_partition_of_fp32_groups", None) or zero.fp32_groups_flat_partition
        flat, mapping = flats[self._group_of[name]], split._hp_mapping
        if mapping is None:
            return _Piece(flat)
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        return _Piece(flat, here.start, there.start, here.numel)

    def _gather(self, parameter: nn.Parameter, piece: _Piece, flat: torch.Tensor) -> torch.Tensor:
        """The whole of what has `piece` here. All processes call it."""
        shape = _shape(parameter)
        whole = torch.zeros(shape.numel(), dtype=flat.dtype, device=self._device)
        whole.narrow(0, piece.place, piece.size).copy_(piece.of(flat))
        self.world.add_up([whole])
        return whole.view(shape)

    def _put(self, name: str, parameter: nn.Parameter, value: torch.Tensor, flat: torch.Tensor | None = None) -> None:
        """Put the part of `value` that this process updates into its partition, or into `flat`, laid out alike."""
        piece = self._piece(name, parameter)
        into = piece.of(piece.flat if flat is None else flat)
        into.copy_(value.reshape(-1).narrow(0, piece.place, piece.size))

    def state(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, str, torch.Tensor]]:
        with torch.no_grad():
            for name, parameter in self.trained():
                piece = self._piece(name, parameter)
                yield "weights", name, self._gather(parameter, piece, piece.flat)
            for name, parameter in self.trained():
                piece = self._piece(name, parameter)
                for key, value in optimizer.state.get(piece.flat, {}).items():
                    if isinstance(value, torch.Tensor):
                        flat = value.shape == piece.flat.shape
                        yield "optimizer", f"{name}.{key}", self._gather(parameter, piece, value) if flat else value

    def learning(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The flat partitions, in fp32."""
        flats = {id(flat): flat for flat in (self._piece(name, one).flat for name, one in self.trained())}
        return ((f"flat {number}", flat.detach()) for number, flat in enumerate(flats.values()))

    def state_of(self, kind: str, values: dict[str, torch.Tensor]) -> Iterator[tuple[str, str, torch.Tensor]]:
        for name, parameter, piece, laid_out in self._pieces_of(values):
            yield kind, name, self._gather(parameter, piece, laid_out)

    def load_values(self, saved: Saved, kind: str, values: dict[str, torch.Tensor]) -> None:
        _check_names(saved, kind, dict(self.trained()))
        for name, parameter, _, laid_out in self._pieces_of(values):
            self._put(name, parameter, saved.whole(kind, name), laid_out)

    def _pieces_of(self, values: dict[str, torch.Tensor]) -> Iterator[tuple[str, nn.Parameter, _Piece, torch.Tensor]]:
        """Each trained weight with its piece, and which of `values`, laid out as `learning`, the piece is cut from."""
        numbers: dict[int, int] = {}
        for name, parameter in self.trained():
            piece = self._piece(name, parameter)
            number = numbers.setdefault(id(piece.flat), len(numbers))
            yield name, parameter, piece, values[f"flat {number}"]

    def load_weights(self, saved: Saved, kind: str = "weights") -> None:
        trained = dict(self.trained())
        _check_names(saved, kind, trained)
        with self.passing(), torch.no_grad():
            for name, parameter in trained.items():
                value = saved.whole(kind, name)
                self._show(parameter, value)
                self._put(name, parameter, value)

    def _show(self, parameter: nn.Parameter, value: torch.Tensor) -> None:
        """Replace a weight as the model has it."""
        if not self.splits_weights:
            parameter.data.copy_(value)
            return
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter], modifier_rank=0):
            if self.world.first:
                parameter.data.copy_(value)

    def load_state(self, saved: Saved, optimizer: torch.optim.Optimizer) -> None:
        self.load_weights(saved)
        trained = dict(self.trained())
        for full, known in saved.known("optimizer").items():
            name, _, key = full.rpartition(".")
            if name not in trained:
                raise RunError(f"{saved.folder}: optimiser tensor {full} belongs to no trained weight")
            parameter, value = trained[name], saved.whole("optimizer", full)
            flat = self._piece(name, parameter).flat
            state: dict[str, Any] = optimizer.state[flat]
            if known.shape == _shape(parameter) and known.shape:
                held = state.setdefault(key, torch.zeros_like(flat.detach(), dtype=known.dtype))
                self._put(name, parameter, value, held)
            else:  # a counter, of which there is one for all
                state[key] = value.to(flat.device) if optimizer.defaults.get("fused") else value

    def whole_model(self) -> AbstractContextManager[None]:
        if not self.splits_weights:
            return nullcontext()
        from deepspeed.runtime.zero.stage3 import unwrap_model_for_generation

        return unwrap_model_for_generation(self.engine)

    def collect(self) -> None:
        whole: dict[int, nn.Parameter] = {}
        with self.passing(), torch.no_grad():
            for name, parameter in self._model.named_parameters():
                tensor = self._collected(name, parameter)
                if self.world.first and tensor is not None:
                    whole[id(parameter)] = nn.Parameter(tensor.cpu(), parameter.requires_grad)
        if not self.world.first:
            return
        if self.splits_weights:
            offload = self.zero.parameter_offload
            for hook in (*offload.forward_hooks, *offload.backward_hooks):
                hook.remove()
        for module in self._model.modules():
            module._parameters = {
                name: parameter if parameter is None else whole.get(id(parameter), parameter)
                for name, parameter in module._parameters.items()
            }
        self._model.to("cpu")  # type: ignore[arg-type]

    def _collected(self, name: str, parameter: nn.Parameter) -> torch.Tensor | None:
        """The whole of a weight that is split, in fp32 if it is trained; None if it stands here whole."""
        if parameter.requires_grad:
            piece = self._piece(name, parameter)
            return self._gather(parameter, piece, piece.flat)
        if not self.splits_weights:
            return None
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter]):
            return parameter.data.to("cpu", copy=True)


class _WithoutAutocast(nn.Module):
    """DeepSpeed casts weights, not inputs of operations; doing both would compute in other precisions than asked."""

    def __init__(self, engine: nn.Module, kind: str) -> None:
        super().__init__()
        self.engine, self._kind = engine, kind

    def forward(self, *arguments: Any) -> torch.Tensor:
        with torch.autocast(self._kind, enabled=False):
            return self.engine(*arguments)


def _shape(parameter: Any) -> torch.Size:
    """The shape of a weight, split or not."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _check_names(saved: Saved, kind: str, trained: dict[str, nn.Parameter]) -> None:
    """Raise RunError where a checkpoint's names or shapes are others."""
    known = saved.known(kind)
    for name, found in known.items():
        if name not in trained:
            raise RunError(
                f"{saved.folder}: weight {name} {tuple(found.shape)} does not fit this run's model, which trains none"
            )
        if found.shape != _shape(trained[name]):
            raise RunError(
                f"{saved.folder}: {name} {tuple(found.shape)} in {kind} does not fit this run's model, which has "
                f"{tuple(_shape(trained[name]))}"
            )


def _initialise(
    module: LossModule,
    optimizer: torch.optim.Optimizer,
    config: dict[str, Any],
    settings: DeepSpeedSettings,
    device: torch.device,
) -> Any:
    """Let DeepSpeed take the module, split weight by weight where it does. Raises RunError with what it says."""
    _connect(device)
    import deepspeed
    from deepspeed.runtime.zero.utils import ZeRORuntimeException

    accelerator: Any = deepspeed.get_accelerator()
    taken = accelerator.device_name()
    if taken != device.type:  # transformers imports it to save a model
        raise RunError(
            f"run.engine: deepspeed: DeepSpeed was imported for {taken}, and this run is on {device.type}; start with "
            f"DS_ACCELERATOR={device.type}"
        )
    logging.getLogger("DeepSpeed").addFilter(_unexpected)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # its collectives
    if device.type == "cpu":
        # Sums of gradients would be computed by an operation that is compiled first, which takes minutes and a C++
        # compiler; Gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        deepspeed.init_distributed(dist_init_required=False)
        if settings.stage == 3:
            deepspeed.zero.Init(module=module, config_dict_or_path=config)
            for buffer in module.buffers():
                buffer.data = buffer.data.to(device)
        with redirect_stdout(io.StringIO()):  # it prints its memory at every turn
            engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    except (AssertionError, ValueError, TypeError, NotImplementedError, ImportError, ZeRORuntimeException) as error:
        raise RunError(f"run.engine: deepspeed: DeepSpeed {deepspeed.__version__} refuses: {error}") from error
    return engine


def _connect(device: torch.device) -> None:
    """Give DeepSpeed the variables and the process group that it looks for, where the launcher did not."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    # To DeepSpeed it is the number of the device, which a cluster that shows each process its own counts anew.
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    if device.type == "hpu":
        os.environ.setdefault("DEEPSPEED_HPU_ZERO3_SYNC_MARK_STEP_REQUIRED", "1")
    if not dist.is_initialized():
        dist.init_process_group(back_ends(0), store=dist.HashStore(), rank=0, world_size=1)


def _unexpected(record: logging.LogRecord) -> bool:
    return not any(words in record.getMessage() for words in _EXPECTED)
