"""One dense status line: live on a terminal, plain lines at intervals in a log file.

The caller words the line; this module only decides when and how it is shown.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, TextIO, TypeVar

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

T = TypeVar("T")


class Progress:
    """A context manager that shows how far some work is.

    On a terminal a bar is redrawn in place. Elsewhere a line is written at most every `interval_seconds`, and always
    for the first and the last report. Writes to `stream` (default: standard error), never to standard output.
    """

    def __init__(
        self,
        what: str,
        total: int | None = None,
        *,
        stream: TextIO | None = None,
        interval_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        from rich.console import Console

        self.what = what
        self.total = total
        self.done = 0
        self._text = ""
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
            self._write(self.line())

    def update(self, done: int, text: str = "", *, total: int | None = None) -> None:
        """Report that `done` units are done; `text` is what stands behind the count."""
        self.done, self._text = done, text
        self.total = self.total if total is None else total
        if self._live is not None:
            self._live.update(self._bar())
        elif self._clock() - self._shown_at >= self._interval_seconds:
            self._write(self.line())

    def advance(self, units: int = 1, text: str = "") -> None:
        """Report that `units` more are done."""
        self.update(self.done + units, text)

    def write(self, text: str) -> None:
        """Write a line that stays, above the live one."""
        self._console.print(text, markup=False)

    def line(self) -> str:
        """The current state as one plain line."""
        count = f"{self.done:,}" if self.total is None else f"{self.done:,}/{self.total:,}"
        return "  ".join(part for part in (f"{self.what} {count}", self._text) if part)

    def eta_seconds(self) -> float | None:
        """Seconds left at the average rate so far; None when unknown."""
        if self.total is None or self.done == 0:
            return None
        return (self._clock() - self._start) / self.done * (self.total - self.done)

    def _write(self, line: str) -> None:
        self._console.print(line, markup=False)
        self._shown, self._shown_at = line, self._clock()

    def _bar(self) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        row = Table.grid(padding=(0, 1))
        cells: list[RenderableType] = [
            Text(self.what),
            Text(self.line().removeprefix(self.what).strip(), overflow="ellipsis"),
        ]
        if self.total:
            cells.insert(1, ProgressBar(total=self.total, completed=self.done, width=20))
        if self.done and (eta := self.eta_seconds()) is not None and "eta" not in self._text:
            cells.append(Text(f"eta {duration(eta)}", style="dim"))
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
