"""A recipe's data, examined as its stages will read them, and their index left where training will find it.

Each stage is examined with its own model: tokenizer, template, limits, placement. A stage that starts from the model of
an earlier one, which need not be trained yet, reads its data as that stage's export will say.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from lapilli.base.errors import DataError
from lapilli.data.doctor.diagnosis import Diagnosis
from lapilli.data.doctor.examine import examine
from lapilli.data.doctor.record import Decode
from lapilli.recipe.files import check_files
from lapilli.recipe.load import LoadedRecipe
from lapilli.recipe.schema import Stage
from lapilli.train.reading import Reading, limits, read_corpus, read_description, reading


@dataclass(frozen=True)
class StageCheck:
    """What is known of a stage's data. `refused` says why training would refuse them, None if it would not."""

    name: str
    diagnosis: Diagnosis
    notes: tuple[str, ...]
    """Lines about what was left open, and where the indexes are."""
    refused: str | None
    indexed: bool

    @property
    def conclusion(self) -> str:
        """One line: may training start?"""
        if self.refused is not None:
            return f"train would refuse these data: {self.refused}"
        return "train can start with these data" if self.indexed else "nothing was found that train would refuse"

    @property
    def ok(self) -> bool:
        """Whether the stage can train, and its validation holds no training record."""
        return self.refused is None and not self.diagnosis.findings.records("leak")


def check_recipe(
    recipe: LoadedRecipe, *, decode: Decode = "header", workers: int = 0, stream: TextIO | None = None
) -> Iterator[StageCheck]:
    """Examine the data of every stage, one after the other.

    Raises DataError, naming all of them, for files that are not there, and RecipeError or ModelError as training would.
    """
    stages = recipe.recipe.stages
    check_files(stages)
    made: dict[str | None, Reading | None] = {}
    for stage in stages:
        how, open_end = _how(stage, made)
        made[stage.out] = how
        yield _checked(stage, how, open_end, decode, workers, stream)


def _how(stage: Stage, made: dict[str | None, Reading | None]) -> tuple[Reading | None, str]:
    """How the stage reads its data, or None and why that is not known yet."""
    if stage.model in made:
        before = made[stage.model]
        if before is None:
            return None, f"the model of the stage before it, {stage.model}, is not known: see there"
        return reading(stage, before.exported, before.tokenizer), ""
    if not Path(str(stage.model)).exists():
        return None, f"{stage.model}: no such folder yet; `lapilli build` makes it"
    return reading(stage, *read_description(str(stage.model))), ""


def _checked(
    stage: Stage, how: Reading | None, open_end: str, decode: Decode, workers: int, stream: TextIO | None
) -> StageCheck:
    data = stage.data
    sources = [*data.train, *data.validation]
    diagnosis = examine(
        data.train,
        data.validation,
        encoder=None if how is None else how.encoders(stage, sources),
        spec=None if how is None else how.spec.image,
        decode=decode,
        placement=data.placement,
        limits=limits(stage),
        workers=workers,
        stream=stream,
    )
    if how is None:
        bad = diagnosis.bad - diagnosis.findings.records("leak")
        refused = f"{bad:,} records can't be used" if bad else None
        return StageCheck(stage.name, diagnosis, (f"no model, and so no index: {open_end}",), refused, False)
    notes, refused = [], None
    mine = stage.model_copy(update={"data": data.model_copy(update={"workers": workers})})
    for what, split in (("training", data.train), ("validation", data.validation)):
        try:
            corpus = read_corpus(split, mine, how, True, stream) if split else None
        except DataError as error:
            refused = f"{what} data: {str(error).splitlines()[0].removesuffix(':')}"
            break
        if corpus is not None and corpus.kept:
            notes.append(f"data index of {what} data: {corpus.kept}")
        left = 0 if corpus is None else sum("left out as bad" in note.reason for note in corpus.index.notes)
        if left:
            notes.append(f"{left:,} bad records of {what} data are left out, as data.bad_records: quarantine allows")
    return StageCheck(stage.name, diagnosis, tuple(notes), refused, refused is None)
