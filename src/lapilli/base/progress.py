"""One dense status line: live on a terminal, plain lines at intervals in a log file.

The caller words the line; this module decides when and how it is shown, and adds the time that is left wherever the end
is known: in units, or in bytes of the files that are read for them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, TextIO, TypeVar

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

T = TypeVar("T")

SIZES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
"""Units of bytes, as people and publishers count them."""


class Reading(Protocol):
    """What is read while the work goes on, for work whose number of units is known only at its end."""

    @property
    def total(self) -> int:
        """Bytes to be read."""
        ...

    def done(self, records: int, /) -> int:
        """Bytes that stand for the first `records` units."""
        ...


class Progress:
    """A context manager that shows how far some work is.

    The end is `total` units, or that of `reading`. On a terminal a bar is redrawn in place. Elsewhere a line is written
    at most every `interval_seconds`, and always for the first and the last report. Writes to `stream` (default:
    standard error), never to standard output.
    """

    def __init__(
        self,
        what: str,
        total: int | None = None,
        *,
        reading: Reading | None = None,
        stream: TextIO | None = None,
        interval_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        from rich.console import Console

        self.what = what
        self.total = total
        self.done = 0
        self._text = ""
        self._reading = reading
        self._interval_seconds = interval_seconds
        self._clock = clock
        self._start = clock()
        self._shown_at = float("-inf")
        self._shown: str | None = None
        self._console: Console = Console(file=stream or sys.stderr, soft_wrap=True, highlight=False)
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            from rich.live import Live

            self._live = Live(self._bar(), console=self._console, refresh_per_second=8, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._shown != self.line():
            self._write()

    def update(self, done: int, text: str = "", *, total: int | None = None) -> None:
        """Report that `done` units are done; `text` is what stands behind the count."""
        self.done, self._text = done, text
        self.total = self.total if total is None else total
        if self._live is not None:
            self._live.update(self._bar())
        elif self._clock() - self._shown_at >= self._interval_seconds:
            self._write(self._eta())

    def advance(self, units: int = 1, text: str = "") -> None:
        """Report that `units` more are done."""
        self.update(self.done + units, text)

    def write(self, text: str) -> None:
        """Write a line that stays, above the live one."""
        self._console.print(text, markup=False)

    def line(self) -> str:
        """The current state as one plain line, without the time that is left."""
        count = f"{self.done:,}" if self.total is None else f"{self.done:,}/{self.total:,}"
        read = ""
        if self._reading is not None and self._reading.total:
            read = f"{size_text(self._reading.done(self.done))} of {size_text(self._reading.total)}"
        return "  ".join(part for part in (f"{self.what} {count}", read, self._text) if part)

    def eta_seconds(self) -> float | None:
        """Seconds left at the average rate so far; None when unknown."""
        done, total = self._measured()
        if not total or done <= 0:
            return None
        return (self._clock() - self._start) / done * max(0, total - done)

    def _measured(self) -> tuple[int, int | None]:
        """What is done of what: units if their number is known, else bytes."""
        if self.total is None and self._reading is not None:
            return self._reading.done(self.done), self._reading.total
        return self.done, self.total

    def _eta(self) -> str:
        done, total = self._measured()
        if "eta" in self._text or (total is not None and done >= total) or (eta := self.eta_seconds()) is None:
            return ""
        return f"eta {duration(eta)}"

    def _write(self, eta: str = "") -> None:
        self._shown, self._shown_at = self.line(), self._clock()
        self._console.print("  ".join(filter(None, (self._shown, eta))), markup=False)

    def _bar(self) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        row = Table.grid(padding=(0, 1))
        cells: list[RenderableType] = [
            Text(self.what),
            Text(self.line().removeprefix(self.what).strip(), overflow="ellipsis"),
        ]
        done, total = self._measured()
        if total:
            cells.insert(1, ProgressBar(total=total, completed=done, width=20))
        if eta := self._eta():
            cells.append(Text(eta, style="dim"))
        row.add_row(*cells)
        return row


def track(items: Iterable[T], what: str, total: int | None = None, *, stream: TextIO | None = None) -> Iterator[T]:
    """Yield the items while showing how many have been worked on."""
    with Progress(what, total, stream=stream) as progress:
        for item in items:
            yield item
            progress.advance()


def duration(seconds: float) -> str:
    """Short form of a time span: `9s`, `2m05s`, `1h52m`, `3d04h`."""
    whole = max(0, round(seconds))
    for unit, size, smaller, small in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // small:02d}{smaller}"
    return f"{whole}s"


def size_text(size: int) -> str:
    """Bytes as a person reads them: `27.4 GB`."""
    unit = next((name for name, one in SIZES.items() if size < 999.5 * one), "TB")
    return f"{size / SIZES[unit]:.3g} {unit}"
