"""A chat-completions endpoint that may fail: what it answered, whether to ask again, and after how long.

Every attempt is bounded in time and size, attempts are bounded in number, and each one is handed over with what came
back, word for word but for the key. The key goes nowhere but into the request's header.
"""

from __future__ import annotations

import json
import os
import random
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from lapilli.base.errors import RecipeError, RunError
from lapilli.base.http import is_loopback

if TYPE_CHECKING:
    import httpx

Outcome = Literal["answered", "again", "refused", "fatal"]
"""`again`: worth another try; `refused`: not this request; `fatal`: no request of this run."""
Billed = Literal["yes", "no", "perhaps"]

MAX_BYTES = 8 << 20
"""A reply longer than this is no judge's."""
SHORTEST_SECRET = 8
"""Shorter keys ("EMPTY", "none") are fillers for servers that want any, and stand in ordinary texts."""

_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529})
_ENDPOINT_WRONG = frozenset({401, 402, 404, 405})
# 403 is not among them: routers answer so to a single prompt that their moderation flags.
_NO_MONEY = frozenset({"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"})
_SETTING = re.compile(r"max_tokens|max_completion_tokens|temperature|unsupported[_ ](?:parameter|value)|image_url")


@dataclass(frozen=True, slots=True)
class Patience:
    """How long and how often."""

    attempts: int = 6
    timeout_seconds: float = 120.0
    backoff_seconds: float = 1.0
    max_backoff_seconds: float = 60.0
    max_wait_seconds: float = 600.0
    """The longest Retry-After that is waited for; a server that asks for more ends the run."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One request and what came of it."""

    outcome: Outcome
    reason: str
    billed: Billed
    status: int | None = None
    raw: str = ""
    """The reply as it came."""
    content: str = ""
    finish: str | None = None
    refusal: str | None = None
    usage: Mapping[str, int] = field(default_factory=dict)
    """`prompt_tokens` and `completion_tokens`, where the server states them."""
    model: str | None = None
    """What the server says has answered."""
    wait_seconds: float | None = None
    """What the server asks to wait."""
    seconds: float = 0.0


class EndpointError(RunError):
    """Nothing more can be asked of this endpoint in this run."""


class GaveUpError(RunError):
    """One request has no answer; others may have."""


@dataclass
class Endpoint:
    """The server; a context manager, safe to use from several threads."""

    url: str
    """Up to and with `/v1`."""
    key: str | None = field(default=None, repr=False)
    patience: Patience = field(default_factory=Patience)
    _client: httpx.Client | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/").removesuffix("/chat/completions")
        check_url(self.url, self.key)

    def __enter__(self) -> Endpoint:
        import httpx

        wait = httpx.Timeout(self.patience.timeout_seconds, connect=min(20.0, self.patience.timeout_seconds))
        headers = {"User-Agent": "lapilli", "Accept": "application/json", "Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        address = urlsplit(self.url)
        plain = address.scheme == "http" and is_loopback(address.hostname or "")
        self._client = httpx.Client(
            timeout=wait,
            verify=not plain,  # no certificates are read where none can be shown
            headers=headers,
            follow_redirects=False,  # the key goes to the named server and to no other
            mounts={f"all://{host}": None for host in ("localhost", "127.0.0.1", "[::1]")},  # never through a proxy
        )
        return self

    def __exit__(self, *_: object) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def ask(self, body: Mapping[str, Any]) -> Attempt:
        """One attempt. Raises nothing that the network or the server did: that is in what is returned."""
        import httpx

        if self._client is None:
            raise RuntimeError("use an Endpoint in a `with` statement")
        start = time.monotonic()
        sent = json.dumps(body).encode()  # ASCII, so that half a surrogate pair in a question can be sent too
        try:
            with self._client.stream("POST", f"{self.url}/chat/completions", content=sent) as response:
                raw, cut = _read(response, start + self.patience.timeout_seconds)
                made = self._judge(response, self.hide(raw), cut)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError) as error:
            made = Attempt("again", f"can't connect ({self.hide(str(error)) or type(error).__name__})", "no")
        except httpx.TimeoutException:
            made = Attempt("again", f"no answer within {self.patience.timeout_seconds:g} s", "perhaps")
        except (httpx.TransportError, httpx.StreamError, httpx.DecodingError) as error:
            made = Attempt(
                "again", f"the connection failed ({self.hide(str(error)) or type(error).__name__})", "perhaps"
            )
        return _timed(made, time.monotonic() - start)

    def hide(self, text: str) -> str:
        """The text without the key, which some servers repeat in their errors, in whole or in part."""
        if not self.key or len(self.key) < SHORTEST_SECRET:
            return text
        for form in (self.key, json.dumps(self.key)[1:-1]):
            text = text.replace(form, "[key]")
        # OpenAI shows a wrong key as its first and last letters with stars between.
        return re.sub(rf"{re.escape(self.key[:3])}[\w-]*\*{{3,}}[\w*-]*", "[key]", text)

    def _judge(self, response: httpx.Response, raw: str, cut: str | None) -> Attempt:
        status, wait = response.status_code, _wait_seconds(response.headers)
        if status in range(200, 300):
            if cut is not None:
                return Attempt("again", cut, "perhaps", status, raw)
            return read_reply(raw, status)
        reason = f"HTTP {status}: {_error_text(raw)}"
        if status in range(300, 400):
            reason = f"HTTP {status}: redirects are not followed; name the right --url"
            return Attempt("fatal", reason, "no", status, raw)
        code = _error_code(raw)
        if code in _NO_MONEY or status in _ENDPOINT_WRONG:
            return Attempt("fatal", reason, "no", status, raw)
        if status in _AGAIN or status >= 500:
            return Attempt("again", reason, "no", status, raw, wait_seconds=wait)
        if code in ("content_filter", "context_length_exceeded") or not _SETTING.search(raw):
            return Attempt("refused", reason, "no", status, raw)
        hint = "--temperature none, --limit-field max_completion_tokens and leaving out --images change what is sent"
        return Attempt("fatal", f"{reason}; {hint}", "no", status, raw)


