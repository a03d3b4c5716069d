"""`left_out.jsonl`: the records that a run does without, and why."""

import json

from lapilli.base import atomic
from lapilli.data.quarantine import BadRecord
from lapilli.data.stamp import kind_of
from lapilli.train.folder import LEFT_OUT
from lapilli.train.setup import Prepared


def list_left_out(ready: Prepared) -> None:
    """Name every record that a policy dropped or shortened. What a template leaves out of all of them is not listed."""
    index = ready.corpus.index
    everywhere = {kind for kind, count in index.note_counts().items() if count == index.records}
    notes = [(note.where, note.reason) for note in index.notes if kind_of(note.reason) not in everywhere]
    if ready.loader.quarantine is not None:
        notes += [_noted(ready, one) for one in ready.loader.quarantine.found.values()]
    if notes:
        lines = [json.dumps({"record": where, "what": what}, ensure_ascii=False) for where, what in notes]
        atomic.atomic_write(ready.folder.path / LEFT_OUT, "\n".join(lines) + "\n")


def _noted(ready: Prepared, bad: BadRecord) -> tuple[str, str]:
    """Record and reason of a bad record, as the list of what was left out has them."""
    where = ready.corpus.where(bad.sample)
    return where, f"left out as bad: {bad.reason.removeprefix(f'{where}: ')}"
