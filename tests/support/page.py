"""The page in this process, in front of a backend that says one sentence: for tests that need no model."""

import asyncio
import base64
import io
from contextlib import asynccontextmanager

import httpx
import PIL.Image
from starlette.responses import JSONResponse

from lapilli.data.template import get_template
from lapilli.serve.app import make_app
from lapilli.serve.backend import Card
from lapilli.serve.page.routes import Page
from lapilli.serve.settings import Keys, Limits


class OneSentence:
    """A `Backend`."""

    alive = True

    @asynccontextmanager
    async def life(self, metrics):
        yield

    async def cards(self):
        return [Card("parrot", 0, get_template("llava_v1"))]

    async def complete(self, body, request):
        return JSONResponse({"choices": [{"message": {"role": "assistant", "content": "Yes."}}]})

    def gauges(self):
        return {}


def page_app(*, page=None, keys=(), limits=None):
    return make_app(OneSentence(), Keys.of(keys), limits or Limits(), page=page or Page())


def ask(app, method, path, **more):
    """One request to an application, through its guard."""

    async def go():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return await client.request(method, path, **more)

    return asyncio.run(go())


def data_url(size=(8, 6), colour=(10, 200, 30), kind="PNG"):
    held = io.BytesIO()
    PIL.Image.new("RGB", size, colour).save(held, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(held.getvalue()).decode()}"
