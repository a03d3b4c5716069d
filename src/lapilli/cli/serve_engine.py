"""`lapilli serve --engine`: answers are made by vLLM, SGLang or any OpenAI server, and served as our own are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lapilli.base.errors import RunError, unknown

if TYPE_CHECKING:
    from lapilli.serve.settings import Limits
    from lapilli.serve.upstream.backend import Upstream

ENGINES = ("vllm", "sglang", "openai")


def refuse_own(flags: Mapping[str, object]) -> None:
    """Raise RunError for flags that are about models of this process, if they are given."""
    for flag, given in flags.items():
        if given:
            hint = "convert the model with its base first" if flag == "--base" else "say it with --engine-args"
            raise RunError(f"{flag} has no effect on an engine (--engine); {hint}")


@contextmanager
def engine_backend(
    models: Sequence[str],
    limits: Limits,
    say: Callable[[str], None],
    *,
    engine: str,
    url: str | None = None,
    options: str = "",
    seconds: float = 1800.0,
    template: str | None = None,
    gpus: int = 1,
    remote: Any = None,
) -> Iterator[Upstream]:
    """Inside, the backend's engine runs; with `url` it is one that runs already.

    Raises RunError and ModelError for what can't be started, and RunError at the end if the engine ended by itself.
    """
    if engine not in ENGINES:
        raise RunError(f"--engine: {unknown('engine', engine, ENGINES)}")
    if url is not None:
        if options or gpus > 1 or template is not None:
            raise RunError(
                "--engine-args, --num-gpus, --template: for an engine that is started here, not --engine-url"
            )
        yield _attached(engine, url, models, limits, remote)
        return
    if engine == "openai":
        raise RunError("--engine openai: give the server's address, --engine-url; vllm and sglang can be started")
    with _started(engine, models, options, seconds, template, gpus, limits, remote, say) as backend:
        yield backend


def sglang_worker(url: str, name: str | None, keys: Any, limits: Limits, registration: Any) -> tuple[str, Any]:
    """The name and the application of a worker of LLaVA's cluster in front of an SGLang server.

    Raises RunError if that is not one, or does not answer.
    """
    from lapilli.serve.cluster.sglang_worker import find_model, make_sglang_app
    from lapilli.serve.upstream.attach import engine_key, root_of

    model = find_model(root_of(url, "--sgl-endpoint"), engine_key(), name)
    return model.name, make_sglang_app(model, keys, limits, registration)


def _attached(engine: Any, url: str, models: Sequence[str], limits: Limits, remote: Any) -> Upstream:
    from lapilli.serve.upstream.attach import attach
    from lapilli.serve.upstream.backend import Upstream

    found, endpoint = attach(engine, url, models)
    return Upstream(found, endpoint, limits, remote=remote)


@contextmanager
def _started(
    engine: Any,
    models: Sequence[str],
    options: str,
    seconds: float,
    template: str | None,
    gpus: int,
    limits: Limits,
    remote: Any,
    say: Callable[[str], None],
) -> Iterator[Upstream]:
    import os
    import signal

    from lapilli.serve.models import name_models
    from lapilli.serve.upstream.backend import Elsewhere, Upstream
    from lapilli.serve.upstream.body import Target
    from lapilli.serve.upstream.start import Wish, find, split_options, started

    find(engine)  # before anything that takes time
    extra = split_options(engine, options)
    named = name_models(models)
    if len(named) > 1:
        raise RunError(f"--engine {engine} serves one model ({len(named)} are given); start one server for each")
    ((name, path),) = named.items()

    from lapilli.serve.upstream.folder import loadable

    folder = loadable(path, engine, template)
    wish = Wish(engine, folder.folder, name, folder.chat_template, limits.images, gpus, extra, seconds)
    with started(wish, say) as running:
        model = Elsewhere(name, Target(name, engine, folder.stop), folder.template)
        # A server whose engine is gone ends as if asked to, and says why below: what restarts servers notices.
        yield Upstream(
            [model], running.endpoint, limits, remote=remote, on_end=lambda: os.kill(os.getpid(), signal.SIGTERM)
        )
        if running.ended is not None:
            from lapilli.serve.upstream.start import tail

            raise RunError(f"{engine}: {running.ended}\n{tail(running.log)}")
