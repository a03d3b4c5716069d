"""The rows of a shard laid end to end, as arrays: what is counted and written is computed for all of them at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lapilli.data.sample import IGNORE, Example


class Rows:
    """Examples as flat arrays. `ids` and `learnt` are (all tokens,), `lengths` and `supervised` (n,) int32.

    `text` (all tokens,) bool marks what is not a picture's place; `weights` (all tokens,) float32 is None if every
    label of every row counts 1.
    """

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples
        self.lengths = np.array([e.length for e in examples], dtype=np.int32)
        self.ends = np.cumsum(self.lengths, dtype=np.int64)
        self.starts = self.ends - self.lengths
        self.ids = np.concatenate([np.zeros(0, dtype=np.int64), *(e.input_ids for e in examples)])
        self.learnt = np.concatenate([np.zeros(0, dtype=np.int64), *(e.labels for e in examples)]) != IGNORE
        counted = self.learnt.copy()
        counted[self.starts] = False  # the first position of an Example is never predicted
        self.supervised = np.add.reduceat(counted, self.starts, dtype=np.int32) if examples else self.lengths
        self.text = np.ones(len(self.ids), dtype=bool)
        for start, example in zip(self.starts.tolist(), examples, strict=True):
            for slot in example.images:
                self.text[start + slot.start : start + slot.start + slot.tokens] = False
        self.weights: np.ndarray | None = None
        if any(e.weights is not None for e in examples):
            self.weights = self.learnt.astype(np.float32)
            for start, end, example in zip(self.starts, self.ends, examples, strict=True):
                if example.weights is not None and self.weights is not None:
                    self.weights[start:end] = example.weights
