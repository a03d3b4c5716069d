"""Rows of the vocabulary's tables, added and cut while tensors stream.

transformers' classes look the image token up, so their folders need a row for it that LLaVA's don't have. The row is
the mean of the trained rows: its logit is the mean of all others and never the largest. It is computed a piece at a
time, and cut off again, without a trace, on the way back.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from lapilli.checkpoint import names
from lapilli.checkpoint.stream import Lazy, Tensors

_PIECE_ROWS = 4096


def tables_of(config: PreTrainedConfig) -> tuple[str, ...]:
    """Canonical names of a language model's tables with one row (or number) per token."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    return tuple(
        names.language_name(f"{layer}.{kind}")
        for layer in (names.input_name(model), names.output_name(model))
        for kind in ("weight", "bias")
    )


def with_rows(config: Any, rows: int) -> Any:
    """A copy of a language model's configuration with another number of rows."""
    made = copy.deepcopy(config)
    made.get_text_config().vocab_size = rows
    return made


def grow(tensors: Tensors, config: PreTrainedConfig, rows: int) -> Tensors:
    """Tensors whose vocabulary tables have `rows` rows: those there are, then their mean."""
    tables = tables_of(config)
    return {name: _grown(tensor, rows) if name in tables else tensor for name, tensor in tensors.items()}


def cut(tensors: Tensors, config: PreTrainedConfig, rows: int) -> Tensors:
    """Tensors whose vocabulary tables have the first `rows` rows only."""
    tables = tables_of(config)
    return {
        name: tensor.then(lambda value: value[:rows], shape=(rows, *tensor.shape[1:])) if name in tables else tensor
        for name, tensor in tensors.items()
    }


def _grown(tensor: Lazy, rows: int) -> Lazy:
    def change(value: torch.Tensor) -> torch.Tensor:
        made = value.new_empty((rows, *value.shape[1:]))
        made[: len(value)] = value
        made[len(value) :] = mean_row(value)
        return made

    return tensor.then(change, shape=(rows, *tensor.shape[1:]))


def mean_row(table: torch.Tensor) -> torch.Tensor:
    """Mean over the rows of a table (V, D) -> (D,) in its dtype, added up in float64 a piece at a time."""
    total = torch.zeros(table.shape[1:], dtype=torch.float64)
    for start in range(0, len(table), _PIECE_ROWS):
        total += table[start : start + _PIECE_ROWS].float().sum(0, dtype=torch.float64)
    return (total / len(table)).to(table.dtype)
