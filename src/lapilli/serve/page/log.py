"""What was said on the page, kept where the operator asked for it: LLaVA's log, one JSON object a line, a file a day.

A line is whole or not there, whoever else writes, also where the disk is full. Folder and files are the operator's
alone, for they hold what people said, their pictures and their addresses.
"""

from __future__ import annotations

import datetime
import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image

from lapilli.base.errors import DataError, RunError
from lapilli.data.picture import ImageLimits
from lapilli.data.template import Template, get_template
from lapilli.generate.conversation import open_picture
from lapilli.serve.naming import guess_template
from lapilli.serve.page.state import Said, Vote, as_sent, picture_hash, state_of
from lapilli.serve.reading import picture_bytes
from lapilli.serve.refusal import ApiError, invalid
from lapilli.serve.request import ImagePart

log = logging.getLogger(__name__)

_LONGEST_LINE = 1 << 20
_JPEG = "JPEG"


class ConversationLog:
    """Appends to a folder's `YYYY-MM-DD-conv.json`, and keeps pictures in its `serve_images/YYYY-MM-DD/MD5.jpg`.

    Safe to use from several threads, and by several servers at a time. `most_bytes`: of all that lies in the folder;
    beyond it nothing is kept. Raises RunError if the folder can't be made, or is not the operator's alone.
    """

    def __init__(self, folder: Path | str, limits: ImageLimits, most_images: int, most_bytes: int) -> None:
        self.folder = Path(folder)
        self._limits, self._most_images, self._most = limits, most_images, most_bytes
        self._lock = threading.Lock()
        self._full = False
        try:
            _make_private(self.folder)
            self._bytes = sum(one.stat().st_size for one in self.folder.rglob("*") if one.is_file())
        except OSError as error:
            raise RunError(f"--log-dir {folder}: {error.strerror}") from error

    def turn(
        self, said: Said, template: Template | None, start: float, finish: float, sampling: Mapping[str, Any]
    ) -> None:
        """Keep an answer with the conversation before it. Raises ApiError for what can't be kept."""
        pictures = self._pictures(said)
        entry = {
            "tstamp": round(finish, 4),
            "type": "chat",
            "model": said.model,
            "start": round(start, 4),
            "finish": round(finish, 4),
            "state": _state(said, template),
            "images": [name for name, _ in pictures],
            "ip": said.ip,
            "gen_params": dict(sampling),
        }
        self._write(entry, pictures)

    def vote(self, said: Said, template: Template | None, vote: Vote) -> None:
        """Keep what somebody thinks of the last answer. Raises ApiError if it can't be kept."""
        entry = {
            "tstamp": round(time.time(), 4),
            "type": vote,
            "model": said.model,
            "state": _state(said, template),
            "ip": said.ip,
        }
        self._write(entry, [])

    def _pictures(self, said: Said) -> list[tuple[str, PIL.Image.Image]]:
        """Name and pixels of each picture, in order."""
        places = [
            (f"messages.{i}.content.{j}", part.image_url.url)
            for i, turn in enumerate(said.messages)
            if not isinstance(turn.content, str)
            for j, part in enumerate(turn.content)
            if isinstance(part, ImagePart)
        ]
        if len(places) > self._most_images:
            raise invalid(f"{len(places)} pictures; this server takes {self._most_images} in a request", "messages")
        made: list[tuple[str, PIL.Image.Image]] = []
        for where, url in places:
            try:
                picture = as_sent(open_picture(picture_bytes(url, where, self._limits.max_bytes), self._limits))
            except DataError as error:
                raise invalid(f"{where}: {error}", where, "invalid_image") from error
            made.append((picture_hash(picture), picture))
        return made

    def _write(self, entry: Mapping[str, Any], pictures: Sequence[tuple[str, PIL.Image.Image]]) -> None:
        line = (json.dumps(entry) + "\n").encode()
        if len(line) > _LONGEST_LINE:
            raise ApiError(413, "the conversation is too long for the log", code="too_long_to_keep")
        day = datetime.datetime.now().date().isoformat()
        with self._lock:
            try:
                if self._bytes + len(line) > self._most:
                    raise OSError(0, f"the folder holds {self._bytes:,} bytes; --log-bytes allows {self._most:,}")
                for name, picture in pictures:
                    self._bytes += _keep(picture, self.folder / "serve_images" / day / f"{name}.jpg")
                _append(self.folder / f"{day}-conv.json", line)
            except OSError as error:
                if not self._full:
                    log.warning("conversations are not kept any more: %s", error.strerror)
                self._full = True
                raise ApiError(507, "this conversation could not be kept: the log is full", code="log_full") from error
            self._bytes += len(line)
            if self._full:
                log.warning("conversations are kept again")
            self._full = False


def _state(said: Said, template: Template | None) -> dict[str, Any]:
    known = template if template is not None else get_template(guess_template(said.model))
    return state_of(known, said.messages, said.conversation, said.model)


def _make_private(folder: Path) -> None:
    """A folder for its owner alone. Raises RunError for one that others may look into."""
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if made:
        folder.chmod(0o700)  # whatever the umask
    found = folder.stat()
    if found.st_mode & 0o077:
        raise RunError(f"--log-dir {folder}: others may look into it; chmod 700 it, or name a folder of its own")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise RunError(f"--log-dir {folder}: can't write there")


def _keep(picture: PIL.Image.Image, path: Path) -> int:
    """Write a picture unless it is there already; the bytes it took. Half a picture is never there under its name."""
    if path.exists():
        return 0
    for folder in (path.parent.parent, path.parent):
        folder.mkdir(exist_ok=True, mode=0o700)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(os.open(aside, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "wb") as stream:
            picture.save(stream, _JPEG)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return path.stat().st_size


def _append(path: Path, line: bytes) -> None:
    """Add a line, whole. Raises OSError, and leaves the file as it was, if there is no room for all of it."""
    with open(os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o600), "r+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        size = file.seek(0, os.SEEK_END)
        if size and os.pread(file.fileno(), 1, size - 1) != b"\n":  # another writer was killed in its line
            line = b"\n" + line
        try:
            written = file.write(line)
            if written != len(line):
                raise OSError(28, "No space left on device")
        except OSError:
            os.ftruncate(file.fileno(), size)
            raise
