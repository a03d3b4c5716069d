"""`lapilli serve`: models behind OpenAI's API, for any client of it; and the parts of LLaVA's cluster, as sub-verbs."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lapilli.base.errors import RunError
from lapilli.cli import serve_flags as flags
from lapilli.cli.held import held
from lapilli.cli.serve_cluster import ask, register, web
from lapilli.cli.serving import device_of, import_server, make_page, say, tell, without_effect

_API = "models"


class _Serve(TyperGroup):
    """What is no sub-verb is a model, served by the API; a folder of a sub-verb's name is given as ./NAME."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in self.commands:
            args = [_API, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=_Serve, add_completion=False, rich_markup_mode=None)
app.command()(web)
app.command()(register)
app.command("test")(ask)


@app.command(_API, epilog="LLaVA's cluster: controller, worker, web, register, test; see `lapilli serve web --help`.")
def serve(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...", help="Model folders, run folders, or adapter folders with --base; NAME=PATH names one."
        ),
    ],
    host: flags.Host = "127.0.0.1",
    port: flags.Port = 8000,
    api_key_file: flags.KeyFile = None,
    base: Annotated[str | None, typer.Option(help="Model that adapters were trained on.", metavar="DIR")] = None,
    template: Annotated[str | None, typer.Option(help="Conversation template instead of the models' own.")] = None,
    device: flags.Device = "auto",
    load_8bit: Annotated[
        bool, typer.Option("--load-8bit", help="Hold the language model's layers in 8 bits (bitsandbytes).")
    ] = False,
    load_4bit: Annotated[bool, typer.Option("--load-4bit", help="Hold them in 4 bits, NF4.")] = False,
    num_gpus: Annotated[
        int, typer.Option("--num-gpus", min=1, help="GPUs that each model's layers are dealt out to, or an engine's.")
    ] = 1,
    engine: Annotated[
        str | None,
        typer.Option(help="Who makes the answers: vllm, sglang, openai with --engine-url, or ray: replicas of ours."),
    ] = None,
    engine_url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="One that runs already (key: LAPILLI_ENGINE_KEY); MODEL is NAME or OURS=ITS."),
    ] = None,
    engine_args: Annotated[str, typer.Option(metavar='"..."', help="Further options for the engine.")] = "",
    engine_seconds: Annotated[float, typer.Option(min=1, help="Time for the engine to load the model.")] = 1800.0,
    replicas: Annotated[int | None, typer.Option(min=1, help="Of each model, with --engine ray. Default: 2.")] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(metavar="auto|HOST:PORT", help="Ray cluster to join. Default: one is started on this machine."),
    ] = None,
    replica_cpus: Annotated[
        float | None, typer.Option(min=0.1, help="CPUs of each. Default: this machine's, shared out; in a cluster 1.")
    ] = None,
    replica_gpus: Annotated[
        float | None, typer.Option(min=0, max=1, help="GPUs of each. Default: 1 where the cluster has any.")
    ] = None,
    slots: Annotated[
        int | None, typer.Option(min=1, help="Answers that grow at a time. Default: 16 of a model, 256 of an engine.")
    ] = None,
    queue: Annotated[int, typer.Option(min=1, help="Answers of one model that may wait; beyond them 429.")] = 64,
    new_tokens: flags.NewTokens = 2048,
    images: flags.Images = 16,
    image_bytes: Annotated[int, typer.Option(min=1, help="Largest picture, as a file.")] = 20_000_000,
    image_pixels: Annotated[int, typer.Option(min=1, help="Largest picture, width times height.")] = 50_000_000,
    allow_image_urls: flags.ImageUrls = False,
    body_bytes: Annotated[int, typer.Option(min=1, help="Largest request.")] = 32 << 20,
    request_seconds: flags.RequestSeconds = 600.0,
    drain_seconds: Annotated[float, typer.Option(min=1, help="Time for answers to end when asked to stop.")] = 60.0,
    requests_per_minute: flags.RequestsPerMinute = None,
    no_page: flags.NoPage = False,
    examples: flags.Examples = None,
    log_dir: flags.LogDir = None,
    log_bytes: flags.LogBytes = 10 << 30,
    moderation_url: flags.ModerationUrl = None,
    moderation_images: Annotated[bool, typer.Option("--moderation-images", help="About pictures too.")] = False,
    moderation_optional: Annotated[
        bool, typer.Option("--moderation-optional", help="Answer all the same where it can't be asked.")
    ] = False,
    moderation_model: Annotated[str | None, typer.Option(metavar="NAME", help="The service's model.")] = None,
) -> None:
    """Serve models over HTTP: a web page at /, and OpenAI's API: /v1/chat/completions, /v1/models, /metrics."""
    from lapilli.serve.settings import Limits, check_address, read_keys

    bits = held(load_8bit, load_4bit)
    keys = read_keys(api_key_file)
    check_address(host, keys)
    limits = Limits(
        slots=slots or (16 if engine in (None, "ray") else 256),
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
    serving = import_server()
    bound = serving.bind(host, port)  # before the wait for models

    from lapilli.serve.logs import start_log
    from lapilli.serve.moderation import moderating
    from lapilli.serve.remote import RemotePictures

    page = None if no_page else make_page(limits, examples, log_dir, log_bytes)
    remote = RemotePictures(image_bytes) if allow_image_urls else None
    checked = moderating(moderation_url, images=moderation_images, optional=moderation_optional, model=moderation_model)
    start_log()
    ray = {"replicas": replicas, "address": ray_address, "cpus": replica_cpus, "gpus": replica_gpus}
    if engine != "ray":
        _refuse_without_ray(ray)
    elif engine_url is not None or engine_args:
        raise RunError("--engine-url and --engine-args are not for --engine ray; --ray-address names a cluster")
    elif num_gpus > 1:
        raise RunError("--num-gpus is not for --engine ray: a replica's model lies on one GPU; leave it out")
    else:
        from lapilli.serve.models import name_models
        from lapilli.serve.replicas.cluster import Place, ray_models

        place = Place(**{k: v for k, v in ray.items() if v is not None}, load_seconds=engine_seconds)
        chosen: dict[str, Any] = {"base": base, "device": device, "template": template, "quantise": bits}
        with ray_models(name_models(models), limits, place, say, remote=remote, **chosen) as backend:
            serving.serve(checked(backend), keys, limits, bound, tell(", ".join(backend.names), page), page)
        return
    if engine is not None or engine_url is not None:
        from lapilli.cli.serve_engine import engine_backend, refuse_own

        refuse_own({"--base": base, "--load-8bit": load_8bit, "--load-4bit": load_4bit, "--device": device != "auto"})
        chosen = {"engine": engine or "openai", "url": engine_url, "options": engine_args}
        chosen |= {"seconds": engine_seconds, "template": template, "gpus": num_gpus, "remote": remote}
        with engine_backend(models, limits, say, **chosen) as backend:
            serving.serve(checked(backend), keys, limits, bound, tell(", ".join(backend.names), page), page)
        return

    from lapilli.serve.apart.link import open_apart
    from lapilli.serve.local import LocalModels
    from lapilli.serve.models import name_models

    named = name_models(models)
    device = device_of(device)
    how: dict[str, Any] = {"base": base, "device": device, "template": template, "quantise": bits, "gpus": num_gpus}
    with open_apart(named, limits, remote=remote, **how) as opened:
        serving.serve(checked(LocalModels(opened)), keys, limits, bound, tell(", ".join(opened), page), page)


@app.command()
def controller(
    host: flags.Host = "127.0.0.1",
    port: flags.Port = 21001,
    dispatch_method: Annotated[str, typer.Option(help="shortest_queue or lottery.")] = "shortest_queue",
    api_key_file: flags.KeyFile = None,
) -> None:
    """LLaVA's controller: knows the workers, and says which one a question goes to."""
    from lapilli.serve.settings import Limits, check_address, own_key, read_keys

    if dispatch_method not in ("shortest_queue", "lottery"):
        raise RunError(f"--dispatch-method {dispatch_method}: give shortest_queue or lottery")
    keys = read_keys(api_key_file)
    check_address(host, keys)
    serving = import_server()
    bound = serving.bind(host, port)

    from lapilli.serve.cluster.controller import Controller
    from lapilli.serve.cluster.controller_app import make_controller_app
    from lapilli.serve.logs import start_log

    start_log()
    table = Controller(dispatch_method, own_key(), anywhere=bool(keys))
    app = make_controller_app(table, keys, Limits())
    serving.serve_app(app, bound, 60.0, lambda: say(f"controller at {serving.root_of(bound)}"))


@app.command()
def worker(
    model_path: Annotated[
        str | None, typer.Option(metavar="DIR", help="Model folder, run folder, or adapters; or --sgl-endpoint.")
    ] = None,
    sgl_endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="An SGLang server that answers (key: LAPILLI_ENGINE_KEY).")
    ] = None,
    model_base: Annotated[str | None, typer.Option(metavar="DIR", help="Model that adapters were trained on.")] = None,
    model_name: Annotated[str | None, typer.Option(help="What it is called; its folder's name if not given.")] = None,
    host: flags.Host = "127.0.0.1",
    port: flags.Port = 21002,
    worker_address: Annotated[
        str | None, typer.Option("--worker-address", "--worker", metavar="URL", help="How the controller reaches it.")
    ] = None,
    controller_address: Annotated[
        str, typer.Option("--controller-address", "--controller", "--controller-url", metavar="URL")
    ] = "http://127.0.0.1:21001",
    no_register: Annotated[bool, typer.Option("--no-register", help="Tell no controller.")] = False,
    api_key_file: flags.KeyFile = None,
    device: flags.Device = "auto",
    limit_model_concurrency: Annotated[int, typer.Option(min=1, help="Answers that grow at a time.")] = 16,
    load_8bit: Annotated[bool, typer.Option("--load-8bit", help="Hold the language model in 8 bits.")] = False,
    load_4bit: Annotated[bool, typer.Option("--load-4bit", help="Hold it in 4 bits, NF4.")] = False,
    num_gpus: Annotated[int, typer.Option("--num-gpus", min=1, help="GPUs that its layers are dealt out to.")] = 1,
    multi_modal: Annotated[bool, typer.Option("--multi-modal", hidden=True)] = False,
    stream_interval: Annotated[int | None, typer.Option(hidden=True)] = None,
    use_flash_attn: Annotated[bool, typer.Option("--use-flash-attn", hidden=True)] = False,
) -> None:
    """LLaVA's worker: a model that a controller sends questions to."""
    from lapilli.serve.settings import Limits, check_address, own_key, read_keys

    if (model_path is None) == (sgl_endpoint is None):
        raise RunError("give the worker --model-path, or --sgl-endpoint with the address of an SGLang server")
    bits = held(load_8bit, load_4bit)
    without_effect(
        {"--multi-modal": multi_modal, "--stream-interval": stream_interval, "--use-flash-attn": use_flash_attn}
    )
    keys = read_keys(api_key_file)
    check_address(host, keys)
    serving = import_server()
    bound = serving.bind(host, port)

    from lapilli.serve.cluster.worker_app import Registration, make_worker_app
    from lapilli.serve.logs import start_log

    limits = Limits(slots=limit_model_concurrency)
    start_log()
    address = (worker_address or serving.root_of(bound)).rstrip("/")
    registration = None if no_register else Registration(controller_address, address, own_key())
    if sgl_endpoint is not None:
        from lapilli.cli.serve_engine import refuse_own, sglang_worker

        refuse_own({"--model-base": model_base, "--load-8bit": load_8bit, "--load-4bit": load_4bit,
                    "--device": device != "auto", "--num-gpus": num_gpus > 1})  # fmt: skip
        name, app = sglang_worker(sgl_endpoint, model_name, keys, limits, registration)
        serving.serve_app(app, bound, limits.drain_seconds, lambda: say(f"{name}, worker at {address}"))
        return

    from lapilli.serve.apart.link import open_apart
    from lapilli.serve.models import name_models

    named = name_models([f"{model_name}={model_path}" if model_name else str(model_path)])
    how: dict[str, Any] = {"base": model_base, "device": device_of(device), "quantise": bits, "gpus": num_gpus}
    with open_apart(named, limits, **how) as opened:
        (model,) = opened.values()
        app = make_worker_app(model, keys, limits, registration)
        serving.serve_app(app, bound, limits.drain_seconds, lambda: say(f"{model.name}, worker at {address}"))


def _refuse_without_ray(given: Mapping[str, object]) -> None:
    flags = {"replicas": "--replicas", "address": "--ray-address", "cpus": "--replica-cpus", "gpus": "--replica-gpus"}
    for name, flag in flags.items():
        if given[name] is not None:
            raise RunError(f"{flag} goes with --engine ray")
