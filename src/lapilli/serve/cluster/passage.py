"""One chat request on its way through a cluster: each of its answers from a worker of its own choosing."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import httpx

from lapilli.generate.text import HeldText
from lapilli.serve.cluster.asking import Asked, too_large
from lapilli.serve.cluster.frames import Said, gone, read_frames
from lapilli.serve.elsewhere.passage import Passage
from lapilli.serve.elsewhere.pieces import Delta, Usage
from lapilli.serve.refusal import ApiError

_FINISH = {"stop": "stop", "length": "length"}


class Errand:
    """What fetches a request's answers into its passage; `address` names a worker for each of them."""

    def __init__(
        self,
        passage: Passage,
        client: httpx.AsyncClient,
        address: Callable[[str], Awaitable[str]],
        asked: Asked,
        stops: Sequence[str],
    ) -> None:
        self._passage, self._client, self._address = passage, client, address
        self._prompt, self._stops = asked.prompt, stops
        self._body: dict[str, Any] = {"model": passage.model, **asked.fields}
        self._counted: list[Usage] = []

    async def run(self, index: int) -> None:
        """Bring one answer."""
        passage = self._passage
        try:
            async with passage.traffic.turn():
                url = f"{await self._address(passage.model)}/worker_generate_stream"
                async with self._client.stream("POST", url, json=self._body) as response:
                    if response.status_code != 200:
                        raise _refused(response.status_code)
                    await self._take(index, response)
        except ApiError as error:
            passage.fail(error)
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError):
            passage.fail(gone())

    async def _take(self, index: int, response: httpx.Response) -> None:
        """Pass on what a worker says, up to the end of its answer or the first stop string."""
        held = HeldText(self._stops, partial(self._say, index))
        said: Said | None = None
        had, cut = 0, False
        async for said in read_frames(response.aiter_raw()):
            text = said.answer(self._prompt)
            self._passage.open()
            cut = len(text) < had
            if cut:  # a stop string was cut off that had come in pieces; they were held back here
                break
            held.add(text[had:])
            had = len(text)
            if held.stopped:
                break
        if said is None:
            raise gone()
        if not cut:
            held.finish()
        if said.usage is not None:
            self._counted.append(Usage(said.usage.prompt_tokens, said.usage.completion_tokens))
        self._end(index, "stop" if held.stopped or cut else _FINISH.get(said.finish_reason or "", "stop"))

    def _say(self, index: int, text: str) -> None:
        self._passage.put(Delta(index, text))

    def _end(self, index: int, finish: str) -> None:
        passage = self._passage
        passage.put(Delta(index, finish=finish))
        if passage.growing:
            return
        if len(self._counted) == passage.answers:  # else a worker that counts nothing was among them
            passage.put(Usage(self._counted[0].prompt, sum(one.written for one in self._counted)))
        passage.end()


def _refused(status: int) -> ApiError:
    if status == 413:
        return too_large()
    if status == 429:
        return ApiError(429, "the worker's queue is full", code="queue_full", retry_seconds=2)
    return ApiError(502, f"the worker refused the request (HTTP {status})", code="worker_failed")
