"""A stage's plan: what it needs with each engine and way of checkpointing, how long it takes, and what to change.

Nothing is loaded: the model is built without weights, its heaviest micro-batch is traced once for each way of
checkpointing, and the rest is arithmetic. The same plan words the advice when a run is out of memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lapilli.base.progress import Progress, duration, size_text
from lapilli.model.freeze import PartCount
from lapilli.recipe.schema import Stage
from lapilli.train.monitor import compact
from lapilli.train.plan.machine import Machine
from lapilli.train.plan.memory import Needs, Place, Sizes, measure, needs
from lapilli.train.plan.step import empty_model, trace_micro_batch, trainable
from lapilli.train.plan.trace import Traced
from lapilli.train.plan.workload import Workload
from lapilli.train.reading import Reading

CHECKPOINTING = ("none", "selective", "full")
SEVERAL = ("ddp", "fsdp", "fsdp+offload", "zero1", "zero2", "zero3", "zero3+offload")


@dataclass(frozen=True)
class StagePlan:
    """What a stage needs. `chosen` is what its recipe asks for, `options` are all that could carry it out."""

    stage: Stage
    machine: Machine
    processes: int
    workload: Workload
    sizes: Sizes
    parts: Sequence[PartCount]
    chosen: Needs
    options: tuple[Needs, ...]
    flops_per_step: dict[str, float]
    """By way of checkpointing, of all processes."""

    @property
    def fits(self) -> bool:
        return self.chosen.total <= self.machine.memory_bytes

    @property
    def seconds_per_step(self) -> float:
        return self.flops_per_step[self.chosen.checkpointing] / (self.machine.reached * self.processes)

    @property
    def seconds(self) -> float | None:
        """Of all steps; None where their number is not known."""
        total = self.workload.total_steps
        return None if total is None else total * self.seconds_per_step

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON holds it."""
        workload = {key: value for key, value in asdict(self.workload).items() if key != "heaviest"}
        work = self.workload
        return {
            "stage": self.stage.name,
            "machine": asdict(self.machine),
            "processes": self.processes,
            "workload": workload | {"heaviest": [work.tokens, work.pictures, work.supervised]},
            "parts": [
                {name: getattr(part, name) for name in ("part", "trainable", "frozen", "unused")} for part in self.parts
            ],
            "needs": _needs_json(self.chosen),
            "fits": self.fits,
            "options": [_needs_json(one) | {"fits": one.total <= self.machine.memory_bytes} for one in self.options],
            "tokens_per_second": work.tokens_per_step / self.seconds_per_step,
            "seconds_per_step": self.seconds_per_step,
            "seconds": self.seconds,
            "advice": self.advice(),
        }

    def lines(self) -> list[str]:
        """The plan as a person reads it."""
        work, machine = self.workload, self.machine
        said = [
            f"{self.processes} x {machine.name}, {size_text(machine.memory_bytes)} each; "
            f"{self.stage.run.precision}, engine {self.chosen.engine}, checkpointing {self.chosen.checkpointing}",
            f"heaviest micro-batch: {work.tokens:,} tokens, {work.supervised:,} supervised, {work.pictures} pictures; "
            f"{work.micro_batches:.1f} of them per step and process",
        ]
        if work.shape is not None:
            share = 1 - work.tokens_per_step / work.positions_per_step
            said.append(f"it is padded to {work.shape.rows} x {work.shape.length:,}; {share:.0%} of a step is padding")
        said += [f"note: {work.assumed}"] if work.assumed else []
        said += ["memory of each device:"]
        said += [f"  {name:<24}{size_text(size):>10}" for name, size in self.chosen.device.items() if size]
        said += [f"  {'together':<24}{size_text(self.chosen.total):>10}  {_verdict(self.chosen, machine)}"]
        said += [f"  in the machine's memory, per process: {k} {size_text(v)}" for k, v in self.chosen.host.items()]
        steps = "?" if work.total_steps is None else f"{work.total_steps:,}"
        took = "unknown without the data" if self.seconds is None else duration(self.seconds)
        said += [
            f"time: {steps} steps of {duration(self.seconds_per_step)}, "
            f"{compact(work.tokens_per_step / self.seconds_per_step)} tokens/s, {took} in all (at "
            f"{machine.reached / 1e12:.3g} TFLOP/s per device, {machine.reached / machine.flops_per_second:.0%} of "
            f"{'its measured' if machine.kind == 'cpu' else 'its stated'} rate)",
        ]
        return said + self._table() + self.advice()

    def _table(self) -> list[str]:
        """Bytes by engine and way of checkpointing; nothing where there is no choice."""
        if len(self.options) < 2:
            return []
        said = [
            "memory of each device by engine and gradient_checkpointing (* fits):",
            "  " + "".join(f"{text:>16}" for text in ("", *CHECKPOINTING)),
        ]
        for engine in dict.fromkeys(one.engine for one in self.options):
            own = {one.checkpointing: one for one in self.options if one.engine == engine}
            cells = [
                f"{size_text(own[c].total)}{'*' if self._fits(own[c]) else ' '}" for c in CHECKPOINTING if c in own
            ]
            said.append(f"  {engine:>16}" + "".join(f"{cell:>16}" for cell in cells))
        return said

    def _fits(self, one: Needs) -> bool:
        return one.total <= self.machine.memory_bytes

    def advice(self, *, less: bool = False) -> list[str]:
        """What to change, the cheapest first; empty where the recipe fits, unless it shall take `less` all the same."""
        if self.fits and not less:
            return []
        said = [] if less else ["it does not fit; what would, the cheapest first:"]
        head = len(said)
        same = [one for one in self.options if one.engine == self.chosen.engine and self._better(one)]
        if same:
            best = same[0]
            said.append(f"  train.gradient_checkpointing={best.checkpointing}: {size_text(best.total)}")
        said += self._smaller_batches(less)
        said += self._other_engines()
        said += self._less_to_train()
        if len(said) == head:
            said.append("  nothing that this recipe could change: more devices, or devices with more memory")
        return said

    def _better(self, one: Needs) -> bool:
        return self._fits(one) and (not self.fits or one.total < 0.97 * self.chosen.total)

    def _smaller_batches(self, less: bool) -> list[str]:
        """Fewer tokens at once, with the way of checkpointing that keeps least."""
        least = min((one for one in self.options if one.engine == self.chosen.engine), key=lambda one: one.total)
        inside = least.device["activations"] + least.device["logits"]
        room = self.machine.memory_bytes - (least.total - inside)
        now = self.workload.positions
        tokens = now // 2 if less else int(now * room / inside) if inside else 0
        if self.stage.train.micro_batch_size or tokens < 64 or (self._fits(least) and not less):
            return []
        longest = max(portion.length for portion in self.workload.heaviest)
        if tokens < longest:
            return [f"  data.max_length={tokens} and train.tokens_per_micro_batch={tokens}: conversations are shorter"]
        more = ""
        if not less and least.checkpointing != self.chosen.checkpointing:
            more = f" with train.gradient_checkpointing={least.checkpointing}"
        return [f"  train.tokens_per_micro_batch={tokens // 64 * 64}{more}: more and smaller micro-batches"]

    def _other_engines(self) -> list[str]:
        fitting = [one for one in self.options if self._better(one) and one.engine != self.chosen.engine]
        first = {one.engine: one for one in reversed(fitting)}
        order = [engine for engine in SEVERAL if engine in first]
        return [
            f"  {_setting(engine)} train.gradient_checkpointing={first[engine].checkpointing}: "
            f"{size_text(first[engine].total)}"
            for engine in order
        ][:3]

    def _less_to_train(self) -> list[str]:
        train, trained = self.stage.train, self.sizes.trained
        least = min(self.options, key=lambda one: one.total)
        said = []
        spared = int(least.device["optimiser"] * (1 - 2.02 / 8))
        if train.optimizer == "adamw" and not self._fits(least) and spared:
            said.append(f"  train.optimizer=adamw_8bit: {size_text(spared)} less for its state")
        if train.lora is None and trained > self.sizes.frozen and not self._fits(least):
            said.append(f"  train.lora.r=64: no gradients and state for {compact(trained)} weights")
        return said


