"""What inspecting a path finds."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from lapilli.assemble.inspection.parts import Part


@dataclass(frozen=True)
class Missing:
    """Something that is not there, and what to do."""

    what: str
    remedy: str


@dataclass
class Inspection:
    """What a path is."""

    path: str
    format: str
    """Short name: llava, llava-lora, llava-projector, llava-delta, hf, lapilli, lapilli-adapter, peft-adapter,
    cerebras, open-clip, vision-encoder, language-model, projector, adapters, weights, run, prepared-data, tokenizer."""
    what: str
    """One line for a person."""
    parts: list[Part] = field(default_factory=list)
    template: str = ""
    image: str = ""
    """What happens to pictures."""
    tokens_per_image: str = ""
    details: dict[str, str] = field(default_factory=dict)
    missing: list[Missing] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    inner: Inspection | None = None
    """The model of a run."""

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"parameters": self.parameters}
