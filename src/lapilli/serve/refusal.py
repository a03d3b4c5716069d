"""What the API refuses, in the shape that OpenAI's clients expect of an error.

One class carries status, code and the field that is wrong; where it is raised does not matter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lapilli.base.errors import LapilliError

_KINDS = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 502: "server_error",
          503: "server_error", 504: "timeout_error", 408: "timeout_error", 507: "server_error"}  # fmt: skip

_LONGEST = 300
"""Characters of a validator's message that are passed on; it may name a value."""


class ApiError(LapilliError):
    """A request that is not answered. `retry_seconds`: when asking again may help, told as `Retry-After`."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_seconds = retry_seconds

    @property
    def body(self) -> dict[str, Any]:
        """`{"error": {"message", "type", "param", "code"}}`."""
        kind = _KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def encoded(self) -> bytes:
        """The body as JSON."""
        return json.dumps(self.body, ensure_ascii=True).encode()

    @property
    def headers(self) -> dict[str, str]:
        """Headers that belong to the status."""
        made = {"content-type": "application/json"}
        if self.retry_seconds is not None:
            made["retry-after"] = str(max(1, math.ceil(self.retry_seconds)))
        if self.status == 401:
            made["www-authenticate"] = "Bearer"
        return made


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request whose contents can't be used: status 400."""
    return ApiError(400, message, param=param, code=code)


def from_validation(problems: Sequence[Mapping[str, Any]]) -> ApiError:
    """The refusal of a body that does not fit the schema; `problems` as pydantic lists them.

    Of a union's branches each reports its own problem; the one that got furthest into the body is meant.
    """
    if not problems:
        return invalid("the request can't be read")
    furthest = max(problems, key=lambda problem: len(problem["loc"]))
    param = _place(furthest["loc"])
    if furthest["type"] == "json_invalid":
        return invalid("the request's body is not JSON", code="invalid_json")
    said = str(furthest["msg"]).removeprefix("Value error, ")[:_LONGEST]
    if furthest["type"] == "extra_forbidden":
        return invalid(f"{param or 'body'}: unknown field", param, "unknown_parameter")
    return invalid(f"{param}: {said}" if param else said, param)


def _place(loc: Sequence[Any]) -> str | None:
    """`messages.0.content` from a location, without names of types."""
    made: list[str] = []
    for part in map(str, loc[1:] if loc and loc[0] == "body" else loc):
        named = part.isascii() and part.replace("_", "").replace("-", "").isalnum()
        if named and part != "str" and (not made or made[-1] != part):
            made.append(part[:64])
    return ".".join(made) or None
