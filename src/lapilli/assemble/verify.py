"""The proof at the end of a conversion: source and target are the same model.

The target is opened again from disk, by the reader that everybody else will use. Each of its tensors is compared, bit
for bit, with the source's tensor of the same meaning, after the change that was asked for (another dtype, rows of the
vocabulary) and no other; and both sides answer the same text and picture, from their own files, with their own
tokenizer, image settings and configuration, streamed so that neither is ever in memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import PIL.Image
import torch

from lapilli.assemble.source import OpenModel, open_model
from lapilli.assemble.streamed import ends_only, streamed
from lapilli.base.errors import ModelError
from lapilli.base.progress import Progress
from lapilli.checkpoint.stream import Lazy, open_folder, total_bytes
from lapilli.checkpoint.tensors import some, weight_file
from lapilli.data.image import normalise, to_tiles
from lapilli.model.quiet import quiet
from lapilli.model.shrink import SHRINK_ERRORS

How = Literal["sample", "full", "none"]

TEXT = ("USER: ", "\nWhat stands on the left of the picture, and how many of them? ASSISTANT: Two red")
"""Before and after the picture."""
TOLERANCE = 1e-4
"""Largest difference of logits between equal tensors that is put down to arithmetic, in units of their spread."""

_POSITIONS = 32
"""Logits are compared at so many positions, counted from the end."""
_PIECE = 2**24
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Verification:
    """What was compared and what was found."""

    how: How
    tensors: int = 0
    """Tensors of the target."""
    size_bytes: int = 0
    equal: int = 0
    """Tensors equal bit for bit, after the declared change."""
    cast: dict[str, int] = field(default_factory=dict)
    """Tensors stored in another dtype, by change: `float32 to float16`."""
    added_rows: dict[str, list[str]] = field(default_factory=dict)
    """Rows that a vocabulary table of the target has beyond the source's, by tensor, as the tokens they are for."""
    dropped_rows: dict[str, int] = field(default_factory=dict)
    """Rows, added by an earlier conversion, that the target does not have."""
    unused: list[str] = field(default_factory=list)
    """Tensors of the source that the target does not have."""
    invented: list[str] = field(default_factory=list)
    """Tensors of the target that come from none of the source."""
    different: list[str] = field(default_factory=list)
    overflowed: list[str] = field(default_factory=list)
    """Tensors with numbers that the target's dtype can't hold."""
    tensor_seconds: float = 0.0
    blocks: str = ""
    """What was run for the logits."""
    inputs_equal: bool = True
    """Both sides made the same token ids and pixels of the fixed text and picture."""
    logits_difference: float | None = None
    """Largest absolute difference."""
    logits_spread: float | None = None
    """Standard deviation of the source's logits."""
    not_run: str = ""
    """Why logits were not compared."""
    logits_seconds: float = 0.0

    @property
    def problems(self) -> list[str]:
        """What shows that the target is another model; empty if nothing does."""
        found = [
            f"{len(names)} tensors {what}: {some(names)}"
            for what, names in (
                ("of the source are not in the target", self.unused),
                ("of the target come from none of the source", self.invented),
                ("differ", self.different),
                ("have numbers that are too large for the target's dtype", self.overflowed),
            )
            if names
        ]
        if not self.inputs_equal:
            found.append("text or picture become other numbers: tokenizer or image settings differ")
        if not self.cast and self.logits_difference is not None and self.logits_spread is not None:
            limit = TOLERANCE * self.logits_spread
            found += [f"logits differ by {self.logits_difference:.1e}"] if not self.logits_difference <= limit else []
        return found

    def as_dict(self) -> dict[str, Any]:
        """For conversion.json."""
        return asdict(self) | {"problems": self.problems}

    def rows(self) -> list[tuple[str, str]]:
        """A short table: what was compared, and what was found."""
        if self.how == "none":
            return [("verified", "no (--verify none)")]
        made = [("tensors", f"{self.equal} of {self.tensors} equal bit for bit ({self.size_bytes / 1e9:.2f} GB)")]
        made += [("stored as", f"{change} ({count} tensors)") for change, count in sorted(self.cast.items())]
        made += [("rows added", f"{name}: {_few(tokens)}") for name, tokens in self.added_rows.items()]
        made += [("rows dropped", f"{name}: {rows}") for name, rows in self.dropped_rows.items()]
        if self.logits_difference is None:
            made.append(("logits", f"not compared: {self.not_run}"))
        else:
            size = f"largest difference {self.logits_difference:.1e} (their spread is {self.logits_spread:.2f})"
            made += [("logits", size), ("run", self.blocks)]
        made.append(("time", f"tensors {self.tensor_seconds:.1f} s, logits {self.logits_seconds:.1f} s"))
        return made + [("PROBLEM", problem) for problem in self.problems]


