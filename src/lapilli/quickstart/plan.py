"""How much of everything the quickstart makes, and where it puts it.

The numbers are chosen so that the whole takes four to five minutes on two CPU cores; a test makes them tiny.
"""

from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, PositiveInt


class Sizes(BaseModel):
    """Amounts; the recipes hold the rest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = 0
    language_steps: PositiveInt = 600
    language_batch: PositiveInt = 8
    vision_steps: PositiveInt = 750
    vision_batch: PositiveInt = 96
    captions: PositiveInt = 3200
    conversations: PositiveInt = 7000
    questions_each: PositiveInt = 5
    held_out: PositiveInt = 64
    """Captions, and conversations, for the validation loss."""
    exams: PositiveInt = 400
    """Held-out questions, each about pictures of its own."""


@dataclass(frozen=True)
class Paths:
    """The folder that the quickstart fills."""

    root: Path

    @property
    def vision_encoder(self) -> Path:
        return self.root / "parts" / "vision-encoder"

    @property
    def language_model(self) -> Path:
        return self.root / "parts" / "language-model"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def pictures(self) -> Path:
        return self.data / "pictures"

    @property
    def exam(self) -> Path:
        return self.data / "exam.json"

    @property
    def recipes(self) -> Path:
        return self.root / "recipes"

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def align(self) -> Path:
        return self.root / "align"

    @property
    def instruct(self) -> Path:
        return self.root / "instruct"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.json"

    @property
    def report(self) -> Path:
        return self.root / "report.html"
