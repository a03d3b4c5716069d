"""A model folder whose language model takes a half or a quarter of the space, for bitsandbytes.

Only the linear layers inside the language model are stored in 8 bits (LLM.int8: a scale per row) or 4 (NF4 in blocks
of 64, whose scales are quantised again); the vision encoder, the projector, the embedding and the output layer stay as
they are, because they are small and suffer most. Tensors pass one at a time, on the CPU, and what is written is what
transformers itself would write.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lapilli.assemble import targets
from lapilli.assemble.build import where_it_fits
from lapilli.assemble.opening.parts import Names, empty_model
from lapilli.assemble.source import OpenModel, open_model
from lapilli.assemble.targets import Draft
from lapilli.base.atomic import atomic_folder, refuse_taken
from lapilli.base.errors import ModelError
from lapilli.base.progress import Progress
from lapilli.checkpoint import names
from lapilli.checkpoint.stream import Lazy, Tensors, check_space, total_bytes, write_folder
from lapilli.checkpoint.tensors import read_json
from lapilli.model.quantised import BLOCK
from lapilli.model.quiet import quiet

Bits = Literal[8, 4]

_NESTED_BLOCK = 256
_STATE_BYTES = 256
"""Room for the JSON that describes a 4-bit tensor; blanks fill it, so that its size is known before it is made."""
_KEPT = ("lm_head", "vision_tower", "multi_modal_projector", "vision_encoder", "projector")
"""Modules that stay as they are, as transformers and vLLM are told; with and without what may stand before."""


@dataclass
class QuantiseReport:
    """What was written."""

    folder: Path
    bits: Bits
    quantised: int
    """Tensors."""
    kept: int
    size_before_bytes: int
    size_bytes: int
    notes: list[str] = field(default_factory=list)


def check_bitsandbytes() -> None:
    """Raise ModelError unless bitsandbytes is installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError("quantised models need bitsandbytes, which is not installed: pip install 'lapilli[quantise]'")


def quantise(
    src: Path | str,
    out: Path | str,
    bits: Bits,
    *,
    base: Path | str | None = None,
    template: str | None = None,
    shard_bytes: int = 5 * 10**9,
    say: Callable[[str], None] = lambda _line: None,
) -> QuantiseReport:
    """Write the model of `src`, of any format, with `bits` per weight of the language model's layers to `out`.

    The folder is in transformers' layout, or in our own where that can't hold the model. `base` belongs to adapters.
    Raises ModelError if bitsandbytes is missing or the model can't be read, RunError if `out` exists or does not fit.
    """
    out = Path(out)
    refuse_taken(out)
    check_bitsandbytes()
    with quiet():
        say(f"opening {src}")
        opened = open_model(src, base, template=template)
        because = _why_not_hf(opened)
        draft = (targets.to_lapilli if because else targets.to_hf)(opened, None)
        layers = linear_weights(draft.opened)
        tensors, count = _tensors(draft, layers, bits)
        size = total_bytes(tensors.values())
        check_space(out, size)
        say(f"writing {out}")
        with atomic_folder(out) as folder, Progress("quantising (bytes)", size) as progress:
            write_folder(folder, tensors, shard_bytes=shard_bytes, progress=progress)
            draft.finish(folder)
            _note_in_config(folder / "config.json", _settings(bits, draft))
    notes = [f"transformers' own layout can't hold this model ({because}): lapilli loads it"] if because else []
    before = total_bytes(draft.opened.tensors.values())
    return QuantiseReport(out, bits, count, len(draft.opened.tensors) - count, before, size, notes)


def _why_not_hf(opened: OpenModel) -> str:
    """Why transformers' own layout can't hold the model, with a row for the image token; empty if it can."""
    rows = max(targets.vocabulary_rows(opened), opened.config.image_token_id + 1)
    return where_it_fits(targets.with_vocabulary(opened, rows).config, opened.spec.image)


def linear_weights(opened: OpenModel) -> set[str]:
    """Canonical names of the weights that are quantised: of all linear layers but the output layer.

    Raises ModelError for a language model with linear layers of another form.
    """
    empty = empty_model(AutoModelForCausalLM, opened.config.text_config, opened.folder)
    output = empty.get_output_embeddings()
    modules = {name: module for name, module in empty.named_modules() if module is not output}
    transposed = next((name for name, module in modules.items() if type(module).__name__ == "Conv1D"), None)
    if transposed is not None:
        raise ModelError(f"{opened.folder}: {transposed} is no plain linear layer; models with such can't be quantised")
    linear = {f"{name}.weight" for name, module in modules.items() if isinstance(module, nn.Linear)}
    places = Names(empty)
    return {names.language_name(name) for name in opened.part(names.LANGUAGE) if places.place(name) in linear}


