"""Carrying out a plan: download, check, unpack, note what was done; then see that every picture named is there.

One source that fails does not stop the others; what failed is listed, and the same command goes on from there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from lapilli.base.errors import DataError
from lapilli.base.http import Expected, Fetcher, HttpError
from lapilli.base.progress import Progress, duration, size_text
from lapilli.data.fetch.extract import Unpacked, unpack, unpacked_bytes
from lapilli.data.fetch.links import Linked, fetch_links
from lapilli.data.fetch.pictures import Named, check_pictures
from lapilli.data.fetch.plan import DOWNLOADS, Plan, Receipt, Step, free_bytes, read_receipts, write_receipt
from lapilli.data.fetch.table import Item

_MEGA = 10**6
_MAX_UNKNOWN_BYTES = 5 * 10**9


@dataclass
class Outcome:
    """What came of a plan. `notes` are facts to show; `problems` make the command fail."""

    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def run_plan(plan: Plan, fetcher: Fetcher, *, keep_archives: bool = False, stream: TextIO | None = None) -> Outcome:
    """Do every open step of a plan. Raises DataError if another fetch works in the same folder."""
    outcome = Outcome()
    with _alone(plan.out):
        for step in plan.steps:
            if step.state == "waits for you":
                outcome.problems.append(f"{step.name}: {_what_to_do(step, plan)}")
            if step.state == "here, not checked":
                outcome.notes.append(_taken_as_it_is(step, plan))
            if not step.is_open:
                continue
            try:
                if step.item.links is not None:
                    _links(plan, step, fetcher, outcome, stream)
                else:
                    _file(plan, step, fetcher, outcome, keep_archives, stream)
            except HttpError as error:
                outcome.problems.append(f"{step.name}: {error}{_remedy(step.item, error)}")
            except DataError as error:
                outcome.problems.append(f"{step.name}: {error}")
        _look_at_pictures(plan, outcome)
    return outcome


def _what_to_do(step: Step, plan: Plan) -> str:
    if step.item.links is not None:
        return f"waits for {plan.out / step.item.links.list}"
    return f"{step.item.request}. Page: {step.item.page}. Put it at {plan.out / step.item.save} and run this again"


def _taken_as_it_is(step: Step, plan: Plan) -> str:
    return f"{step.name}: {plan.out / step.item.save} was there already and is taken as it is, not checked"


def _remedy(item: Item, error: HttpError) -> str:
    if error.status not in (401, 403):
        return ""
    return f"; {item.request} ({item.page})" if item.request else "; the source may want a login: give --token-file"


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keep a second fetch out of the folder."""
    import fcntl

    (out / DOWNLOADS).mkdir(parents=True, exist_ok=True)
    with open(out / DOWNLOADS / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"{out}: another `lapilli data fetch` works in this folder; wait for it") from error
        yield


def _file(
    plan: Plan, step: Step, fetcher: Fetcher, outcome: Outcome, keep_archives: bool, stream: TextIO | None
) -> None:
    item, path = step.item, plan.out / step.item.save
    if step.state == "here, to unpack":
        found = path.stat().st_size
        known = read_receipts(plan.out).get(step.name)
        receipt = known if known is not None and known.size == found else Receipt(item.page or "", found, "", "")
        if not receipt.checked:
            outcome.notes.append(_taken_as_it_is(step, plan))
    else:
        receipt = _download(step.name, item, path, fetcher, stream)
        write_receipt(plan.out, step.name, receipt)
        if receipt.checked in ("", "size"):
            more = f" but its size, {receipt.size:,} bytes" if receipt.checked else ""
            outcome.notes.append(f"{step.name}: came whole; nothing is published to check it with{more}")
    if item.unpack is None:
        return
    result = _unpack(step.name, item, path, plan.out, stream)
    done = Receipt(
        receipt.url, receipt.size, receipt.sha256, receipt.checked, receipt.revision, result.files, result.bytes
    )
    write_receipt(plan.out, step.name, done)
    skipped = "".join(f", {count:,} {what} left out" for what, count in result.skipped.items())
    kept = f", {result.kept:,} of them were there" if result.kept else ""
    into = plan.out / item.unpack.into
    outcome.notes.append(f"{step.name}: {result.files:,} files ({size_text(result.bytes)}) in {into}{kept}{skipped}")
    if not keep_archives and not item.by_hand:
        path.unlink()


