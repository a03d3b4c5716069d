"""A moving average of the trained weights, which often does better than the last ones, and which weights a run exports.

    average <- d * average + (1 - d) * weights,   d = min(decay, (1 + step) / (10 + step))

after each step, in fp32. The smaller d of early steps, as in TensorFlow's ExponentialMovingAverage, lets a short run
forget where it began. It is a function of the step alone, so that a resumed run goes on bit for bit.
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from lapilli.base.errors import RunError
from lapilli.train.checkpoints import best_checkpoint
from lapilli.train.parallel.single import Single
from lapilli.train.setup import Prepared, Say
from lapilli.train.tensors import Saved

KIND = "average"


class Average:
    """The moving average of an engine's trained weights, laid out as they are. Takes 4 bytes for each of them."""

    def __init__(self, engine: Single, decay: float) -> None:
        """Start from the weights as they are."""
        self.decay = decay
        self._engine = engine
        self._values = {name: tensor.to(torch.float32, copy=True) for name, tensor in engine.learning()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step`, counted from 1."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, tensor in self._engine.learning():
            self._values[name].lerp_(tensor.to(torch.float32), share)

    def state(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """What a checkpoint holds of it, as `Single.state`."""
        return self._engine.state_of(KIND, self._values)

    def load(self, saved: Saved) -> None:
        """Put a checkpoint's average in place. Raises RunError if it has none or another model's."""
        self._engine.load_values(saved, KIND, self._values)

    @torch.no_grad()
    def put_into_model(self) -> None:
        """Replace what learns by its average, to be exported: no pass follows."""
        for name, tensor in self._engine.learning():
            tensor.copy_(self._values[name])


def choose_weights(ready: Prepared, average: Average | None, say: Say) -> None:
    """Put the weights that `train.export` asks for into the model. All processes call it."""
    wanted = ready.stage.train.export
    if wanted == "average":
        assert average is not None
        average.put_into_model()
        say(f"model/ holds the moving average of the weights (decay {average.decay})")
    elif wanted == "best":
        world = ready.engine.world
        loss, step, folder = world.from_first(lambda: _best(ready.folder.checkpoints))
        ready.engine.load_weights(Saved(Path(folder)))
        say(f"model/ holds the weights of step {step}, whose validation loss {loss:.4f} is the smallest")


def _best(checkpoints: Path) -> tuple[float, int, str]:
    best = best_checkpoint(checkpoints)
    if best is None:
        raise RunError(
            f"{checkpoints}: no checkpoint with a finite validation loss; set train.export=last to export the last step"
        )
    loss, step, folder = best
    return loss, step, str(folder)
