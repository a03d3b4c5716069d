"""Records that come twice, and what training data share with held-out data: by content, never by name.

A header check hashes the ends of large pictures only. Where equal ends leave it open whether two records or the two
sides share a picture, whole files are compared; nothing else is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b

import numpy as np

from lapilli.data.doctor.columns import Columns
from lapilli.data.doctor.picture import name_of
from lapilli.data.doctor.record import Problem

Doubtful = tuple[int, str]
"""(source, path) of a picture whose whole file must be hashed."""


def settle(usable: Columns, held_out: np.ndarray, hashed: Callable[[Iterable[Doubtful], int], Iterator[bytes]]) -> None:
    """Make the keys of all pictures exact on which something depends.

    `held_out` (sources,) says which sources are held-out data; `hashed` is given so many pictures and returns the
    hashes of their files, in order.
    """
    pictures = _doubtful(usable, held_out)
    if not len(pictures):
        return
    source = usable.source[usable.record_of_picture[pictures]]
    firsts: dict[bytes, int] = {}
    places = np.zeros(len(pictures), dtype=np.int64)
    asked: list[int] = []
    for k, picture in enumerate(pictures.tolist()):
        name = f"{source[k]}\0{usable.path(picture)}".encode("utf-8", "surrogatepass")
        place = firsts.setdefault(blake2b(name, digest_size=16).digest(), len(asked))
        if place == len(asked):
            asked.append(k)
        places[k] = place
    wanted = ((int(source[k]), usable.path(int(pictures[k])) or "") for k in asked)
    keys = list(hashed(wanted, len(asked)))
    usable.settle(pictures, (keys[place] for place in places.tolist()))


def _doubtful(usable: Columns, held_out: np.ndarray) -> np.ndarray:
    """Numbers (k,) of pictures whose ends are those of another picture that matters.

    That is one of a record with the same words, or one on the other side of train and validation.
    """
    if not len(usable.picture_keys):
        return np.zeros(0, dtype=np.int64)
    records = _groups(usable.identities)
    again = (np.bincount(records) > 1)[records]
    of = usable.record_of_picture
    pictures = _groups(usable.picture_keys)
    wanted, trained, kept = (np.zeros(int(pictures.max()) + 1, dtype=bool) for _ in range(3))
    wanted[pictures[again[of]]] = True
    side = held_out[usable.source][of]
    kept[pictures[side]] = True
    trained[pictures[~side]] = True
    wanted |= kept & trained
    return np.flatnonzero(wanted[pictures] & ~usable.exact & usable.has_path)


def repeats(usable: Columns, held_out: np.ndarray) -> Iterator[Problem]:
    """Duplicates within a side, then leaks, then leaked pictures, each in the order of the data.

    Sets `usable.leaked`.
    """
    usable.leaked = np.zeros(len(usable), dtype=bool)
    if not len(usable):
        return
    side = held_out[usable.source]
    groups = _groups(usable.identities)
    first = _first(2 * groups + side, np.arange(len(usable)))
    own = first[2 * groups + side]
    for i in np.flatnonzero(own != np.arange(len(usable))).tolist():
        yield _problem(usable, i, "duplicate", f"the same as {usable.where(int(own[i]))}")
    if not side.any():
        return
    held = _first(groups, np.flatnonzero(side))[groups]
    usable.leaked = ~side & (held >= 0)
    for i in np.flatnonzero(usable.leaked).tolist():
        yield _problem(usable, i, "leak", f"the same as {usable.where(int(held[i]))}, which is validation data")
    yield from _leaked_pictures(usable, side)


def _leaked_pictures(usable: Columns, side: np.ndarray) -> Iterator[Problem]:
    if not len(usable.picture_keys):
        return
    of = usable.record_of_picture
    groups = _groups(usable.picture_keys)
    other = _first(groups, np.flatnonzero(side[of]))[groups]
    for j in np.flatnonzero((other >= 0) & ~side[of] & ~usable.leaked[of]).tolist():
        where = usable.where(int(of[other[j]]))
        yield _problem(usable, int(of[j]), "leaked_picture", f"{name_of(usable.path(j))} is a picture of {where}")


def _problem(usable: Columns, i: int, code: str, message: str) -> Problem:
    return Problem(int(usable.source[i]), int(usable.number[i]), usable.where(i), code, message)


def _groups(keys: np.ndarray) -> np.ndarray:
    """(n,) int64: equal numbers, from 0, for equal rows of `keys` (n, 2)."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    ordered = keys[order]
    new = (ordered[1:] != ordered[:-1]).any(axis=1)
    groups = np.empty(len(keys), dtype=np.int64)
    groups[order] = np.concatenate([[0], np.cumsum(new)])
    return groups


def _first(groups: np.ndarray, among: np.ndarray) -> np.ndarray:
    """For each group the first of the places `among`, which are in order, that belongs to it; -1 where none does."""
    first = np.full(int(groups.max()) + 1, -1, dtype=np.int64)
    first[groups[among[::-1]]] = among[::-1]  # of several, the one assigned last stays
    return first
