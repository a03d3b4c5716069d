"""Asking the judge everything that is not answered yet: several at a time, within pace and cost, kill it when you like.

A reply is written down the moment it is there and read afterwards, so that a killed run pays for nothing twice.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock
from typing import Any

from lapilli.base.errors import RunError
from lapilli.base.interrupt import StopWish
from lapilli.base.progress import Progress
from lapilli.evaluate.judge.endpoint import Attempt, Endpoint, EndpointError, GaveUpError, ask_patiently
from lapilli.evaluate.judge.pace import Pace
from lapilli.evaluate.judge.prompt import Asking, Request, body
from lapilli.evaluate.judge.reviews import Known, Store
from lapilli.evaluate.judge.spending import Estimate, Ledger, Price, estimate, reads, tokens_of

IN_A_ROW = 5
"""So many requests without an answer, one behind the other, and the rest is not tried."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How fast, and for how much."""

    concurrency: int = 4
    requests_per_minute: float | None = None
    price: Price | None = None
    max_cost: float | None = None
    ask_again: bool = False
    """Ask again what was answered without readable scores."""
    forget_others: bool = False
    """Take out reviews of other requests than these (their replies are kept); else they are refused."""
    seed: int | None = None
    """Of the jitter."""


@dataclass
class Judged:
    """What a run came to."""

    path: Path
    requests: int
    known: int
    """Had replies before."""
    answered: int = 0
    retries: int = 0
    unreadable: Counter[str] = field(default_factory=Counter)
    """Reasons of replies without scores, of this run."""
    failed: list[tuple[Request, str]] = field(default_factory=list)
    unasked: int = 0
    ended: str | None = None
    """Why not everything was asked."""
    signal: str | None = None
    spent: float | None = None
    """Money, earlier runs with the same output included."""
    read: int = 0
    written: int = 0
    doubtful: int = 0


class _StoppedError(RunError):
    """The run ends; this request was not asked."""


class _CostError(_StoppedError):
    """Another attempt could pass the cost limit."""


def preview(requests: Sequence[Request], asking: Asking, settings: Settings, store: Store) -> Estimate:
    """What is left to ask and what it takes; asks nothing and writes nothing. Raises DataError for foreign reviews."""
    known = Known({}, set(), set())
    if store.replies_path.exists() and store.path.exists():
        with store:
            known = store.known(requests, settings.forget_others)
    if settings.ask_again:
        known = known.without(known.scoreless)
    left = [request for request in requests if not known.has(request)]
    return estimate(left, len(requests) - len(left), asking, settings.price)


def judge(
    requests: Sequence[Request],
    asking: Asking,
    endpoint: Endpoint,
    settings: Settings,
    store: Store,
    about: Mapping[str, Any],
) -> Judged:
    """Ask, read and write down every request without a review. `about` is what settings.json says of them.

    Raises DataError if the output holds other reviews, RunError if another process writes it. What the endpoint does
    wrong is in what is returned.
    """
    with store, endpoint:
        if settings.forget_others:
            store.forget(store.others(requests))
        known = store.known(requests)
        if settings.ask_again:
            store.forget(known.scoreless)
            known = known.without(known.scoreless)
        store.settings(about)
        ledger = Ledger(settings.price, settings.max_cost)
        for tokens, doubtful, estimated in store.past_attempts():
            ledger.add(tokens, doubtful, estimated)
        made = Judged(store.path, len(requests), sum(map(known.has, requests)))
        for request in requests:  # a killed run may have left a reply that it did not read
            if request.digest in known.replies and request.digest not in known.reviewed:
                _note(made, store.review(request, known.replies[request.digest]))
        todo = [request for request in requests if not known.has(request)]
        _Run(made, asking, endpoint, settings, store, ledger).all(todo)
        made.spent, made.read, made.written, made.doubtful = ledger.spent, ledger.read, ledger.written, ledger.doubtful
        store.failed(made.failed, made.unasked)
    return made


def _note(made: Judged, wrong: Any) -> None:
    if wrong is not None:
        made.unreadable[wrong.reason] += 1


