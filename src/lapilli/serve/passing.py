"""What passes between a server and a process elsewhere that holds a model: facts of it, prompts, and what is made.

The server reads requests and writes replies, so it needs a model's tokenizer, its template and its bounds, and none of
its weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from lapilli.data.template import Template
from lapilli.generate.engine import Room
from lapilli.generate.processor import Processor, Prompt
from lapilli.generate.text import Vocabulary
from lapilli.serve.models import Served, Works
from lapilli.serve.reading import Reader
from lapilli.serve.remote import RemotePictures
from lapilli.serve.settings import Limits
from lapilli.serve.worker import Event, Worker

Numbered = tuple[int, Event]
"""An event and the number of the answer that it belongs to."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a server has to know of a model to check its requests and to write its replies."""

    processor: Processor
    room: Room
    template: Template | None
    padded: bool
    """Whether its answers grow in padded batches, each to its end."""

    @classmethod
    def of(cls, model: Served) -> Facts:
        """Of a model whose engine runs in this process."""
        assert isinstance(model.worker, Worker)
        engine = model.worker.engine
        return cls(engine.processor, engine.room, model.template, bool(engine.padded_because))

    def served(self, name: str, worker: Works, limits: Limits, remote: RemotePictures | None) -> Served:
        """The model as a server serves it, when `worker` brings what is made elsewhere."""
        reader = Reader(self.room, self.processor, limits, remote)
        return Served(name, worker, reader, Vocabulary(self.processor.tokenizer), limits, self.template)


@dataclass(frozen=True, slots=True)
class Packed:
    """A prompt on its way to another process, its tiles as arrays."""

    prompt: Prompt
    tiles: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, prompt: Prompt) -> Packed:
        return cls(replace(prompt, tiles=()), tuple(t.numpy() for t in prompt.tiles))

    def copied(self) -> Prompt:
        """The prompt, in memory of this process alone."""
        tiles = tuple(torch.from_numpy(array.copy()) for array in self.tiles)
        return replace(self.prompt, tiles=tiles, input_ids=self.prompt.input_ids.copy())
