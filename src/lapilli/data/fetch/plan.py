"""What fetching a mixture into a folder would do: what is there, what would come, and how much disk it takes.

What was done is remembered in `OUT/downloads/receipts.json`: address, size, SHA-256 and what was unpacked. A second run
reads it and only does the rest.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from lapilli.base.atomic import write_json
from lapilli.base.errors import DataError, unknown
from lapilli.base.progress import size_text
from lapilli.data.fetch.extract import unpacked_bytes
from lapilli.data.fetch.table import Item, Links, Mixture

DOWNLOADS = "downloads"
RECEIPTS = "receipts.json"
_UNPACKED_SHARE = 1.03
"""Pictures are compressed already: an archive of them unpacks to about its own size."""
_SPARE_BYTES = 200_000_000

State = Literal["done", "partly here", "to fetch", "here, to unpack", "waits for you", "here, not checked", "skipped"]


@dataclass(frozen=True, slots=True)
class Receipt:
    """What is known of an item that came."""

    url: str
    size: int
    sha256: str
    checked: str
    revision: str | None = None
    unpacked_files: int | None = None
    unpacked_bytes: int | None = None
    not_there: int = 0
    """Pictures of a list that could not be had."""


@dataclass(frozen=True, slots=True)
class Step:
    """One item of a mixture, and where it stands. `fetch_bytes` and `unpack_bytes` are None where nobody says."""

    name: str
    item: Item
    state: State
    fetch_bytes: int | None
    unpack_bytes: int

    @property
    def is_open(self) -> bool:
        """Whether there is something that this command can do."""
        return self.state in ("partly here", "to fetch", "here, to unpack")


@dataclass(frozen=True, slots=True)
class Plan:
    """A mixture's steps in order."""

    name: str
    mixture: Mixture
    out: Path
    steps: tuple[Step, ...]

    @property
    def fetch_bytes(self) -> int:
        """Bytes to bring, as far as they are known."""
        return sum(step.fetch_bytes or 0 for step in self.steps if step.is_open)

    @property
    def unknown(self) -> list[str]:
        """Open steps whose size nobody publishes."""
        return [step.name for step in self.steps if step.is_open and step.fetch_bytes is None]

    def disk_bytes(self, keep_archives: bool) -> int:
        """The most disk that is needed at any moment, beyond what is used now."""
        now = most = 0
        for step in self.steps:
            if not step.is_open:
                continue
            now += step.fetch_bytes or 0
            most = max(most, now + step.unpack_bytes)
            now += step.unpack_bytes
            if step.item.unpack is not None and step.item.url is not None and not keep_archives:
                now -= step.item.size or 0
        return most

    def check_disk(self, keep_archives: bool) -> None:
        """Raises DataError if the disk can't take it."""
        need, free = self.disk_bytes(keep_archives), free_bytes(self.out)
        if need + _SPARE_BYTES > free:
            raise DataError(
                f"{self.out}: fetching {self.name} takes about {size_text(need)} and {size_text(free)} are free; "
                "choose another --out, or pass over it with --no-disk-check"
            )


def make_plan(name: str, mixture: Mixture, items: dict[str, Item], out: str | Path, skip: Collection[str] = ()) -> Plan:
    """Look at `out` and say where each item stands; changes nothing. Raises DataError for an item to skip that is not
    part of the mixture."""
    out = Path(out)
    if lost := [item for item in skip if item not in mixture.items]:
        raise DataError(f"--skip: {unknown('item', lost[0], mixture.items)}")
    receipts = read_receipts(out)
    steps = [_step(item, items[item], out, receipts.get(item), item in skip) for item in mixture.items]
    return Plan(name, mixture, out, tuple(steps))


def _step(name: str, item: Item, out: Path, receipt: Receipt | None, skipped: bool) -> Step:
    path = out / item.save
    state: State = "to fetch"
    if skipped:
        state = "skipped"
    elif receipt is not None and _is_done(item, out, receipt):
        state = "done"
    elif item.links is not None:
        state = _links_state(item.links, out, path)
    elif path.is_file() and item.unpack is not None:
        state = "here, to unpack"
    elif path.is_file():
        state = "here, not checked"
    elif item.by_hand:
        state = "here, not checked" if _holds_files(path) else "waits for you"
    elif part_of(path).is_file():
        state = "partly here"
    fetch = item.size
    if state == "here, to unpack":
        fetch = 0
    elif fetch is not None and item.links is None and state == "partly here":
        fetch = max(0, fetch - part_of(path).stat().st_size)
    return Step(name, item, state, fetch, _unpack_bytes(item, path))


def _holds_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _links_state(links: Links, out: Path, folder: Path) -> State:
    if not (out / links.list).is_file():
        return "waits for you"
    return "partly here" if folder.is_dir() else "to fetch"


def _is_done(item: Item, out: Path, receipt: Receipt) -> bool:
    path = out / item.save
    if item.links is not None:
        return receipt.not_there == 0 and path.is_dir()
    if item.unpack is not None:
        return receipt.unpacked_files is not None and (out / item.unpack.into).is_dir()
    return path.is_file() and path.stat().st_size == receipt.size


def _unpack_bytes(item: Item, path: Path) -> int:
    if item.unpack is None:
        return 0
    exact = unpacked_bytes(path) if path.is_file() else None
    return exact if exact is not None else round((item.size or 0) * _UNPACKED_SHARE)


def part_of(path: Path) -> Path:
    """Where an unfinished download of `path` lies."""
    return path.with_name(path.name + ".part")


def free_bytes(out: Path) -> int:
    """Free bytes on the disk that `out` is, or will be, on."""
    there = Path(os.path.abspath(out))
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free


def read_receipts(out: Path) -> dict[str, Receipt]:
    """What earlier runs noted. Raises DataError for a note that can't be read."""
    path = out / DOWNLOADS / RECEIPTS
    if not path.is_file():
        return {}
    try:
        return {name: Receipt(**value) for name, value in json.loads(path.read_text("utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: can't be read ({error}); remove it to have everything looked at again") from error


def write_receipt(out: Path, name: str, receipt: Receipt) -> None:
    """Add one item's receipt to the others."""
    known = {**read_receipts(out), name: receipt}
    write_json(out / DOWNLOADS / RECEIPTS, {item: asdict(value) for item, value in known.items()})