@dataclass
class _Run:
    made: Judged
    asking: Asking
    endpoint: Endpoint
    settings: Settings
    store: Store
    ledger: Ledger

    def __post_init__(self) -> None:
        self.stop = Event()
        self.pace = Pace(self.settings.requests_per_minute, self.stop)
        self.rng = random.Random(self.settings.seed)
        self.in_a_row = 0
        self.lock = Lock()

    def all(self, todo: Sequence[Request]) -> None:
        """Ask everything, this thread handing out and gathering."""
        if not todo:
            return
        left, running = deque(todo), dict[Future[Attempt], Request]()
        pool = ThreadPoolExecutor(self.settings.concurrency, thread_name_prefix="judge")
        try:
            with StopWish() as wish, Progress("judged", len(todo)) as bar:
                while left or running:
                    if wish.signal is not None and self.made.ended is None:
                        self.made.signal = wish.signal
                        self._end(f"stopped by {wish.signal}")
                    if self.made.ended is not None:
                        self.made.unasked += len(left)
                        left.clear()
                    self._hand_out(left, running, pool)
                    done, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                    for future in done:
                        self._gather(running.pop(future), future)
                    bar.update(self.made.answered, self._line())
        finally:
            self.stop.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _hand_out(
        self, left: deque[Request], running: dict[Future[Attempt], Request], pool: ThreadPoolExecutor
    ) -> None:
        while left and len(running) < self.settings.concurrency and self.made.ended is None:
            held = self._hold(left[0])
            if held is None:
                if not running:  # what is under way may turn out cheaper than it could
                    self._end(self._limit())
                    self.made.unasked += len(left)
                    left.clear()
                return
            request = left.popleft()
            running[pool.submit(self._one, request, held)] = request

    def _one(self, request: Request, held: float | None) -> Attempt:
        """Ask for one request, in a thread of its own; what its first attempt may cost is held already."""
        read, sent = reads(request, self.asking), body(request.item, request.order, self.asking)

        def ask() -> Attempt:
            nonlocal held
            held = self._hold(request) if held is None else held
            if held is None:
                raise _CostError(self._limit())
            if not self.pace.turn():
                raise _StoppedError("not asked")
            return self.endpoint.ask(sent)

        def heard(attempt: Attempt, number: int) -> None:
            nonlocal held
            tokens = tokens_of(attempt, read, self.asking.max_tokens)
            self.store.keep(request, attempt, number, tokens, read)
            self.ledger.add(tokens, attempt.billed == "perhaps", read)
            self.ledger.release(held or 0.0)
            held = None

        def rest(seconds: float, attempt: Attempt) -> None:
            with self.lock:
                self.made.retries += 1
            if attempt.wait_seconds is not None:
                self.pace.pause(attempt.wait_seconds)
            if not self.pace.sleep(seconds):
                raise _StoppedError("not asked")

        try:
            return ask_patiently(ask, self.endpoint.patience, rest, heard, self.rng)
        finally:
            self.ledger.release(held or 0.0)

    def _gather(self, request: Request, future: Future[Attempt]) -> None:
        try:
            attempt = future.result()
        except GaveUpError as error:
            self.made.failed.append((request, str(error)))
            self.in_a_row += 1
            if self.in_a_row >= IN_A_ROW:
                self._end(f"{IN_A_ROW} requests one behind the other without an answer; the last: {error}")
        except EndpointError as error:
            self.made.unasked += 1
            self._end(str(error))
        except _CostError as error:
            self.made.unasked += 1
            self._end(str(error))
        except _StoppedError:
            self.made.unasked += 1
        else:
            self.in_a_row = 0
            self.made.answered += 1
            _note(self.made, self.store.review(request, attempt))

    def _hold(self, request: Request) -> float | None:
        return self.ledger.hold(reads(request, self.asking), self.asking.max_tokens)

    def _end(self, why: str) -> None:
        if self.made.ended is None:
            self.made.ended = why
        self.stop.set()

    def _limit(self) -> str:
        spent = self.ledger.spent or 0.0
        return f"the cost limit of {self.settings.max_cost:g} could be passed by one more request ({spent:.4f} spent)"

    def _line(self) -> str:
        parts = [f"{self.made.retries} retries"] if self.made.retries else []
        if self.made.failed:
            parts.append(f"{len(self.made.failed)} failed")
        if self.made.unreadable:
            parts.append(f"{sum(self.made.unreadable.values())} unreadable")
        if (spent := self.ledger.spent) is not None:
            parts.append(f"cost {spent:.4f}")
        return "  ".join(parts)
