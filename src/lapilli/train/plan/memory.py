"""From a traced step to bytes on each device, by part and by engine.

What is held between steps is arithmetic: weights, gradients, optimiser, split or not. What is held within a step comes
from the trace. On the CPU the heap's own waste is played through; on other devices it is a share.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import ceil

from torch import nn

from lapilli.model.vision import find_layers
from lapilli.model.vlm import VisionLanguageModel
from lapilli.recipe.schema import Run, Train
from lapilli.train.optimizer import state_bytes_per_parameter
from lapilli.train.plan.heap import BESIDE, Heap
from lapilli.train.plan.trace import GRADIENT, Traced
from lapilli.train.plan.workload import Workload
from lapilli.train.tensors import FILE_BYTES

QUANTISED_BYTES = {"nf4": 0.516, "int8": 1.0}
"""Bytes of each quantised weight, scales of its blocks included."""
PROCESS_BYTES = {"cpu": 400 * 2**20, "cuda": 700 * 2**20}
"""What a process takes before it has a model: Python and libraries in the CPU's memory, CUDA's context on a GPU."""
WORKER_BYTES = 250 * 2**20
"""Of a data worker's own: what it writes to of the pages it was forked with, and the batches it holds ready."""
KEPT_SHARE = 0.05
"""What CUDA's allocator holds beyond what is alive, as a share of it; not measured on every kind of device."""
BUCKET_BYTES = 2**26
"""Gradients in flight at once (`ddp`), or being reduced (`deepspeed`)."""


@dataclass(frozen=True)
class Sizes:
    """Numbers of weights, and what they take as they are stored."""

    trained: int
    frozen: int
    trained_bytes: int
    frozen_bytes: int
    largest_layer: int
    """Weights of the largest unit that a sharding engine gathers at once."""
    outside: int
    """Weights that stand in no layer: embeddings, output layer, projector."""
    each_trained: tuple[int, ...] = ()
    """Weights of each trained tensor, for the heap."""


def measure(model: VisionLanguageModel, quantised: str | None = None) -> Sizes:
    """Count a model that is frozen as it will train; ties count once.

    With `quantised`, the language model's linear layers but the last are held so (`train.lora.quantise`).
    """
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    frozen = [p for p in parameters if not p.requires_grad]
    layers = list(_layers(model))
    inside = {id(p) for layer in layers for p in layer.parameters()}
    return Sizes(
        sum(p.numel() for p in trained),
        sum(p.numel() for p in frozen),
        sum(p.numel() * p.element_size() for p in trained),
        int(sum(p.numel() * p.element_size() for p in frozen) - _spared(model, quantised)),
        max((sum(p.numel() for p in layer.parameters()) for layer in layers), default=0),
        sum(p.numel() for p in parameters if id(p) not in inside),
        tuple(p.numel() for p in trained),
    )


def _spared(model: VisionLanguageModel, quantised: str | None) -> float:
    """Bytes that quantised weights take less than those that the model has in their place."""
    if quantised is None:
        return 0.0
    output, own = model.get_output_embeddings(), QUANTISED_BYTES[quantised]
    layers = (m for m in model.language_model.modules() if isinstance(m, nn.Linear) and m is not output)
    frozen = (layer.weight for layer in layers if not layer.weight.requires_grad)
    return sum(weight.numel() * (weight.element_size() - own) for weight in frozen)


def _layers(model: VisionLanguageModel) -> Iterator[nn.Module]:
    yield from find_layers(model.language_model)
    yield from find_layers(model.vision_encoder)


@dataclass(frozen=True)
class Place:
    """Where a run is carried out: `processes`, one per device, of `kind` cpu or cuda."""

    kind: str
    processes: int
    workers: int = 0


@dataclass(frozen=True)
class Needs:
    """Bytes by part, on each device, and what the engine keeps in its machine's memory for each process."""

    engine: str
    checkpointing: str
    device: dict[str, int]
    host: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.device.values())


