"""What trains: named frozen sets, or regular expressions over parameter names.

Setting a parameter's `requires_grad` is all that freezing is; the optimiser, the checkpoints and the forward pass read
it from there. What nothing can train (encoder layers that are never run) is always frozen.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from lapilli.base.errors import RecipeError, unknown
from lapilli.model.held import held_as, held_bytes, numel
from lapilli.model.vision import find_layers, resolve_layers
from lapilli.model.vlm import VisionLanguageModel

SETS = ("projector", "freeze_vision", "full")
"""Names of the frozen sets; see `recipe.schema.Train.freeze`."""

_PARTS = ("vision_encoder", "projector", "language_model")


@dataclass(frozen=True)
class PartCount:
    """Parameters of one part of the model."""

    part: str
    trainable: int
    frozen: int
    unused: int
    """Of the frozen ones: in encoder layers above the one that is read."""
    held: Mapping[str, int] = field(default_factory=dict)
    """Parameters by what they are held as: `fp32`, `bf16`, `nf4`."""
    held_bytes: int = 0
    """Memory of the weights; 0 where they are not there (on the meta device)."""


def part_of(name: str) -> str:
    """The part that a parameter belongs to, by its name: vision_encoder, projector or language_model."""
    head = name.split(".", 1)[0]
    return head if head in _PARTS else "projector"


def apply_freeze(
    model: VisionLanguageModel, freeze: str | Sequence[str], *, lora: bool = False, lora_vision: bool = False
) -> list[PartCount]:
    """Set what trains and return the table of it.

    `freeze` is one of `SETS` or a list of regular expressions, searched in parameter names; what matches one is
    frozen. With `lora`, the language model's own weights are frozen whatever `freeze` says, its adapters train; with
    `lora_vision`, the vision encoder's likewise.
    Raises RecipeError for an unknown name, an expression that matches nothing or is malformed, and for a set that
    leaves nothing to train.
    """
    names = [name for name, _ in model.named_parameters()]
    frozen = _by_set(freeze, names) if isinstance(freeze, str) else _by_expressions(freeze, names)
    never_run = _never_run(model)
    adapted = ["language_model"] * lora + ["vision_encoder"] * lora_vision
    for name, parameter in model.named_parameters():
        adapter = ".lora_" in name
        base = part_of(name) in adapted and not adapter
        parameter.requires_grad_(adapter or not (name in frozen or name in never_run or base))
    if not any(p.requires_grad for p in model.parameters()):
        raise RecipeError(f"train.freeze: {_quoted(freeze)} freezes every parameter; leave out what shall train")
    return table(model)


def table(model: VisionLanguageModel) -> list[PartCount]:
    """Count trainable and frozen parameters per part, tied weights once."""
    never_run = _never_run(model)
    rows = []
    for part in _PARTS:
        own = [(n, p) for n, p in model.named_parameters() if part_of(n) == part]
        held: Counter[str] = Counter()
        for _, parameter in own:
            held[held_as(parameter)] += numel(parameter)
        rows.append(
            PartCount(
                part,
                sum(numel(p) for _, p in own if p.requires_grad),
                sum(numel(p) for _, p in own if not p.requires_grad),
                sum(numel(p) for n, p in own if n in never_run),
                held,
                sum(held_bytes(p) for _, p in own),
            )
        )
    return rows


def total(parts: Sequence[PartCount]) -> PartCount:
    """The sum of a table's rows."""
    held: Counter[str] = Counter()
    for row in parts:
        held.update(row.held)
    trains, frozen, unused, size = (
        sum(getattr(row, key) for row in parts) for key in ("trainable", "frozen", "unused", "held_bytes")
    )
    return PartCount("total", trains, frozen, unused, held, size)


def _by_set(name: str, names: Sequence[str]) -> set[str]:
    if name not in SETS:
        raise RecipeError(f"train.freeze: {unknown('frozen set', name, SETS)}, or a list of regular expressions")
    trained = {"projector": {"projector"}, "freeze_vision": {"projector", "language_model"}, "full": set(_PARTS)}[name]
    return {n for n in names if part_of(n) not in trained}


def _by_expressions(expressions: Sequence[str], names: Sequence[str]) -> set[str]:
    frozen: set[str] = set()
    for expression in expressions:
        try:
            pattern = re.compile(expression)
        except re.error as error:
            raise RecipeError(f"train.freeze: {_quoted(expression)} is not a regular expression: {error}") from error
        found = {n for n in names if pattern.search(n)}
        if not found:
            raise RecipeError(f"train.freeze: {_quoted(expression)} matches no parameter; {_examples(names)}")
        frozen |= found
    return frozen


def _quoted(freeze: str | Sequence[str]) -> str:
    return ", ".join(f'"{one}"' for one in ([freeze] if isinstance(freeze, str) else freeze))


def _examples(names: Sequence[str]) -> str:
    """One name of each part, to write an expression after."""
    first = {part_of(name): name for name in reversed(names)}
    return f"names look like {', '.join(first[part] for part in _PARTS if part in first)}"


def _never_run(model: VisionLanguageModel) -> set[str]:
    """Names of the vision encoder's parameters that come after the last layer that is read."""
    encoder: nn.Module = model.vision_encoder
    layers = find_layers(model.vision_encoder)
    last = max(resolve_layers(model.config.feature_layers, len(layers)))
    if last == len(layers):
        return set()
    order = {id(m): i for i, m in enumerate(encoder.modules())}
    begin = order[id(layers[last])]
    before = {id(p) for m in encoder.modules() if order[id(m)] < begin for p in m.parameters(recurse=False)}
    # Modules are listed in the order they are defined, which in these encoders is the order they run in.
    return {f"vision_encoder.{n}" for n, p in encoder.named_parameters() if id(p) not in before}
