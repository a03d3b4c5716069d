"""Adapters merged into the model they were trained on, a tensor at a time: a whole model folder, in the base's format.

An adapter is opened over its base with W + B·A·alpha/r waiting to be computed, in float32, when a tensor is read
(`lapilli.checkpoint.lora`), so merging is a conversion that changes no format, with a conversion's proof. An adapter
that was trained over quantised weights (QLoRA) is merged into the full ones.
"""

from collections.abc import Callable
from pathlib import Path

from lapilli.assemble.adapter import base_of
from lapilli.assemble.convert import ConversionReport, convert
from lapilli.assemble.kept import family_of
from lapilli.assemble.source import model_folder, recognise
from lapilli.base.atomic import refuse_taken
from lapilli.base.errors import ModelError

_FORMAT = {"llava-lora": "llava", "hf-lora": "hf"}
"""What such adapters become. Ours become what their base is: they go with any."""


def merge(
    adapter: Path | str,
    out: Path | str,
    base: Path | str | None = None,
    *,
    to: str | None = None,
    dtype: str | None = None,
    shard_size: str = "5GB",
    verify: str = "sample",
    template: str | None = None,
    say: Callable[[str], None] = lambda _line: None,
) -> ConversionReport:
    """Write the model that `adapter` makes of its base (by default the one it names) to the new folder `out`.

    `to` is another format than the base's. Raises ModelError if `adapter` is none, if its base is not found, quantised
    or not the one it was trained on; RunError if `out` exists or does not fit.
    """
    refuse_taken(Path(out))
    folder = model_folder(adapter)
    kind = recognise(folder)
    if kind not in (*_FORMAT, "lapilli-adapter"):
        raise ModelError(f"{folder}: no adapter but a folder of format {kind}; there is nothing to merge")
    return convert(
        folder,
        out,
        to or _FORMAT.get(kind) or _format_of_base(folder, base),
        base=base,
        dtype=dtype,
        shard_size=shard_size,
        verify=verify,
        template=template,
        say=say,
    )


def _format_of_base(folder: Path, base: Path | str | None) -> str:
    place = base or base_of(folder)
    if place is None or not Path(place).exists():
        raise ModelError(f"{folder}: its base ({place or 'not recorded'}) is not there; name it: --base DIR")
    return family_of(recognise(model_folder(place)))