def needs(
    engine: str, checkpointing: str, sizes: Sizes, traced: Traced, workload: Workload, train: Train, run: Run,
    place: Place,
) -> Needs:  # fmt: skip
    """What each device holds at its worst moment.

    `engine` is `single`, `ddp`, `fsdp`, `fsdp+offload`, `zero1`, `zero2`, `zero3` or `zero3+offload`.
    """
    parts = _split(engine, sizes, train, run, place.processes)
    device = {"weights": parts.weights, "gradients": parts.gradients, "optimiser": parts.optimizer}
    host = {"optimiser and weights": parts.host} if parts.host else {}
    if train.average_decay is not None:
        split = place.processes if engine.startswith(("fsdp", "zero")) else 1  # as the weights are
        (host if engine.endswith("+offload") else device)["moving average"] = 4 * sizes.trained // split
    logits = traced.peak["logits"] if traced.peak else 0
    device["activations"] = traced.peak_activations - logits + parts.gathered
    if engine.startswith(("fsdp", "zero")):  # their weights are cast layer by layer, and not kept
        device["activations"] -= min(traced.casts, device["activations"])
    device["logits"] = logits
    if ceil(workload.micro_batches) == 1 and engine == "single":
        # Gradients come while activations go.
        device["gradients"] = max(0, max(parts.gradients, traced.peak_bytes) - traced.peak_activations)
    state = device["gradients"] + device["optimiser"] + device["activations"] + logits
    copied, files = _checkpoint(sizes, train, run, place.processes)
    if place.kind == "cpu":
        grown = heap_bytes(traced, sizes, workload.shares, train)
        own = parts_alive(traced, sizes, workload.micro_batches, train)
        device["held by the allocator"] = int(state * max(0.0, grown / max(1, own) - 1))
        if train.save_every is None and not train.keep_best:
            # Once, when no step follows: the copy lies where activations were, which the heap keeps.
            heap = int((state + device["held by the allocator"]) / BESIDE)
            copied = max(0, copied - max(0, heap - parts.gradients - parts.optimizer))
    (device if place.kind == "cpu" else host)["checkpoint being written"] = copied + files
    if place.kind == "cpu":
        device["process"] = PROCESS_BYTES["cpu"]
        if place.workers:
            device["data workers"] = WORKER_BYTES * place.workers
    else:
        device["held by the allocator"] = int(state * KEPT_SHARE)
        device["process"] = PROCESS_BYTES["cuda"]
        if place.workers:
            host["data workers"] = WORKER_BYTES * place.workers
    return Needs(engine, checkpointing, device, host)


def _checkpoint(sizes: Sizes, train: Train, run: Run, n: int) -> tuple[int, int]:
    """Bytes beside a run's own while its state is saved: the copy that is written meanwhile, and a file being made.

    safetensors has the bytes of a file's tensors and, joined from them, those of the file.
    """
    state = int(state_bytes_per_parameter(train) * sizes.trained)
    copied = sizes.trained_bytes + state if run.checkpoints == "async" else 0
    # Whole tensors are dealt out to the processes too.
    return copied // n, 2 * min(FILE_BYTES, max(sizes.trained_bytes, state) // n)


@dataclass(frozen=True)
class _Split:
    weights: int
    gradients: int
    optimizer: int
    gathered: int = 0
    host: int = 0


