"""Flags that several sub-verbs of `lapilli serve` share: one word and one help for one thing."""

from typing import Annotated

import typer

Host = Annotated[str, typer.Option(help="Address to listen on; any but this machine's own needs a key.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")]
KeyFile = Annotated[str | None, typer.Option(metavar="FILE", help="Keys that may ask, one a line; or LAPILLI_API_KEY.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...; auto takes a GPU where there is one.")]
NewTokens = Annotated[int, typer.Option(min=1, help="Longest answer that may be asked for.")]
Images = Annotated[int, typer.Option(min=1, help="Pictures in one request.")]
ImageUrls = Annotated[
    bool, typer.Option("--allow-image-urls", help="Fetch pictures given by their address on the public network.")
]
RequestSeconds = Annotated[float, typer.Option(min=0.1, help="Longest time for one request.")]
RequestsPerMinute = Annotated[
    int | None, typer.Option(min=1, help="Of one key (of one address without keys). Default: no limit.")
]
NoPage = Annotated[bool, typer.Option("--no-page", help="Serve the API alone, without the web page.")]
Examples = Annotated[
    str | None, typer.Option(metavar="FILE", help="What the page offers: a JSON or YAML list of text and images.")
]
LogDir = Annotated[
    str | None, typer.Option(metavar="DIR", help="Keep what is said on the page there, with pictures and votes.")
]
LogBytes = Annotated[int, typer.Option(min=1, help="Most that the folder of --log-dir may hold.")]
ModerationUrl = Annotated[
    str | None,
    typer.Option(metavar="URL", help="An OpenAI-like /v1/moderations to ask first (key: LAPILLI_MODERATION_KEY)."),
]
