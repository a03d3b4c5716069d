"""What judging costs: an estimate before, a ledger during, and a limit that is not passed.

Tokens are estimated from the text where the server does not state them. What may have been paid for (a reply that was
cut off, or came too late) counts as paid for in full.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from lapilli.base.errors import RecipeError, unknown
from lapilli.evaluate.judge.endpoint import Attempt
from lapilli.evaluate.judge.prompt import Asking, Request, content
from lapilli.evaluate.judge.rules import SYSTEM
from lapilli.evaluate.records import read_json

IMAGE_TOKENS = 1000
"""What a picture is taken for in estimates; endpoints count in their own ways."""
MESSAGE_TOKENS = 8
"""What two messages take beside their text."""
CAUTION = 1.25
"""A cost limit takes a prompt's estimated tokens so many times, until a server's own counts say more."""
TYPICAL_REPLY_TOKENS = 250
"""Two scores and a paragraph: GPT-4's on Quilt-LLaVA's 326 questions have about 210 on average."""


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars (or any money) per million tokens."""

    reading: float
    writing: float

    def of(self, read: float, written: float) -> float:
        return (read * self.reading + written * self.writing) / 1e6


@dataclass(frozen=True, slots=True)
class Estimate:
    """What is still to be asked, and what it will take."""

    requests: int
    """Still to be asked."""
    known: int
    """Asked already; their replies are used."""
    pictures: int
    read: int
    written: int
    """If replies are of typical length."""
    written_most: int
    price: Price | None = None

    @property
    def cost(self) -> float | None:
        return None if self.price is None else self.price.of(self.read, self.written)

    @property
    def cost_most(self) -> float | None:
        """With every reply as long as it may be; retries of unclear end are not in it."""
        return None if self.price is None else self.price.of(self.read, self.written_most)


def in_words(model: str, found: Estimate) -> list[str]:
    """What is about to be asked and spent, in a line or two."""
    pictures = f", with {found.pictures:,} pictures taken for 1,000 tokens each" if found.pictures else ""
    said = [
        f"{model}: {found.requests:,} requests to ask, {found.known:,} answered already; about {found.read:,} tokens "
        f"to read and {found.written:,} to write (at most {found.written_most:,}){pictures}"
    ]
    if found.cost is None or found.cost_most is None:
        return [*said, "no price known: a price for reading and one for writing give an estimate"]
    return [*said, f"about {found.cost:.4f}, at most {found.cost_most:.4f} without retries"]


def choose_price(
    model: str, reading: float | None, writing: float | None, table: str | Path | None, limited: bool
) -> Price | None:
    """The price from the two options, or the model's from a JSON table `{model: {"in": .., "out": ..}}`.

    Raises RecipeError for half a price, a table without the model, and a cost limit without a price.
    """
    if (reading is None) != (writing is None):
        raise RecipeError("--price-in and --price-out: give both, in money per million tokens")
    if reading is not None and writing is not None:
        return Price(reading, writing)
    if table is not None:
        known = read_json(table)
        if not isinstance(known, dict) or model not in known:
            raise RecipeError(f"--prices {table}: {unknown('model', model, known if isinstance(known, dict) else [])}")
        return _price(known[model], f'--prices {table}: "{model}"')
    if limited:
        raise RecipeError("--max-cost needs prices: --price-in and --price-out per million tokens, or --prices")
    return None


def _price(record: Any, where: str) -> Price:
    found = [record.get(name) if isinstance(record, dict) else None for name in ("in", "out")]
    numbers = [
        n for n in found if isinstance(n, int | float) and not isinstance(n, bool) and n >= 0 and math.isfinite(n)
    ]
    if len(numbers) != 2:
        raise RecipeError(f'{where}: must be {{"in": ..., "out": ...}}, money per million tokens')
    return Price(*map(float, numbers))


def count_tokens(text: str) -> int:
    """About how many tokens a text has: a quarter of its ASCII letters, one for each other character."""
    plain = sum(character < "\x80" for character in text)
    return math.ceil(plain / 4) + len(text) - plain


def reads(request: Request, asking: Asking) -> int:
    """About how many tokens the judge reads for a request."""
    pictured = asking.images is not None and request.item.image is not None
    text = count_tokens(SYSTEM) + count_tokens(content(request.item, request.order)) + MESSAGE_TOKENS
    return text + (IMAGE_TOKENS if pictured else 0)


def estimate(requests: Iterable[Request], known: int, asking: Asking, price: Price | None) -> Estimate:
    """What the requests will take."""
    listed = list(requests)
    count = len(listed)
    return Estimate(
        requests=count,
        known=known,
        pictures=sum(asking.images is not None and request.item.image is not None for request in listed),
        read=sum(reads(request, asking) for request in listed),
        written=count * min(TYPICAL_REPLY_TOKENS, asking.max_tokens),
        written_most=count * asking.max_tokens,
        price=price,
    )


def tokens_of(attempt: Attempt, read: int, most_written: int) -> dict[str, int]:
    """Tokens that an attempt is taken to have cost: the server's count, else the estimate; all of it if in doubt."""
    if attempt.billed == "no":
        return {"in": 0, "out": 0}
    if attempt.billed == "perhaps":
        return {"in": read, "out": most_written}
    written = count_tokens(attempt.content)
    return {"in": attempt.usage.get("prompt_tokens", read), "out": attempt.usage.get("completion_tokens", written)}


class Ledger:
    """Tokens and money so far, with what is under way held back; used from several threads."""

    def __init__(self, price: Price | None, limit: float | None) -> None:
        self.price, self.limit = price, limit
        self.read = self.written = 0
        self.doubtful = 0
        """Attempts that may or may not have been paid for."""
        self._held = 0.0
        self._worst = CAUTION
        """What a server counted for a prompt over what was estimated, at worst."""
        self._lock = Lock()

    def hold(self, read: int, most_written: int) -> float | None:
        """Set aside what a request may cost at most, and return it; None if the limit does not allow it.

        `read` is an estimate: it is taken `CAUTION` times, or as many times as an estimate was short so far.
        """
        if self.price is None or self.limit is None:
            return 0.0
        with self._lock:
            most = self.price.of(read * self._worst, most_written)
            if self._spent() + self._held + most > self.limit:
                return None
            self._held += most
        return most

    def release(self, held: float) -> None:
        """Give back what `hold` set aside."""
        with self._lock:
            self._held -= held

    def add(self, tokens: Mapping[str, int], doubtful: bool, estimated: int | None = None) -> None:
        """Enter an attempt; `estimated` is what its prompt was taken for."""
        with self._lock:
            self.read += tokens["in"]
            self.written += tokens["out"]
            self.doubtful += doubtful
            if estimated:
                self._worst = max(self._worst, tokens["in"] / estimated)

    @property
    def spent(self) -> float | None:
        """Money so far, earlier runs with the same output included; None without a price."""
        with self._lock:
            return None if self.price is None else self._spent()

    def _spent(self) -> float:
        return self.price.of(self.read, self.written) if self.price is not None else 0.0