def _split(engine: str, sizes: Sizes, train: Train, run: Run, n: int) -> _Split:
    whole, state = sizes.trained_bytes + sizes.frozen_bytes, int(state_bytes_per_parameter(train) * sizes.trained)
    gradients = 4 * sizes.trained
    half = 2 if run.precision == "bf16" else 4
    # Units beside the one that computes are fetched ahead, and what stands in no layer stays for the whole pass.
    gathered = half * (2 * sizes.largest_layer + sizes.outside)
    match engine:
        case "single":
            return _Split(whole, gradients, state)
        case "ddp":
            return _Split(whole, gradients, state, 2 * BUCKET_BYTES)
        case "fsdp" | "fsdp+offload":
            shards = run.fsdp.frozen == "shard"
            frozen = sizes.frozen_bytes // n if shards else sizes.frozen_bytes
            own = _Split(sizes.trained_bytes // n + frozen, gradients // n, state // n, gathered)
        case "zero1":
            return _Split(_held(sizes, half) + _master(sizes, half, n), half * sizes.trained, state // n)
        case "zero2":
            own = _Split(_held(sizes, half) + _master(sizes, half, n), gradients // n, state // n, 2 * BUCKET_BYTES)
        case _:
            held = (_held(sizes, half) // n) + _master(sizes, half, n)
            own = _Split(held, gradients // n, state // n, gathered + 2 * BUCKET_BYTES)
    if engine.endswith("+offload"):
        kept = sizes.frozen_bytes if engine.startswith("fsdp") and run.fsdp.frozen == "replicate" else 0
        host = own.weights - kept + own.gradients + own.optimizer
        return replace(own, weights=kept, gradients=0, optimizer=0, host=host)
    return own


def _held(sizes: Sizes, half: int) -> int:
    """Weights as DeepSpeed computes with them."""
    return half * (sizes.trained + sizes.frozen)


def _master(sizes: Sizes, half: int, n: int) -> int:
    """DeepSpeed's fp32 copy of a process's part, beside weights in bf16."""
    return 4 * sizes.trained // n if half == 2 else 0


def parts_alive(traced: Traced, sizes: Sizes, micro_batches: float, train: Train) -> int:
    """Most that is alive at once beside the weights, of one process that has everything."""
    state = int(state_bytes_per_parameter(train) * sizes.trained)
    if ceil(micro_batches) > 1:
        return state + 4 * sizes.trained + traced.peak_activations
    return state + max(4 * sizes.trained, traced.peak_bytes)


def heap_bytes(traced: Traced, sizes: Sizes, steps: Sequence[Sequence[float]], train: Train) -> int:
    """How large the heap of a process on the CPU grows beside its weights, played through over a few steps.

    `steps` are the sizes of their micro-batches, against the one that was traced.
    """
    heap = Heap()
    trained = {4 * count for count in sizes.each_trained}
    ended = {number for number, size in traced.events if size <= 0}
    results = [number for number, size in traced.events if size > 0 and number not in ended]
    gradients: list[Hashable] = []
    for step, scales in enumerate(steps):
        for key in gradients:
            heap.free(key)
        gradients = []
        for number, scale in enumerate(scales):
            gradients += _pass(heap, traced, (step, number), scale, trained, kept=number == 0)
        for key in ((step, number, result) for number in range(len(scales)) for result in results):
            heap.free(key)  # losses outlive their pass, and not their step
        if step == 0:
            for place, count in enumerate(sizes.each_trained):
                for key, size in enumerate(_states(train, count)):
                    heap.take(("state", place, key), size)
    return int(heap.high * BESIDE)


def _states(train: Train, count: int) -> list[int]:
    """Bytes of each state tensor of a trained tensor."""
    whole = int(state_bytes_per_parameter(train) * count)
    return [whole // 2] * 2 if train.optimizer != "sgd" else [whole] if whole else []


def _pass(
    heap: Heap, traced: Traced, name: tuple[int, int], scale: float, trained: set[int], *, kept: bool
) -> list[Hashable]:
    """Play one micro-batch; return its gradients where they are `kept`, else they are added to those there are."""
    gradients: list[Hashable] = []
    for number, size in traced.events:
        key = (*name, number)
        if size == GRADIENT:
            if kept:
                gradients.append(key)
            else:
                heap.free(key)
        elif size:
            heap.take(key, size if size in trained else int(size * scale) or 1)
        else:
            heap.free(key)
    return gradients
