"""One request to another server: sent when its turn comes, and read event by event."""

from __future__ import annotations

import httpx

from lapilli.serve.elsewhere.passage import Passage
from lapilli.serve.refusal import ApiError
from lapilli.serve.upstream.stream import broken, events, refusal

_CHAT = "/v1/chat/completions"


async def bring(passage: Passage, client: httpx.AsyncClient, engine: str, data: bytes) -> None:
    """Send a request, as a stream whether the user wants one or not, and put what comes back into its passage."""
    headers = {"content-type": "application/json", "accept": "text/event-stream"}
    try:
        async with (
            passage.traffic.turn(passage.answers),
            client.stream("POST", _CHAT, content=data, headers=headers) as response,
        ):
            if response.status_code != 200:
                raise await refusal(response, engine)
            if not response.headers.get("content-type", "").startswith("text/event-stream"):
                raise broken(engine, "it answered without a stream")
            passage.open()
            async for made in events(response, passage.answers, engine):
                passage.put(made)
        passage.end()
    except ApiError as error:
        passage.fail(error)
    except (httpx.HTTPError, httpx.StreamError) as error:
        began = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
        passage.fail(broken(engine, "no connection to it" if began else "it broke the connection off"))
