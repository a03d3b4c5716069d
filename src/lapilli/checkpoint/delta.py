"""Delta weights: what a model adds to its base, for bases that may not be handed on.

LLaVA v0 and v1.1 were published so, in the arithmetic kept here: both sides in float16, target minus base tensor by
tensor, and what the base lacks as it stands. The original held two models in memory and knew one projector; here
tensors pass one at a time, under whatever names.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from lapilli.base.atomic import atomic_folder, refuse_taken
from lapilli.base.errors import ModelError
from lapilli.base.progress import Progress
from lapilli.base.version import VERSION
from lapilli.checkpoint.names import canonical, said
from lapilli.checkpoint.stream import (
    Lazy,
    Tensors,
    check_space,
    copy_files,
    open_folder,
    total_bytes,
    write_folder,
)
from lapilli.checkpoint.tensors import read_json, some

FILE = "delta.json"
"""What a delta of ours says about its base."""

VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight", "transformer.wte.weight")
"""Tables with a row per token, of which a target may have more than its base: those rows stand as they are."""

_HEAD = "lm_head.weight"
_COMPANIONS = (".json", ".model", ".txt", ".jinja")
_DTYPE = torch.float16
_CHUNK = 2**22
_PIECES, _PIECE = 8, 2**14
_ROUNDED = 0.26
"""Share of sums that float16 must round above which a base can't be the delta's: see `_share_rounded`."""


@dataclass
class DeltaReport:
    """What was made, and from what."""

    kind: Literal["delta", "target"]
    out: Path
    tensors: int = 0
    whole: list[str] = field(default_factory=list)
    """Tensors that the base lacks, kept as they are."""
    grown: dict[str, int] = field(default_factory=dict)
    """Rows of a vocabulary table that the base lacks, kept as they are."""
    copied: list[str] = field(default_factory=list)
    base_checked: str = ""
    """How the base was recognised."""
    warning: str = ""
    """Why this is probably not the delta's base; empty if nothing speaks against it."""
    notes: list[str] = field(default_factory=list)


def make_delta(base: Path, target: Path, out: Path, *, shard_bytes: int = 5 * 10**9) -> DeltaReport:
    """Write `target` minus `base` to the new folder `out`, with what tells this base from others.

    Raises ModelError for a base of another shape or other names, RunError for an `out` that exists or does not fit.
    """
    report = DeltaReport("delta", out)
    below, above = _open(base, target, out, report)
    report.base_checked = "its fingerprint is recorded in the delta"
    about = {"format": 1, "written_by": f"lapilli {VERSION}", "base": {k: _fingerprint(t) for k, t in below.items()}}
    _write(report, target, {k: _joined(t, below.get(k), -1) for k, t in above.items()}, about, shard_bytes)
    return report


def apply_delta(
    base: Path,
    delta: Path,
    out: Path,
    *,
    shard_bytes: int = 5 * 10**9,
    warn: Callable[[str], None] = lambda _line: None,
) -> DeltaReport:
    """Write `base` plus `delta` to the new folder `out`: the target.

    Raises ModelError for a base of another shape or other names, and for one that is not the delta's by its recorded
    fingerprint; where none is recorded, `warn` is told, before anything is written, if the numbers speak against it.
    RunError for an `out` that exists or does not fit.
    """
    report = DeltaReport("target", out)
    below, above = _open(base, delta, out, report)
    recorded = _recorded(delta)
    if recorded is not None:
        _check_fingerprints(base, delta, below, recorded)
        report.base_checked = f"it is the delta's by its fingerprint in {FILE}"
    else:
        share = _share_rounded(below, above)
        report.base_checked = f"no fingerprint recorded; {share:.1%} of sampled sums need rounding"
        if share > _ROUNDED:
            report.warning = (
                f"{base} is probably not the base of {delta}: {share:.0%} of the sampled sums don't fit float16, where "
                f"the right base leaves at most {_ROUNDED:.0%}; LLaVA's deltas are made on the original LLaMA "
                "weights, not on Vicuna or Llama 2"
            )
            warn(report.warning)
    _write(report, delta, {k: _joined(t, below.get(k), 1) for k, t in above.items()}, None, shard_bytes)
    return report