def _setting(engine: str) -> str:
    name, _, offload = engine.partition("+")
    if name.startswith("zero"):
        more = " run.deepspeed.offload_optimizer=true" if offload else ""
        return f"run.engine=deepspeed run.deepspeed.zero={name[-1]}{more}"
    return f"run.engine={name}" + (" run.fsdp.offload=true" if offload else "")


def _verdict(one: Needs, machine: Machine) -> str:
    share = one.total / machine.memory_bytes if machine.memory_bytes else 0.0
    return f"{share:.0%} of what there is" + ("" if share <= 1 else ": does not fit")


def _needs_json(one: Needs) -> dict[str, Any]:
    return asdict(one) | {"total": one.total}


def asked_engine(stage: Stage, processes: int) -> str:
    """The engine that a recipe asks for, as `memory.needs` names it."""
    run = stage.run
    match run.engine:
        case "auto":
            return "single" if processes == 1 else "ddp"
        case "fsdp":
            return "fsdp+offload" if run.fsdp.offload else "fsdp"
        case "deepspeed":
            name = f"zero{run.deepspeed.zero or 2}"
            return f"{name}+offload" if run.deepspeed.offload_optimizer else name
        case _:
            return run.engine


def plan_stage(
    stage: Stage, how: Reading, origin: str | Path, workload: Workload, machine: Machine, processes: int,
    progress: Progress | None = None, *, only_chosen: bool = False,
) -> StagePlan:  # fmt: skip
    """Plan a stage whose model is that of the folder `origin`. Raises LapilliError for what can't be trained.

    `only_chosen`: leave out what else there would be.
    """
    traced: dict[str, Traced] = {}
    asked = stage.train.gradient_checkpointing
    for number, mode in enumerate((asked,) if only_chosen else CHECKPOINTING):
        other = stage.model_copy(update={"train": stage.train.model_copy(update={"gradient_checkpointing": mode})})
        model = empty_model(origin, how)
        parts = trainable(model, other, how)
        sizes = measure(model, None if stage.train.lora is None else stage.train.lora.quantise)
        traced[mode] = trace_micro_batch(model, other, how, workload.heaviest, workload.shape)
        if progress is not None:
            progress.update(number + 1)
    workers = stage.data.workers
    place = Place(machine.kind, processes, workers)
    engine = asked_engine(stage, processes)
    engines = dict.fromkeys([engine, *(SEVERAL if processes > 1 else ("single",))])

    def need(name: str, mode: str) -> Needs:
        return needs(name, mode, sizes, traced[mode], workload, stage.train, stage.run, place)

    scale = workload.positions_per_step / max(1, workload.positions)
    return StagePlan(
        stage, machine, processes, workload, sizes, parts, need(engine, asked),
        tuple(need(name, mode) for name in engines for mode in traced),
        {mode: one.flops * scale for mode, one in traced.items()},
    )  # fmt: skip
