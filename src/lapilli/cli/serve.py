"""`lapilli serve`: models behind OpenAI's API, for any client of it."""

from typing import Annotated, Any

import typer

from lapilli.base.errors import RunError
from lapilli.cli.held import held

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def serve(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...", help="Model folders, run folders, or adapter folders with --base; NAME=PATH names one."
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on; any but this machine's own needs a key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="Keys that may ask, one a line; or LAPILLI_API_KEY.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Model that adapters were trained on.", metavar="DIR")] = None,
    template: Annotated[str | None, typer.Option(help="Conversation template instead of the models' own.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...; auto takes a GPU where there is one.")] = "auto",
    load_8bit: Annotated[
        bool, typer.Option("--load-8bit", help="Hold the language model's layers in 8 bits (bitsandbytes).")
    ] = False,
    load_4bit: Annotated[bool, typer.Option("--load-4bit", help="Hold them in 4 bits, NF4.")] = False,
    slots: Annotated[int, typer.Option(min=1, help="Answers of one model that grow at a time.")] = 16,
    queue: Annotated[int, typer.Option(min=1, help="Answers of one model that may wait; beyond them 429.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer that may be asked for.")] = 2048,
    images: Annotated[int, typer.Option(min=1, help="Pictures in one request.")] = 16,
    image_bytes: Annotated[int, typer.Option(min=1, help="Largest picture, as a file.")] = 20_000_000,
    image_pixels: Annotated[int, typer.Option(min=1, help="Largest picture, width times height.")] = 50_000_000,
    allow_image_urls: Annotated[
        bool, typer.Option("--allow-image-urls", help="Fetch pictures given by their address on the public network.")
    ] = False,
    body_bytes: Annotated[int, typer.Option(min=1, help="Largest request.")] = 32 << 20,
    request_seconds: Annotated[float, typer.Option(min=0.1, help="Longest time for one request.")] = 600.0,
    drain_seconds: Annotated[float, typer.Option(min=1, help="Time for answers to end when asked to stop.")] = 60.0,
    requests_per_minute: Annotated[
        int | None, typer.Option(min=1, help="Of one key (of one address without keys). Default: no limit.")
    ] = None,
) -> None:
    """Serve models over HTTP as OpenAI's API: /v1/chat/completions, /v1/models, /health, /metrics."""
    from lapilli.serve.settings import Limits, check_address, read_keys

    bits = held(load_8bit, load_4bit)
    keys = read_keys(api_key_file)
    check_address(host, keys)
    limits = Limits(
        slots=slots,
        queue=queue,
        new_tokens=new_tokens,
        images=images,
        image_bytes=image_bytes,
        image_pixels=image_pixels,
        body_bytes=body_bytes,
        request_seconds=request_seconds,
        drain_seconds=drain_seconds,
        requests_per_minute=requests_per_minute,
    )
    serving = _import_server()
    bound = serving.bind(host, port)  # before the wait for models

    import logging

    import torch

    from lapilli.serve.models import name_models, open_models
    from lapilli.serve.remote import RemotePictures

    named = name_models(models)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("lapilli").setLevel(logging.INFO)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    remote = RemotePictures(image_bytes) if allow_image_urls else None
    how: dict[str, Any] = {"base": base, "device": device, "template": template, "quantise": bits}
    opened = open_models(named, limits, remote=remote, **how)
    serving.serve(opened, keys, limits, bound, lambda url: typer.echo(f"{', '.join(opened)} at {url}", err=True))


def _import_server() -> Any:
    try:
        from lapilli.serve import server
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("fastapi", "starlette", "uvicorn"):
            raise
        raise RunError("serving needs FastAPI and uvicorn: pip install 'lapilli[serve]'") from error
    return server
