"""The parts of LLaVA's cluster that hold no model: `lapilli serve web`, `register` and `test`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from lapilli.base.errors import RunError, unknown
from lapilli.cli import serve_flags as flags
from lapilli.cli.serving import import_server, make_page, say, tell, without_effect

if TYPE_CHECKING:
    from lapilli.serve.cluster.web import Cluster

Controller = Annotated[
    str, typer.Option("--controller", "--controller-url", "--controller-address", metavar="URL", help="Its address.")
]
Worker = Annotated[
    str | None,
    typer.Option("--worker", "--worker-address", metavar="URL", help="Ask this worker; no controller is needed."),
]
_CONTROLLER = "http://127.0.0.1:21001"
_OPENAI_MODERATION = "https://api.openai.com/v1/moderations"
_NO_TUNNEL = (
    "--share: there is no tunnel here: it would show this server to the world by another company's host. Give --host "
    "and a key and open the port, or forward it: ssh -L 7860:127.0.0.1:7860 HOST"
)


def web(
    controller: Controller = _CONTROLLER,
    worker: Worker = None,
    host: flags.Host = "127.0.0.1",
    port: flags.Port = 7860,
    api_key_file: flags.KeyFile = None,
    template: Annotated[
        str | None, typer.Option(help="Of all models. Default: what a worker says, else by the model's name.")
    ] = None,
    model_list_mode: Annotated[str, typer.Option(help="Ask for the models once, or reload: for each page.")] = "once",
    concurrency_count: Annotated[int, typer.Option(min=1, help="Answers that are asked for at a time.")] = 256,
    queue: Annotated[int, typer.Option(min=1, help="Answers that may wait for that; beyond them 429.")] = 64,
    new_tokens: flags.NewTokens = 1536,
    images: flags.Images = 16,
    allow_image_urls: flags.ImageUrls = False,
    request_seconds: flags.RequestSeconds = 600.0,
    requests_per_minute: flags.RequestsPerMinute = None,
    no_page: flags.NoPage = False,
    examples: flags.Examples = None,
    log_dir: flags.LogDir = None,
    log_bytes: flags.LogBytes = 10 << 30,
    moderation_url: flags.ModerationUrl = None,
    moderate: Annotated[
        bool, typer.Option("--moderate", help="Ask OpenAI's; its key may be in OPENAI_API_KEY, too.")
    ] = False,
    share: Annotated[bool, typer.Option("--share", hidden=True)] = False,
    embed: Annotated[bool, typer.Option("--embed", hidden=True)] = False,
) -> None:
    """The web page and OpenAI's API in front of a LLaVA cluster: a controller and workers, the original's or ours."""
    from lapilli.serve.settings import Limits, check_address, read_keys

    if share:
        raise RunError(_NO_TUNNEL)
    without_effect({"--embed": embed})
    keys = read_keys(api_key_file)
    check_address(host, keys)
    limits = Limits(
        slots=concurrency_count,
        queue=queue,
        new_tokens=new_tokens,
        images=images,
        request_seconds=request_seconds,
        requests_per_minute=requests_per_minute,
    )
    serving = import_server()
    bound = serving.bind(host, port)

    from lapilli.serve.logs import start_log
    from lapilli.serve.remote import RemotePictures

    page = None if no_page else make_page(limits, examples, log_dir, log_bytes)
    remote = RemotePictures(limits.image_bytes) if allow_image_urls else None
    backend: Any = _cluster(limits, controller, worker, template, model_list_mode, remote=remote)
    if moderation_url is not None or moderate:
        backend = _moderated(backend, moderation_url)
    start_log()
    serving.serve(backend, keys, limits, bound, tell(f"models of {worker or controller}", page), page)


def register(
    worker_name: Annotated[str, typer.Option("--worker-name", "--worker", "--worker-address", metavar="URL")],
    controller: Controller = _CONTROLLER,
    check_heart_beat: Annotated[
        bool, typer.Option("--check-heart-beat", help="Forget it when it falls silent; for workers that send beats.")
    ] = False,
) -> None:
    """Tell a controller of a worker that did not register by itself; the controller asks it what it serves."""
    import_server()

    from lapilli.serve.cluster.probe import register_worker
    from lapilli.serve.settings import own_key

    models = register_worker(controller, worker_name, check_heart_beat, own_key())
    typer.echo(f"registered; {controller} serves {', '.join(models)}")


def ask(
    controller: Controller = _CONTROLLER,
    worker: Worker = None,
    model_name: Annotated[str | None, typer.Option(help="Which model; may be left out where there is one.")] = None,
    message: Annotated[str, typer.Option(help="What to ask.")] = "Tell me a story with more than 1000 words.",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 32,
    template: Annotated[str | None, typer.Option(help="Default: what the worker says, else by the name.")] = None,
) -> None:
    """Ask a cluster one question, the whole way through, and print the answer."""
    import_server()

    from lapilli.serve.cluster.probe import ask_once
    from lapilli.serve.settings import Limits

    limits = Limits(new_tokens=max(1536, max_new_tokens), request_seconds=120)
    backend = _cluster(limits, controller, worker, template, "once")
    models, answer = ask_once(backend, limits, model_name, message, max_new_tokens)
    say(f"models: {', '.join(models)}")
    typer.echo(answer)


def _moderated(backend: Any, url: str | None) -> Any:
    """The cluster behind a moderation service; without a URL OpenAI's, as the original's --moderate asks."""
    import os

    from lapilli.serve.moderation import KEY_VARIABLE, Moderated, Moderation, moderation_key

    key = moderation_key() or (os.environ.get("OPENAI_API_KEY", "").strip() or None if url is None else None)
    if url is None and key is None:
        raise RunError(f"--moderate: OpenAI's moderation needs a key, {KEY_VARIABLE} or OPENAI_API_KEY")
    return Moderated(backend, Moderation(url or _OPENAI_MODERATION, key=key))


def _cluster(
    limits: Any, controller: str, worker: str | None, template: str | None, mode: str, *, remote: Any = None
) -> "Cluster":
    from urllib.parse import urlsplit

    from lapilli.data.template import get_template
    from lapilli.serve.cluster.web import Cluster
    from lapilli.serve.settings import own_key

    if mode not in ("once", "reload"):
        raise RunError(f"--model-list-mode: {unknown('mode', mode, ['once', 'reload'])}")
    for flag, url in (("--controller", controller), ("--worker", worker)):
        if url is not None and (urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname):
            raise RunError(f"{flag} {url}: give its address as http://HOST:PORT")
    chosen = None if template is None else get_template(template)
    models = "reload" if mode == "reload" else "once"
    return Cluster(controller, limits, worker=worker, key=own_key(), template=chosen, models=models, remote=remote)