# ---- what fits what ---------------------------------------------------------------------------------------------


def _open(base: Path, above: Path, out: Path, report: DeltaReport) -> tuple[Tensors, Tensors]:
    """The tensors of both sides, after everything that can be checked without reading them."""
    refuse_taken(out)
    fields = {folder: read_json(folder / "config.json") for folder in (base, above)}
    below, upper = (_opened(folder, report) for folder in (base, above))
    tables = [below[name] for name in VOCABULARY if name in below]
    if tables and _HEAD in upper and _HEAD not in below and fields[base].get("tie_word_embeddings"):
        below[_HEAD] = tables[0]
    if _HEAD in below and _HEAD not in upper and fields[above].get("tie_word_embeddings"):
        del below[_HEAD]
        report.notes.append(f"{above}: its output layer is its embedding table; the base's {_HEAD} is not used")
    absent = set(below) - set(upper)
    if absent:
        raise ModelError(
            f"{above}: {len(absent)} tensors of the base {base} are not there: {some(absent)}; a delta needs both in "
            "the same layout (LLaVA's, see `lapilli convert --to llava`) and of the same size"
        )
    for name, tensor in upper.items():
        _check_shapes(name, tensor, below.get(name), report)
    report.tensors = len(upper)
    check_space(out, total_bytes(t.to(_DTYPE) for t in upper.values()))
    return below, upper


def _opened(folder: Path, report: DeltaReport) -> Tensors:
    kept, computed = canonical(open_folder(folder), lambda name: name)
    if computed:
        report.notes.append(f"{folder}: {said(computed)}")
    return kept


def _check_shapes(name: str, tensor: Lazy, base: Lazy | None, report: DeltaReport) -> None:
    if base is None:
        report.whole.append(name)
    elif tensor.dtype.is_floating_point != base.dtype.is_floating_point:
        raise ModelError(f"{tensor.where}: is of type {tensor.dtype}, but in the base ({base.where}) {base.dtype}")
    elif tensor.shape == base.shape:
        return
    elif name in VOCABULARY and tensor.shape[1:] == base.shape[1:] and tensor.shape[0] > base.shape[0]:
        report.grown[name] = tensor.shape[0] - base.shape[0]
    else:
        raise ModelError(
            f"{tensor.where}: has shape {tensor.shape}, but in the base ({base.where}) {base.shape}; "
            "this is not the base, or not of this size"
        )


def _recorded(delta: Path) -> Mapping[str, str] | None:
    file = delta / FILE
    if not file.is_file():
        return None
    found = read_json(file).get("base")
    if not isinstance(found, dict) or not all(isinstance(digest, str) for digest in found.values()):
        raise ModelError(f"{file}: `base` must give a digest for each tensor; copy the file again")
    return found


def _check_fingerprints(base: Path, delta: Path, below: Tensors, recorded: Mapping[str, str]) -> None:
    found = {name: _fingerprint(tensor) for name, tensor in below.items()}
    wrong = {name for name, _ in found.items() ^ recorded.items()}
    if wrong:
        raise ModelError(
            f"{base}: not the base that {delta} was made with: {len(wrong)} of {len(below)} tensors are others "
            f"({some(wrong)}); give the one it was made with"
        )


