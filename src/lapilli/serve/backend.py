"""Where a server's answers come from: models in this process, another server, or workers elsewhere.

API, page, guards and bounds are the same in front of all of them. Whatever stands behind, a request that gets here has
a body that was measured and that fits `ChatRequest`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from fastapi import Request
from starlette.responses import Response

from lapilli.base.errors import nearest
from lapilli.data.template import Template
from lapilli.serve.metrics import Metrics
from lapilli.serve.refusal import ApiError
from lapilli.serve.request import ChatRequest

Gauges = Mapping[str, tuple[str, Iterable[tuple[dict[str, str], float]]]]
"""Name to what is measured and its values now, each with its labels."""


@dataclass(frozen=True, slots=True)
class Card:
    """A model as `/v1/models` shows it; `created` in seconds since 1970."""

    name: str
    created: int
    template: Template | None = None
    """How its conversations are written, where that is known; the log of what was said needs it."""


class Backend(Protocol):
    """Something that answers chat requests."""

    def life(self, metrics: Metrics) -> AbstractAsyncContextManager[None]:
        """Inside, requests can be answered. Entered once, before the first of them."""
        ...

    @property
    def alive(self) -> bool:
        """Whether answers are being made; what /health says."""
        ...

    async def cards(self) -> list[Card]:
        """What is served now. Raises ApiError if that can't be known."""
        ...

    async def complete(self, body: ChatRequest, request: Request) -> Response:
        """Answer a chat request, whole or as a stream. Raises ApiError for one that can't be answered."""
        ...

    def gauges(self) -> Gauges:
        """What /metrics shows beside the counters."""
        ...


def unknown_model(name: str, known: Iterable[str]) -> ApiError:
    """The refusal of a request for a model that is not served."""
    return ApiError(
        404,
        f"no such model here{nearest(name, list(known))}; GET /v1/models lists them",
        code="model_not_found",
        param="model",
    )
