"""What an operator asks a cluster by hand: take this worker in; answer this question."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from lapilli.base.errors import RunError
from lapilli.serve.app import make_app
from lapilli.serve.cluster.web import Cluster
from lapilli.serve.metrics import Metrics
from lapilli.serve.refusal import ApiError
from lapilli.serve.settings import Keys, Limits

_SECONDS = 30.0


def register_worker(controller: str, worker: str, check_heart_beat: bool, key: str | None) -> list[str]:
    """Tell a controller of a worker; what the controller serves then.

    Raises RunError if it does not take it; the original's says so of no worker, and just does not list its models.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    body = {"worker_name": worker.rstrip("/"), "check_heart_beat": check_heart_beat, "worker_status": None}
    try:
        with httpx.Client(base_url=controller, headers=headers, timeout=_SECONDS, trust_env=False) as client:
            response = client.post("/register_worker", json=body)
            if response.status_code != 200:
                raise RunError(f"{controller}: {_message(response)}")
            return sorted(client.post("/list_models").json()["models"])
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{controller}: no controller answers there ({error or type(error).__name__})") from error


def ask_once(
    cluster: Cluster, limits: Limits, model: str | None, question: str, new_tokens: int
) -> tuple[list[str], str]:
    """(models, answer) of a cluster, asked as the web server asks. Raises RunError for whatever goes wrong."""

    async def ask() -> tuple[list[str], str]:
        async with cluster.life(Metrics()):
            models = [card.name for card in await cluster.cards()]
            if model is None and len(models) != 1:
                raise RunError(f"--model-name: one of {', '.join(models)}" if models else "no worker is registered")
            body = {
                "model": model or models[0],
                "messages": [{"role": "user", "content": question}],
                "temperature": 0.7,
                "max_tokens": new_tokens,
            }
            app: Any = make_app(cluster, Keys(), limits)
            async with httpx.AsyncClient(
                transport=httpx.ASGITransport(app), base_url="http://localhost", timeout=None
            ) as client:
                response = await client.post("/v1/chat/completions", json=body)
            if response.status_code != 200:
                raise RunError(_message(response))
            return models, str(response.json()["choices"][0]["message"]["content"])

    try:
        return asyncio.run(ask())
    except ApiError as error:
        raise RunError(error.message) from error


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"refused (HTTP {response.status_code})"
