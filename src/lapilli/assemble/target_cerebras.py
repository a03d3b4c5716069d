"""Cerebras' formats as a target: LLaVA's settings go in, and their writer says what their models can't hold.

Their folder is made from the same two tables as a LLaVA checkpoint, config.json of the model and of its encoder, so
everything that is settled for LLaVA's layout holds here too: the trained vocabulary, the tokenizer, the settings.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lapilli.assemble.folder import write_spec
from lapilli.assemble.kept import Kept
from lapilli.assemble.target_llava import llava_settings, needed_rows, write_generation, write_tokenizer
from lapilli.assemble.targets import Draft, Place, described, with_vocabulary
from lapilli.base.errors import ModelError
from lapilli.base.progress import Progress
from lapilli.checkpoint import llava_write
from lapilli.checkpoint.stream import Written

if TYPE_CHECKING:
    from lapilli.assemble.source import OpenModel


def to_cerebras(
    opened: OpenModel, kept: Kept | None, beside: Iterable[Path], *, version: str, model: str, form: Any
) -> Draft:
    """Cerebras' `model` (mmsimple-llava or llava) of a release, as a state file, plain tensors or their tree.

    `kept` is of LLaVA's layout. Raises ModelError for what their models can't hold, and for unknown releases.
    """
    from lapilli.checkpoint.cerebras import to_cerebras_config

    why_not = llava_write.why_not_llava(opened.config)
    if why_not is None and opened.config.image_newline:
        why_not = "they cut no pictures into tiles (anyres)"
    if why_not:
        raise ModelError(f"{opened.folder}: Cerebras' models can't hold this model: {why_not}")
    notes: list[str] = []
    made = with_vocabulary(opened, needed_rows(opened, notes))
    llava = llava_settings(made, kept)
    clip = llava_write.tower_fields(made.config)
    to_cerebras_config(llava, clip, version, model)
    spec = described(made, "cerebras")

    def write(draft: Draft, folder: Path, shard_bytes: int, hashes: bool, progress: Progress) -> dict[Place, Written]:
        from lapilli.checkpoint.cerebras import write_cerebras

        aside = folder / ".tokenizer"
        aside.mkdir()
        notes.extend(write_tokenizer(made, kept, beside, aside))
        write_generation(aside, made, kept)
        tokenizer = made.tokenizer
        done = write_cerebras(
            (llava, clip, made.tensors),
            folder,
            version,
            model=model,
            form=form,
            tokenizer=aside,
            token_ids={f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
            preprocessor=llava_write.tower_processor(spec.image),
            shard_bytes=shard_bytes,
            hashes=hashes,
            progress=progress,
        )
        shutil.rmtree(aside)
        draft.places = done.places
        notes.extend(done.notes)
        return done.written

    def finish(folder: Path) -> None:
        write_spec(folder, spec)

    places: dict[str, list[Place]] = {name: [("", name)] for name in made.tensors}
    return Draft(made, places, finish, notes, write)