def _download(name: str, item: Item, path: Path, fetcher: Fetcher, stream: TextIO | None) -> Receipt:
    expected = Expected(item.bytes, item.sha256, item.md5)
    most = item.bytes or round(1.5 * item.about if item.about else _MAX_UNKNOWN_BYTES)
    with Progress(name, stream=stream) as progress:
        bar = _Bar(progress)
        got = fetcher.download(item.url or "", path, expected, max_bytes=most, on_bytes=bar.show)
        progress.update(got.size // _MEGA, f"MB  {_checked(got.checked)}", total=max(1, got.size // _MEGA))
    return Receipt(got.url, got.size, got.sha256, got.checked, got.revision)


def _checked(checked: str) -> str:
    return f"{checked} agrees" if checked else "nothing to check it with"


def _unpack(name: str, item: Item, path: Path, out: Path, stream: TextIO | None) -> Unpacked:
    assert item.unpack is not None
    size = unpacked_bytes(path)
    most = item.unpack.max_unpacked or 2 * path.stat().st_size + 10**9
    if size is not None and size > free_bytes(out):
        raise DataError(f"{path}: unpacks to {size_text(size)} and {size_text(free_bytes(out))} are free")
    with Progress(f"{name} unpacking", stream=stream) as progress:
        last = time.monotonic()

        def show(files: int, done: int) -> None:
            nonlocal last
            if time.monotonic() - last > 0.1:
                last = time.monotonic()
                progress.update(done // _MEGA, f"MB  {files:,} files", total=size // _MEGA if size else None)

        result = unpack(path, out, item.unpack, max_bytes=most, on_file=show)
        progress.update(result.bytes // _MEGA, f"MB  {result.files:,} files", total=max(1, result.bytes // _MEGA))
    os.sync()  # the files are on the disk before the receipt says so
    return result


class _Bar:
    """Bytes so far as megabytes, speed and time left on a status line; what an earlier run brought is no speed."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._start: tuple[float, int] | None = None

    def show(self, done: int, total: int | None) -> None:
        now = time.monotonic()
        if self._start is None:
            self._start = (now, done)
        seconds, new = now - self._start[0], done - self._start[1]
        texts = ["MB"]
        if seconds > 0 and new > 0:
            texts.append(f"{new / seconds / _MEGA:.1f} MB/s")
            texts += [f"eta {duration(seconds / new * (total - done))}"] if total else []
        self._progress.update(done // _MEGA, "  ".join(texts), total=total // _MEGA if total else None)


def _links(plan: Plan, step: Step, fetcher: Fetcher, outcome: Outcome, stream: TextIO | None) -> None:
    links = step.item.links
    assert links is not None
    with Progress(f"{step.name} pictures", stream=stream) as progress:
        result: Linked = fetch_links(links, plan.out, plan.out / step.item.save, fetcher, progress)
    checked = Receipt(links.list, result.bytes, "", "", None, result.there, result.bytes, len(result.missing))
    write_receipt(plan.out, step.name, checked)
    unused = f"; {result.not_named:,} of the list are not named by {links.only_named_in}" if result.not_named else ""
    outcome.notes.append(f"{step.name}: {result.there:,} pictures there, none with a published checksum{unused}")
    if result.missing:
        reasons = ", ".join(f"{count:,}: {why}" for why, count in result.reasons().most_common(3))
        names = (plan.out / links.list).with_name("missing.json")
        outcome.problems.append(
            f"{step.name}: {len(result.missing):,} pictures could not be had ({reasons}); all in {names}. "
            "Run this again to try once more, or go on without them: `lapilli data check --fix` drops their records"
        )


def _look_at_pictures(plan: Plan, outcome: Outcome) -> None:
    """Compare every source's names with what is on the disk."""
    for source in plan.mixture.sources:
        path = plan.out / source.path
        if not path.is_file():
            continue
        try:
            found = check_pictures(path, plan.out / source.images)
        except DataError as error:
            outcome.problems.append(str(error))
            continue
        outcome.notes.append(_in_words(path, found))
        if found.missing:
            outcome.problems.append(
                f"{path}: {found.missing:,} of the {found.pictures:,} pictures it names are not below "
                f"{plan.out / source.images}, such as {', '.join(found.examples)}"
            )


def _in_words(path: Path, found: Named) -> str:
    there = "all there" if not found.missing else f"{found.missing:,} not there"
    return f"{path}: {found.records:,} records name {found.pictures:,} pictures, {there}"
