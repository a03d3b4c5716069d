"""A server that runs already: its address is checked, and that it has the models it is to be asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

import httpx

from lapilli.base.errors import RunError, nearest
from lapilli.base.http import is_loopback
from lapilli.serve.upstream.backend import Elsewhere, Endpoint
from lapilli.serve.upstream.body import Dialect, Target

KEY_VARIABLE = "LAPILLI_ENGINE_KEY"
"""Holds the key of the other server."""
_HEALTH: Mapping[Dialect, str] = {"vllm": "/health", "sglang": "/health", "openai": "/v1/models"}


def engine_key(environment: Mapping[str, str] = os.environ) -> str | None:
    """The key that the other server is shown."""
    return environment.get(KEY_VARIABLE, "").strip() or None


def root_of(url: str, flag: str = "--engine-url") -> str:
    """A server's address without `/v1`. Raises RunError for one that is not https and not on this machine."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError as error:
        raise RunError(f"{flag} {url}: not a web address ({error})") from error
    if parts.username is not None or parts.password is not None:
        raise RunError(f"{flag} ...@{host}: a key belongs into {KEY_VARIABLE}, not into the address")
    if not host or parts.scheme not in ("http", "https") or parts.query or parts.fragment:
        raise RunError(f"{flag} {url}: give an address such as http://127.0.0.1:30000")
    if parts.scheme == "http" and not is_loopback(host):
        raise RunError(f"{flag} {url}: plain http goes to this machine only; others are asked over https")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"


def attach(
    engine: Dialect, url: str, given: Sequence[str], environment: Mapping[str, str] = os.environ
) -> tuple[list[Elsewhere], Endpoint]:
    """The models `given` (NAME there, or OURS=THEIRS) of a running server, and where it is.

    Raises RunError if it does not answer, refuses the key, or has not the models.
    """
    endpoint = Endpoint(root_of(url), engine, engine_key(environment), _HEALTH[engine])
    there = _listed(endpoint)
    models: dict[str, Elsewhere] = {}
    for one in given:
        ours, equals, theirs = one.partition("=")
        ours, theirs = (one, one) if not equals or one in there else (ours, theirs)
        if theirs not in there:
            known = f"; it has {', '.join(sorted(there)[:20])}" if there else ""
            raise RunError(f'{endpoint.root}: has no model "{theirs}"{nearest(theirs, there)}{known}')
        if not ours or ours in models or not ours.isprintable() or len(ours) > 300:
            raise RunError(f'"{one}": give each model a name of its own, as NAME or NAME=NAME_THERE')
        models[ours] = Elsewhere(ours, Target(theirs, engine))
    return list(models.values()), endpoint


def _listed(endpoint: Endpoint) -> list[str]:
    try:
        with httpx.Client(headers=endpoint.headers, trust_env=False, timeout=20.0) as client:
            response = client.get(f"{endpoint.root}/v1/models")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise RunError(f"{endpoint.root}: does not answer ({error or type(error).__name__})") from error
    if response.status_code in (401, 403):
        why = f"refuses the key in {KEY_VARIABLE}" if endpoint.key else f"wants a key; give it in {KEY_VARIABLE}"
        raise RunError(f"{endpoint.root}: {why}")
    try:
        return [str(model["id"]) for model in response.raise_for_status().json()["data"]]
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{endpoint.root}/v1/models: not the answer of an OpenAI server ({error})") from error
