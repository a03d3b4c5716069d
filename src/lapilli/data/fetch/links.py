"""A list of pictures, each fetched from its own address: OCR-VQA's book covers.

The list comes from outside, so only the hosts that the table names are asked, and an id becomes a file name only if
it is one. Every picture is saved as `id.jpg`, as LLaVA's mixture names them; its bytes stay as they came (the original
does the same, and a picture is read by what it holds, not by its name).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from lapilli.base.atomic import atomic_write
from lapilli.base.errors import DataError
from lapilli.base.http import Fetcher, HttpError
from lapilli.base.progress import Progress
from lapilli.data.fetch.pictures import named_pictures
from lapilli.data.fetch.table import Links

_SUFFIX = ".jpg"
_AT_ONCE = 8
_GIVE_UP_AFTER = 50
"""Failures without one success: then it is the network, or the host, and not the pictures."""


@dataclass
class Linked:
    """What came of a list: pictures there now, and why the others are not."""

    there: int = 0
    bytes: int = 0
    missing: dict[str, str] = field(default_factory=dict)
    """Id and reason."""
    not_named: int = 0
    """Pictures of the list that the annotations don't use."""

    def reasons(self) -> Counter[str]:
        """How often each reason is given, without the addresses in it."""
        return Counter(re.sub(r"https?://\S+", "", reason).strip(" :") for reason in self.missing.values())


def fetch_links(links: Links, out: Path, folder: Path, fetcher: Fetcher, progress: Progress) -> Linked:
    """Fetch every picture of the list that is wanted and not there. Raises DataError for a list that can't be used.

    A picture that can't be had is counted with its reason, written to `missing.json` beside the folder's list, and does
    not stop the others.
    """
    listed = read_list(out / links.list)
    wanted = _wanted(links, out)
    result = Linked(not_named=0 if wanted is None else sum(name not in wanted for name in listed))
    for name in sorted(set(wanted or ()) - set(listed)):
        result.missing[name] = f"the annotations name it, {PurePosixPath(links.list).name} does not"
    names = [name for name in listed if wanted is None or name in wanted]
    folder.mkdir(parents=True, exist_ok=True)
    succeeded = tried = 0
    progress.update(0, total=len(names))
    todo = (name for name in names if not _is_there(folder, name, result, progress))
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="fetch") as pool:
        running: dict[Future[int], str] = {}

        def start(count: int) -> None:
            for name in islice(todo, count):
                running[pool.submit(_one, links, listed[name], folder / (name + _SUFFIX), fetcher)] = name

        start(2 * _AT_ONCE)
        while running:
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                succeeded += _note(future, running.pop(future), result)
                tried += 1
            if not succeeded and tried >= _GIVE_UP_AFTER:
                raise DataError(f"{links.list}: the first {tried} pictures could not be had; last: {_last(result)}")
            progress.update(result.there + len(result.missing), _status(result))
            start(len(finished))
    text = json.dumps(dict(sorted(result.missing.items())), indent=1, ensure_ascii=False)
    atomic_write((out / links.list).with_name("missing.json"), text + "\n")
    return result


def read_list(path: Path) -> dict[str, str]:
    """Id and address of every picture. Raises DataError naming file and entry."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise DataError(f"{path}: can't read the list ({error.strerror})") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: must be an object of id and entry")
    addresses: dict[str, str] = {}
    for name, entry in value.items():
        address = entry.get("imageURL") if isinstance(entry, dict) else None
        if not isinstance(address, str):
            raise DataError(f"{path}: entry {name!r} has no `imageURL`")
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", name):
            raise DataError(f"{path}: entry {name!r} can't be a file name")
        addresses[name] = address
    return addresses


def _wanted(links: Links, out: Path) -> set[str] | None:
    """Ids that the annotations name; None if all are wanted."""
    if links.only_named_in is None:
        return None
    below = PurePosixPath(links.named_below)
    paths = (PurePosixPath(path) for path in named_pictures(out / links.only_named_in))
    return {path.stem for path in paths if path.parent == below}


def _is_there(folder: Path, name: str, result: Linked, progress: Progress) -> bool:
    path = folder / (name + _SUFFIX)
    if not path.is_file():
        return False
    result.there += 1
    result.bytes += path.stat().st_size
    progress.update(result.there + len(result.missing), _status(result))
    return True


def _one(links: Links, url: str, path: Path, fetcher: Fetcher) -> int:
    parts = urlsplit(url)
    if parts.hostname not in links.hosts:
        raise HttpError(f"{url}: its host is none of {', '.join(links.hosts)}")
    if parts.scheme == "http" and not links.http:
        raise HttpError(f"{url}: plain http is not allowed for this list")
    size = fetcher.download(url, path, max_bytes=links.max_each).size
    if not _is_picture(path):
        path.unlink()
        raise HttpError(f"{url}: what came is no picture")
    return size


def _is_picture(path: Path) -> bool:
    with open(path, "rb") as stream:
        head = stream.read(12)
    return head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"BM")) or head[8:12] == b"WEBP"


def _note(future: Future[int], name: str, result: Linked) -> bool:
    """Count what came of one picture; whether it came."""
    try:
        result.bytes += future.result()
    except HttpError as error:
        result.missing[name] = str(error)
        return False
    result.there += 1
    return True


def _last(result: Linked) -> str:
    return next(reversed(result.missing.values()))


def _status(result: Linked) -> str:
    return f"{len(result.missing):,} not to be had" if result.missing else ""