def _few(tokens: list[str]) -> str:
    return ", ".join(tokens[:4]) + (f" and {len(tokens) - 4} more" if len(tokens) > 4 else "")


def verify(
    opened: OpenModel,
    target: Path,
    places: Mapping[str, Sequence[tuple[str, str]]],
    how: How,
    *,
    say: Callable[[str], None] = lambda _line: None,
) -> Verification:
    """Compare the folder `target` with the model that it was made from.

    `places` says what became of each tensor of the source: sub-folders of the target (empty: itself) and names there.
    `sample` compares every tensor, and logits through the first and last two blocks; `full` runs the whole of both, one
    after the other. Nothing is raised for a difference: see `Verification.problems`.
    """
    made = Verification(how)
    if how == "none":
        return made
    with quiet():
        written = open_model(target)
        began = time.monotonic()
        say("comparing every tensor")
        _compare_tensors(opened, written, places, made)
        made.tensor_seconds = time.monotonic() - began
        began = time.monotonic()
        say("comparing logits")
        _compare_logits(opened, written, made)
        made.logits_seconds = time.monotonic() - began
    return made


# ---- tensors ----------------------------------------------------------------------------------------------------


def _compare_tensors(
    opened: OpenModel, written: OpenModel, places: Mapping[str, Sequence[tuple[str, str]]], made: Verification
) -> None:
    ours, theirs = opened.tensors, written.tensors
    copies, strangers = _copies(written, places)
    made.unused = sorted(set(ours) - set(theirs))
    made.invented = sorted({*(set(theirs) - set(ours)), *strangers})
    pairs = [(name, ours[name], theirs[name]) for name in ours if name in theirs]
    pairs += [(tensor.where, ours[name], tensor) for name, tensor in copies if name in ours]
    made.tensors = len(theirs) + len(copies)
    made.size_bytes = total_bytes(tensor for *_, tensor in pairs)
    with Progress("comparing (MB)", made.size_bytes // 10**6) as progress:
        done = 0
        for name, one, other in pairs:
            _compare(name, one, other, opened, written, made)
            done += other.size_bytes
            progress.update(done // 10**6)


def _copies(
    written: OpenModel, places: Mapping[str, Sequence[tuple[str, str]]]
) -> tuple[list[tuple[str, Lazy]], set[str]]:
    """Tensors of the target that its reader passes over, with what they are copies of; and those that are none's."""
    read = {tensor.where for tensor in written.tensors.values()}
    origin = {(folder, name): source for source, found in places.items() for folder, name in found}
    copies, strangers = [], set()
    for folder in sorted({"", *(folder for folder, _ in origin)}):
        if weight_file(written.folder / folder) is None:
            continue
        for name, tensor in open_folder(written.folder / folder).items():
            if (folder, name) not in origin:
                strangers.add(tensor.where)
            elif tensor.where not in read:
                copies.append((origin[folder, name], tensor))
    return copies, strangers


def _compare(name: str, ours: Lazy, theirs: Lazy, opened: OpenModel, written: OpenModel, made: Verification) -> None:
    rows = _shared_rows(ours, theirs, opened, written)
    if rows is None:
        made.different.append(name)
        return
    if theirs.shape and rows < theirs.shape[0]:
        tokens = written.tokenizer.convert_ids_to_tokens(list(range(rows, theirs.shape[0])))
        made.added_rows[name] = [token or f"row {rows + i}" for i, token in enumerate(tokens)]
    elif ours.shape and rows < ours.shape[0]:
        made.dropped_rows[name] = ours.shape[0] - rows
    if ours.dtype != theirs.dtype:
        change = f"{str(ours.dtype).removeprefix('torch.')} to {str(theirs.dtype).removeprefix('torch.')}"
        made.cast[change] = made.cast.get(change, 0) + 1
    one, other = ours.read(), theirs.read()
    if ours.shape:
        one, other = one[:rows], other[:rows]
    same, overflowed = _same(one.reshape(-1), other.reshape(-1))
    if overflowed:
        made.overflowed.append(name)
    if same:
        made.equal += 1
    else:
        made.different.append(name)


def _shared_rows(ours: Lazy, theirs: Lazy, opened: OpenModel, written: OpenModel) -> int | None:
    """Rows that both must have equal; None if the shapes can't be those of one tensor.

    Only tables with a row per token may differ, by rows for new tokens or by rows that no training has seen.
    """
    if ours.shape == theirs.shape:
        return ours.shape[0] if ours.shape else 0
    sizes = tuple(side.config.text_config.get_text_config().vocab_size for side in (opened, written))
    tables = bool(ours.shape and theirs.shape) and (ours.shape[0], theirs.shape[0]) == sizes
    if not tables or ours.shape[1:] != theirs.shape[1:]:
        return None
    rows = min(sizes)
    return rows if sizes[1] > sizes[0] or rows >= opened.trained_rows else None


def _same(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[bool, bool]:
    """Whether flat `ours`, in the dtype of `theirs`, has the same bits; and whether numbers became infinite by that."""
    same, overflowed = True, False
    for start in range(0, len(ours), _PIECE):
        one, other = ours[start : start + _PIECE], theirs[start : start + _PIECE]
        if one.dtype != other.dtype:
            wide, one = one, one.to(other.dtype)
            overflowed |= bool((torch.isfinite(wide) & ~torch.isfinite(one)).any())
        bits = _BITS[one.dtype.itemsize]
        same &= torch.equal(one.contiguous().view(bits), other.contiguous().view(bits))
    return same, overflowed


# ---- logits -----------------------------------------------------------------------------------------------------


def _compare_logits(opened: OpenModel, written: OpenModel, made: Verification) -> None:
    found = []
    for side in (opened, written):
        try:
            found.append(_logits(side, made))
        except (*SHRINK_ERRORS, ModelError) as error:
            made.not_run = f"{side.folder}: {' '.join(str(error).split())}"
            return
    (ids, pixels, ours), (their_ids, their_pixels, theirs) = found
    same_ids = ids.shape == their_ids.shape and torch.equal(ids, their_ids)
    same_pixels = pixels.shape == their_pixels.shape and torch.allclose(pixels, their_pixels, atol=1e-6)
    made.inputs_equal = same_ids and same_pixels
    columns = min(ours.shape[1], theirs.shape[1])
    made.logits_difference = float((ours[:, :columns] - theirs[:, :columns]).abs().max())
    made.logits_spread = float(ours.std())


@torch.no_grad()
def _logits(side: OpenModel, made: Verification) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids (T,) with -1 for the picture, pixels, and logits (positions, V) of one side."""
    run, made.blocks = ends_only(side) if made.how == "sample" else (side, "the whole model")
    config = side.config
    picture = fixed_picture()
    pixels = normalise(to_tiles(picture, side.spec.image, config.image_layout), side.spec.image)
    before, after = (side.tokenizer(text, add_special_tokens=i == 0).input_ids for i, text in enumerate(TEXT))
    places = [config.image_token_id] * config.image_layout.tokens(*picture.size)
    ids = torch.tensor([*before, *places, *after])
    model = streamed(run)
    inputs = {"pixel_values": pixels, "tiles_per_image": torch.tensor([len(pixels)])}
    out = model(
        input_ids=ids[None],
        **inputs,
        image_sizes=torch.tensor([picture.size]),
        use_cache=False,
        logits_to_keep=_POSITIONS,
    )
    if not torch.isfinite(out.logits).all():
        raise ModelError("its logits are not finite")
    return torch.tensor([*before, -1, *after]), pixels, out.logits[0, -_POSITIONS:].float()


def fixed_picture() -> PIL.Image.Image:
    """A picture of smooth colours, the same everywhere."""
    generator = torch.Generator().manual_seed(7)
    coarse = torch.randint(0, 256, (5, 7, 3), generator=generator, dtype=torch.uint8).numpy()
    return PIL.Image.fromarray(coarse).resize((320, 240), PIL.Image.Resampling.BICUBIC)