def _tensors(draft: Draft, layers: set[str], bits: Bits) -> tuple[Tensors, int]:
    """The tensors of the new folder, and how many of the old ones are quantised in it."""
    made: Tensors = {}
    count = 0
    for name, places in draft.places.items():
        tensor = draft.opened.tensors[name]
        for _, target in places:
            if name in layers:
                count += 1
                made |= dict((_int8 if bits == 8 else _nf4)(target, tensor))
            else:
                made[target] = tensor
    if not count:
        raise ModelError(f"{draft.opened.folder}: its language model has no linear layer to quantise")
    return made, count


class _Once:
    """What one tensor becomes, made when the first of its parts is written and let go with the last."""

    def __init__(self, make: Callable[[], list[torch.Tensor]], parts: int) -> None:
        self._make, self._parts, self._made = make, parts, list[torch.Tensor]()

    def part(self, number: int) -> torch.Tensor:
        if not self._made:
            self._made = self._make()
        value = self._made[number]
        if number == self._parts - 1:
            self._made = []
        return value


def _parts(
    tensor: Lazy,
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]],
    make: Callable[[torch.Tensor], list[torch.Tensor]],
) -> Iterator[tuple[str, Lazy]]:
    once = _Once(lambda: make(tensor.read()), len(shapes))
    for number, (name, (shape, dtype)) in enumerate(shapes.items()):
        yield name, Lazy(shape, dtype, tensor.where, lambda number=number: once.part(number))


def _int8(name: str, tensor: Lazy) -> Iterator[tuple[str, Lazy]]:
    """A row's largest number becomes 127; `SCB` (rows,) holds it. Rounded from float16, as bitsandbytes does."""

    def make(value: torch.Tensor) -> list[torch.Tensor]:
        from bitsandbytes.functional import int8_vectorwise_quant

        made, scales, _ = int8_vectorwise_quant(value.to(torch.float16))
        return [made, scales, torch.zeros((), dtype=torch.uint8)]

    module = name.removesuffix(".weight")
    shapes = {
        name: (tensor.shape, torch.int8),
        f"{module}.SCB": (tensor.shape[:1], torch.float32),
        f"{module}.weight_format": ((), torch.uint8),
    }
    yield from _parts(tensor, shapes, make)


def _nf4(name: str, tensor: Lazy) -> Iterator[tuple[str, Lazy]]:
    """Blocks of 64 numbers on the 16 quantiles of a normal distribution; their scales in 8 bits, offset and scaled."""

    def make(value: torch.Tensor) -> list[torch.Tensor]:
        from bitsandbytes.functional import quantize_4bit

        made, state = quantize_4bit(value, blocksize=BLOCK, quant_type="nf4", compress_statistics=True)
        told: Any = state.as_dict(packed=True)
        text = bytes(told["quant_state.bitsandbytes__nf4"].tolist()).ljust(_STATE_BYTES)
        described = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return [made, *(told[key] for key in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")), described]

    size = torch.Size(tensor.shape).numel()
    blocks = -(-size // BLOCK)
    shapes = {
        name: ((-(-size // 2), 1), torch.uint8),
        f"{name}.absmax": ((blocks,), torch.uint8),
        f"{name}.quant_map": ((16,), torch.float32),
        f"{name}.nested_absmax": ((-(-blocks // _NESTED_BLOCK),), torch.float32),
        f"{name}.nested_quant_map": ((256,), torch.float32),
        f"{name}.quant_state.bitsandbytes__nf4": ((_STATE_BYTES,), torch.uint8),
    }
    yield from _parts(tensor, shapes, make)


def _settings(bits: Bits, draft: Draft) -> dict[str, Any]:
    """transformers' `quantization_config`."""
    config = draft.opened.config
    computes = config.dtype if config.dtype in (torch.float16, torch.bfloat16) else torch.float32
    made: dict[str, Any] = {
        "quant_method": "bitsandbytes",
        "load_in_8bit": bits == 8,
        "load_in_4bit": bits == 4,
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": [head + name for name in _KEPT for head in ("", "model.", "language_model.")],
    }
    if bits == 4:
        made |= {
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_compute_dtype": str(computes).removeprefix("torch."),
        }
    return made


def _note_in_config(file: Path, settings: dict[str, Any]) -> None:
    fields = read_json(file) | {"quantization_config": settings}
    file.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
