"""What a run says while it goes: the live line, and the numbers of each step for `metrics.jsonl`.

Rates are over the last steps, so that the line follows what happens; the file has every step's own numbers.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lapilli.base.progress import duration
from lapilli.data.sample import Batch
from lapilli.train.step import StepResult

WINDOW_STEPS = 20


def computed_positions(batches: Sequence[Batch], packing: str) -> int:
    """Positions that are computed, those included that no Example fills. Packed sequences have none; padded ones do."""
    if any(b.places is not None for b in batches):
        return sum(len(b.input_ids) for b in batches)
    if packing == "varlen":
        return sum(b.tokens for b in batches)
    lengths = [batch.cu_seqlens.diff() for batch in batches]
    return sum(int(one.max()) * len(one) for one in lengths)


class Monitor:
    """Turns steps into lines and rows."""

    def __init__(self, total_steps: int) -> None:
        self._total = total_steps
        self._recent: deque[dict[str, Any]] = deque(maxlen=WINDOW_STEPS)

    def row(
        self,
        step: int,
        epoch: int,
        result: StepResult,
        *,
        learning_rate: float,
        seconds: float,
        wait_seconds: float,
        padding: float,
        memory_bytes: int,
    ) -> dict[str, Any]:
        """Return the step's object for `metrics.jsonl`. `seconds` is the whole step, waiting for data included."""
        row = {
            "step": step,
            "epoch": epoch,
            "loss": result.loss,
            "learning_rate": learning_rate,
            "grad_norm": result.grad_norm,
            "tokens": result.tokens,
            "supervised_tokens": result.supervised_tokens,
            "samples": result.samples,
            "seconds": round(seconds, 6),
            "wait_seconds": round(wait_seconds, 6),
            "padding": round(padding, 6),
            "memory_bytes": memory_bytes,
        }
        assert set(asdict(result)) <= set(row)
        self._recent.append(row)
        return row

    def text(self) -> str:
        """The live line behind the count of steps, of the steps so far."""
        last, seconds = self._recent[-1], sum(r["seconds"] for r in self._recent) or 1e-9
        left = (self._total - last["step"]) * seconds / len(self._recent)
        return "  ".join(
            [
                f"loss {last['loss']:.3f}",
                f"lr {last['learning_rate']:.1e}",
                f"|g| {last['grad_norm']:.2f}",
                f"{compact(sum(r['tokens'] for r in self._recent) / seconds)} tok/s",
                f"wait {sum(r['wait_seconds'] for r in self._recent) / seconds:.1%}",
                f"pad {sum(r['padding'] for r in self._recent) / len(self._recent):.1%}",
                f"mem {compact(last['memory_bytes'], 1024)}",
                f"eta {duration(left)}",
            ]
        )


def compact(number: float, base: int = 1000) -> str:
    """A number in three or four characters: `950`, `18.4k`, `61G`."""
    for unit in ("", "k", "M", "G"):
        if number < base:
            return f"{number:.1f}{unit}" if unit and number < 100 else f"{number:.0f}{unit}"
        number /= base
    return f"{number:.1f}T"