def _sample(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """Up to 131,072 of the first `size` numbers in reading order, in evenly spaced pieces, as float16."""
    flat = tensor.reshape(-1)
    if size <= _PIECES * _PIECE:
        return flat[:size].to(_DTYPE)
    starts = [number * (size - _PIECE) // (_PIECES - 1) for number in range(_PIECES)]
    return torch.cat([flat[start : start + _PIECE] for start in starts]).to(_DTYPE)


def _fingerprint(tensor: Lazy) -> str:
    """SHA-256 of a tensor's float16 numbers: of all of a small one, of evenly spaced pieces of a large one.

    Whole tables of 13 GB would take a minute to hash; another model differs in every piece.
    """
    size = torch.Size(tensor.shape).numel()
    made = hashlib.sha256(f"{list(tensor.shape)}".encode())
    made.update(_sample(tensor.read(), size).numpy().tobytes())
    return made.hexdigest()


def _share_rounded(below: Tensors, above: Tensors) -> float:
    """Share of the sampled sums base + delta that float16 can't hold exactly.

    A difference of two float16 numbers that are close is exact, and so is its sum with the same base; with another
    base the grids don't match. Gaussian weights: with the right base 1 % for a delta of 5 % of the base's deviation
    and 23 % for an unrelated target; with another base 31 % and 43 to 50 %. (Bases in bfloat16 have coarser
    grids, and even a wrong one may pass.)
    """
    rounded = changed = 0
    for name, base in below.items():
        size = torch.Size(base.shape).numel()
        if len(base.shape) < 2 or not base.dtype.is_floating_point:
            continue
        one, other = _sample(base.read(), size).float(), _sample(above[name].read(), size).float()
        total = one + other
        rounded += int(((total.to(_DTYPE).float() != total) & (other != 0)).sum())
        changed += int((other != 0).sum())
    return rounded / max(1, changed)


# ---- arithmetic -------------------------------------------------------------------------------------------------


def _joined(tensor: Lazy, base: Lazy | None, sign: int) -> Lazy:
    """`tensor` plus or minus `base` in float16; rows that the base lacks, and whole numbers, stand as they are."""
    if base is None or not tensor.dtype.is_floating_point:
        return tensor.to(_DTYPE)
    return tensor.then(lambda value: _sum(tensor, value, base, sign), dtype=_DTYPE)


def _sum(tensor: Lazy, value: torch.Tensor, base: Lazy, sign: int) -> torch.Tensor:
    """A piece after the other: rows come first in memory, so a shorter table is the beginning of a longer one."""
    made = torch.empty(tensor.shape, dtype=_DTYPE)
    out, upper, lower = made.view(-1), value.reshape(-1), base.read().reshape(-1)
    for start in range(0, len(out), _CHUNK):
        piece = out[start : start + _CHUNK]
        piece.copy_(upper[start : start + _CHUNK])
        below = lower[start : start + _CHUNK].to(_DTYPE)
        piece[: len(below)].add_(below, alpha=sign)
        if not all(math.isfinite(end) for end in piece.aminmax()):  # sixteen times as fast as asking each number
            raise ModelError(
                f"{tensor.where}: together with {base.where} gives numbers that are not finite in float16; "
                "one of the two is broken, or they don't belong together"
            )
    return made


# ---- the folder -------------------------------------------------------------------------------------------------


def _write(
    report: DeltaReport, source: Path, tensors: Tensors, about: Mapping[str, Any] | None, shard_bytes: int
) -> None:
    """Weights, the source's configuration in float16 and its tokenizer, and what is to be said of the base."""
    config = read_json(source / "config.json") | {"torch_dtype": "float16"}
    if "dtype" in config:
        config["dtype"] = "float16"
    names = [p.name for p in sorted(source.iterdir()) if p.suffix in _COMPANIONS and not _is_replaced(p.name)]
    with (
        atomic_folder(report.out) as draft,
        Progress(f"writing the {report.kind}", total_bytes(tensors.values())) as progress,
    ):
        _json(draft / "config.json", config)
        report.copied = copy_files(names, source, draft)
        if about is not None:
            _json(draft / FILE, about)
        write_folder(draft, tensors, shard_bytes=shard_bytes, progress=progress)
    if not any(name.startswith("tokenizer") for name in report.copied):
        report.notes.append(f"{source} has no tokenizer, so {report.out} has none; copy the target's own there")


def _is_replaced(name: str) -> bool:
    return name in (FILE, "config.json") or name.endswith(".index.json")


def _json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
