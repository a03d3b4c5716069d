"""What the sub-verbs of `lapilli serve` have in common: what they say, and the page that they show."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import typer

from lapilli.base.errors import RunError

if TYPE_CHECKING:
    from lapilli.serve.page.routes import Page
    from lapilli.serve.settings import Limits


def say(line: str) -> None:
    """One line for whoever started this."""
    typer.echo(line, err=True)


def without_effect(flags: Mapping[str, object]) -> None:
    """Say of old flags that they do nothing here, if they are given."""
    for flag, given in flags.items():
        if given:
            say(f"{flag} is taken from old command lines and has no effect")


def device_of(name: str) -> str:
    """A device by name; `auto` is a GPU where there is one."""
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def import_server() -> Any:
    """The server's module. Raises RunError where its packages are not installed."""
    try:
        from lapilli.serve import server
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("fastapi", "starlette", "uvicorn"):
            raise
        raise RunError("serving needs FastAPI and uvicorn: pip install 'lapilli[serve]'") from error
    return server


def make_page(limits: "Limits", examples: str | None, log_dir: str | None, log_bytes: int) -> "Page":
    """The page; what can't be shown on it is said before the wait for models."""
    from lapilli.serve.page.examples import read_examples
    from lapilli.serve.page.log import ConversationLog
    from lapilli.serve.page.routes import Page
    from lapilli.serve.reading import image_limits

    bounds = image_limits(limits)
    shown = () if examples is None else read_examples(examples, bounds)
    return Page(shown, None if log_dir is None else ConversationLog(log_dir, bounds, limits.images, log_bytes))


def tell(names: str, page: "Page | None") -> Callable[[str], None]:
    """What is said once the server listens."""

    def told(url: str) -> None:
        if page is not None:
            say(f"page: {url.removesuffix('v1')}")
            if page.log is not None:
                say(f"what is said on the page is kept in {page.log.folder}")
        say(f"{names} at {url}")

    return told