def check_url(url: str, key: str | None) -> None:
    """Raise RecipeError for an address that is none, holds a password, or would carry the key unencrypted."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError as error:
        raise RecipeError(f"--url: not a web address ({error})") from error
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise RecipeError("--url: an address with a password or a ? in it is refused; the key comes from --key-env")
    if parts.scheme not in ("http", "https") or not host:
        raise RecipeError(f"--url {url}: must be an address such as https://api.openai.com/v1")
    if parts.scheme == "http" and key and not is_loopback(host):
        raise RecipeError(f"--url {url}: plain http would show the key to others; use https, or --key-env none")


def read_key(name: str, url: str) -> str | None:
    """The key for an address, from the environment. Raises RecipeError, which never shows it."""
    if name in ("", "none"):
        return None
    if not re.fullmatch(r"[A-Za-z_]\w*", name):  # perhaps the key itself, so it is not repeated
        raise RecipeError("--key-env: must be the name of an environment variable that holds the key")
    key = os.environ.get(name, "").strip()
    if not key:
        if is_loopback(urlsplit(url).hostname or ""):
            return None
        raise RecipeError(
            "--key-env: the environment variable that should hold the key is not set (default OPENAI_API_KEY); "
            "--key-env none sends no key"
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise RecipeError("--key-env: what the environment variable holds is no key (spaces or odd characters)")
    return key


def back_off(patience: Patience, attempt: int, asked: float | None, rng: random.Random) -> float:
    """Seconds to wait behind failure number `attempt` (from 1): doubled each time, jittered, never less than asked."""
    base = min(patience.max_backoff_seconds, patience.backoff_seconds * 2 ** (attempt - 1))
    return max(asked or 0.0, base / 2) + rng.uniform(0, base / 2)


def ask_patiently(
    ask: Callable[[], Attempt],
    patience: Patience,
    wait: Callable[[float, Attempt], None],
    heard: Callable[[Attempt, int], None],
    rng: random.Random,
) -> Attempt:
    """Ask until there is an answer; `heard(attempt, number)` gets every attempt before anything else is done.

    `wait(seconds, attempt)` lies between two. Raises GaveUpError when this request will not be answered, EndpointError
    when none will.
    """
    for number in range(1, patience.attempts + 1):
        made = ask()
        heard(made, number)
        if made.outcome == "answered":
            return made
        if made.outcome == "fatal":
            raise EndpointError(made.reason)
        if made.outcome == "refused":
            raise GaveUpError(made.reason)
        if made.wait_seconds is not None and made.wait_seconds > patience.max_wait_seconds:
            raise EndpointError(
                f"{made.reason}; the server asks to wait {made.wait_seconds:,.0f} s, more than --max-wait "
                f"{patience.max_wait_seconds:g}; the same command goes on later"
            )
        if number < patience.attempts:
            wait(back_off(patience, number, made.wait_seconds, rng), made)
        else:
            raise GaveUpError(f"{made.reason}; gave up after {number} attempts")
    raise AssertionError("patience has no attempts")


def _read(response: httpx.Response, deadline: float) -> tuple[str, str | None]:
    """The body as text, and why it is not whole, if it is not."""
    pieces: list[bytes] = []
    size, cut = 0, None
    for piece in response.iter_bytes():
        pieces.append(piece)
        size += len(piece)
        if size > MAX_BYTES:
            cut = f"the reply is longer than {MAX_BYTES:,} bytes"
        elif time.monotonic() > deadline:
            cut = "the reply was not complete in time"
        if cut:
            break
    return b"".join(pieces)[:MAX_BYTES].decode("utf-8", errors="replace"), cut


def read_reply(raw: str, status: int | None = 200) -> Attempt:
    """A reply of status 200: an answer only if it has the form of one. What has not, may have been paid for."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return Attempt("again", "the reply is not JSON", "perhaps", status, raw)
    choices = value.get("choices") if isinstance(value, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        told = _error_text(raw) if isinstance(value, dict) and "error" in value else "no choices in it"
        return Attempt("again", f"the reply is no chat completion ({told})", "perhaps", status, raw)
    message = choices[0].get("message")
    if not isinstance(message, dict):
        return Attempt("again", "the reply's choice has no message", "perhaps", status, raw)
    return Attempt(
        "answered",
        "",
        "yes",
        status,
        raw,
        content=_text(message.get("content")),
        finish=choices[0].get("finish_reason") if isinstance(choices[0].get("finish_reason"), str) else None,
        refusal=message["refusal"] if isinstance(message.get("refusal"), str) else None,
        usage=_usage(value.get("usage")),
        model=value["model"] if isinstance(value.get("model"), str) else None,
    )


def _text(value: Any) -> str:
    """A message's content: a text, or a list of parts with texts; nothing for anything else."""
    if isinstance(value, list):
        value = "".join(part["text"] for part in value if isinstance(part, dict) and isinstance(part.get("text"), str))
    # Half a surrogate pair is valid JSON and no valid UTF-8.
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else ""


def _usage(value: Any) -> dict[str, int]:
    if not isinstance(value, dict):
        return {}
    names = ("prompt_tokens", "completion_tokens")
    return {name: value[name] for name in names if isinstance(value.get(name), int) and value[name] >= 0}


def _error(raw: str) -> Mapping[str, Any]:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    error = value.get("error", value) if isinstance(value, dict) else {}
    return error if isinstance(error, dict) else {"message": error}


def _error_text(raw: str) -> str:
    """What the server says is wrong, in one line."""
    error = _error(raw)
    said = error.get("message") or error.get("detail") or raw
    return " ".join(str(said).split())[:300] or "no reason given"


def _error_code(raw: str) -> str | None:
    error = _error(raw)
    return next((error[name] for name in ("code", "type") if isinstance(error.get(name), str)), None)


def _wait_seconds(headers: httpx.Headers) -> float | None:
    """What Retry-After (seconds or a date) or OpenAI's retry-after-ms asks for; None if it is missing or nonsense."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        text = headers.get(name, "").strip()
        if re.fullmatch(r"\d+(?:\.\d+)?", text):
            return float(text) * unit
        if name == "retry-after" and text:
            try:
                when = parsedate_to_datetime(text)
            except ValueError:
                continue
            when = when if when.tzinfo is not None else when.replace(tzinfo=UTC)
            return max(0.0, (when - datetime.now(UTC)).total_seconds())
    return None


def _timed(attempt: Attempt, seconds: float) -> Attempt:
    return replace(attempt, seconds=round(seconds, 3))
