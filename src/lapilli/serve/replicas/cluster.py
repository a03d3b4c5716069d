"""A Ray cluster that answers: joined or started here, with replicas of each model, until the server ends.

Each replica is a Ray Serve deployment of its own, so that this server, the only one who asks them, knows exactly how
much each has to do. Ray's own HTTP proxy, its dashboard and its telemetry stay off.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import re
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from lapilli.assemble.source import model_folder
from lapilli.base.errors import LapilliError, ModelError, RunError
from lapilli.data.prepare.engine import refuse_silence
from lapilli.serve.backend import Gauges
from lapilli.serve.local import LocalModels
from lapilli.serve.metrics import Metrics
from lapilli.serve.models import Served
from lapilli.serve.remote import RemotePictures
from lapilli.serve.settings import Limits

_STORE_BYTES = 256 << 20
"""Of a cluster started here, for what is on its way between processes: pictures, for the moment of a call."""
_PATIENCE_SECONDS = 60.0
_LOOK_SECONDS = 1.0
_SAY_SECONDS = 15.0
_CALLS = 1000
"""Calls that a replica takes at a time: all are short but one, the stream. How many answers it makes is ours to say."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where replicas run. `address` of a cluster, `auto` for the one on this machine; None: one is started.

    `cpus` and `gpus` of each replica, None: what fits. `load_seconds` for all of them to load their models.
    """

    replicas: int = 2
    address: str | None = None
    cpus: float | None = None
    gpus: float | None = None
    load_seconds: float = 1800.0


class RayModels(LocalModels):
    """A `Backend` over models by name whose answers replicas make; everything else happens in this process."""

    def __init__(self, models: Mapping[str, Served], replicas: Mapping[str, Any]) -> None:
        super().__init__(models)
        self._replicas = replicas
        self.names = tuple(models)

    @asynccontextmanager
    async def life(self, metrics: Metrics) -> AsyncIterator[None]:
        async with super().life(metrics):
            await asyncio.gather(*(one.listening() for one in self._replicas.values()))
            yield

    def gauges(self) -> Gauges:
        up = [({"model": name}, one.up) for name, one in self._replicas.items()]
        return {**super().gauges(), "lapilli_replicas": ("Replicas that answer now.", up)}


@contextmanager
def ray_models(
    named: Mapping[str, str],
    limits: Limits,
    place: Place,
    say: Callable[[str], None],
    *,
    remote: RemotePictures | None = None,
    device: str = "auto",
    base: str | None = None,
    **how: Any,
) -> Iterator[RayModels]:
    """Inside, replicas of every model run. `how` as `open_models` takes it; folders are opened where replicas run.

    Raises RunError for a cluster that can't be had or is too small, ModelError naming what is wrong with a folder.
    """
    serve = _import_serve(place.address is None)
    wanted = len(named) * place.replicas
    if place.address is None:
        cpus = place.cpus or max(1, (os.cpu_count() or 1) // wanted)
        for path in named.values():
            model_folder(path)
        say(f"Ray: starting a cluster on this machine, for {_replicas(wanted)}")
    else:
        cpus = place.cpus or 1
        say(f"Ray: joining the cluster at {place.address}")
    with _joined(place.address, math.ceil(cpus * wanted)):
        gpus = _gpus(place.gpus, device, wanted, cpus)
        settings = {**how, "base": None if base is None else str(Path(base).resolve())}
        settings["device"] = ("cuda" if gpus else "cpu") if device == "auto" else device
        say(f"Ray: {_replicas(wanted)}; CPUs of each (and threads): {cpus:g}, GPUs: {gpus:g}")
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        serve.start(proxy_location="Disabled", logging_config=_QUIET)
        token, targets = secrets.token_hex(3), []
        for name, path in named.items():
            for number in range(1, place.replicas + 1):
                app = f"lapilli-{token}-{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)}-{number}"
                given = (name, str(Path(path).resolve()), limits, settings, _patience(place))
                targets.append(_target(serve, app, given, cpus, gpus))
        try:
            handles = serve.run_many(targets, wait_for_applications_running=False)
            apps = [target.name for target in targets]
            facts = _opened(serve, apps, handles, place.load_seconds, say)
            yield _backend(named, handles, facts, limits, place.replicas, remote)
        finally:
            if place.address is not None:
                _leave(serve, [target.name for target in targets])


_QUIET = {"log_level": "ERROR", "enable_access_log": False}


def _target(serve: Any, app: str, given: tuple[Any, ...], cpus: float, gpus: float) -> Any:
    from lapilli.serve.replicas.replica import Replica

    made = serve.deployment(
        Replica,
        name="replica",
        num_replicas=1,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        max_ongoing_requests=_CALLS,
        health_check_period_s=2,
        health_check_timeout_s=60,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=1,
        logging_config=_QUIET,
    )
    return serve.RunTarget(made.bind(*given), name=app, route_prefix=None, logging_config=_QUIET)


def _backend(
    named: Mapping[str, str],
    handles: Sequence[Any],
    facts: Sequence[Any],
    limits: Limits,
    replicas: int,
    remote: RemotePictures | None,
) -> RayModels:
    from lapilli.serve.replicas.replicas import Replicas

    together = replace(limits, slots=limits.slots * replicas)
    models: dict[str, Served] = {}
    workers: dict[str, Replicas] = {}
    for i, name in enumerate(named):
        of = slice(i * replicas, (i + 1) * replicas)
        opened = facts[of][0]
        workers[name] = Replicas(name, handles[of], opened.takes)
        models[name] = opened.facts.served(name, workers[name], together, remote)
    return RayModels(models, workers)


def _opened(
    serve: Any, apps: Sequence[str], handles: Sequence[Any], load_seconds: float, say: Callable[[str], None]
) -> list[Any]:
    """What replicas say of their models, once all hold one; how far they are is said meanwhile."""
    from ray.exceptions import RayError, RayTaskError
    from ray.serve.exceptions import RayServeException

    begun = said = time.monotonic()
    answers = [handle.open.remote() for handle in handles]
    facts: dict[int, Any] = {}
    while len(facts) < len(handles):
        for i, answer in enumerate(answers):
            if i in facts:
                continue
            try:
                facts[i] = answer.result(timeout_s=_LOOK_SECONDS)
            except TimeoutError:
                continue
            except RayTaskError as error:
                cause = error.cause
                raise (cause if isinstance(cause, LapilliError) else ModelError(f"{apps[i]}: {error}")) from error
            except (RayError, RayServeException) as error:
                raise RunError(f"{apps[i]}: the replica did not start ({str(error).strip()})") from error
            fact = facts[i]
            say(f"Ray: {len(facts)} of {_replicas(len(handles))} ready ({fact.seconds:.1f} s, on {fact.where})")
        now = time.monotonic()
        if len(facts) < len(handles) and now - said > _SAY_SECONDS:
            said = now
            say(f"Ray: {len(facts)} of {_replicas(len(handles))} ready; {_waits(serve, apps)}")
        if len(facts) < len(handles) and now - begun > load_seconds:
            raise RunError(f"Ray: after {load_seconds:g} s {len(handles) - len(facts)} replicas are not ready; "
                           f"{_waits(serve, apps)}")  # fmt: skip
    return [facts[i] for i in range(len(handles))]


def _waits(serve: Any, apps: Sequence[str]) -> str:
    """What replicas that are not ready wait for."""
    known = serve.status().applications
    placed = sum(d.status == "HEALTHY" for app in apps if app in known for d in known[app].deployments.values())
    if placed == len(apps):
        return "models are being loaded"
    return f"processes that Ray has not started yet: {len(apps) - placed}"


@contextmanager
def _joined(address: str | None, cpus: int) -> Iterator[None]:
    import ray

    if address is not None and address.startswith("ray://"):
        raise RunError(f"--ray-address {address}: give HOST:PORT of the cluster itself, without ray://")
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": True}
    try:
        if address is None:
            ray.init(
                "local",
                num_cpus=cpus,
                include_dashboard=False,
                object_store_memory=_STORE_BYTES,
                _node_ip_address="127.0.0.1",
                **quiet,
            )
        else:
            refuse_silence(address)
            ray.init(address, **quiet)
    except Exception as error:  # Ray raises bare ones, such as for a node that takes longer than 30 s to start
        what = "Ray did not start" if address is None else f"--ray-address {address}: no Ray cluster answers there"
        raise RunError(f"{what} ({str(error).strip().splitlines()[0]})") from error
    try:
        with _ends_in_order():
            yield
    finally:
        ray.shutdown()


@contextmanager
def _ends_in_order() -> Iterator[None]:
    """SIGTERM before the server runs is an exit like any other, so that nothing is left in the cluster."""
    before: Any = signal.signal(signal.SIGTERM, _exit)  # Ray's own handler, which prints a trace
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _exit(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _leave(serve: Any, apps: Sequence[str]) -> None:
    """Take the replicas out of a cluster that others use."""
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    for app in apps:
        try:
            serve.delete(app, _blocking=False)
        except (RayError, RayServeException) as error:
            logging.getLogger(__name__).error("%s is left in the cluster (%s)", app, str(error).strip())


def _gpus(asked: float | None, device: str, wanted: int, cpus: float) -> float:
    """GPUs of each replica. Raises RunError for a cluster that can't ever hold all replicas."""
    import ray

    there = ray.cluster_resources()
    gpus = asked if asked is not None else float(device != "cpu" and (there.get("GPU", 0) > 0 or device != "auto"))
    for kind, each, flag in (("CPU", cpus, "--replica-cpus"), ("GPU", gpus, "--replica-gpus")):
        if each * wanted > there.get(kind, 0):
            raise RunError(
                f"{_replicas(wanted)} with {each:g} {kind}s each ask for {each * wanted:g}, the cluster has "
                f"{there.get(kind, 0):g}; give fewer --replicas, or less {flag}"
            )
    return gpus


def _patience(place: Place) -> float | None:
    return None if place.address is None else _PATIENCE_SECONDS


def _replicas(number: int) -> str:
    return f"{number} replica{'s' if number > 1 else ''}"


def _import_serve(starts: bool) -> Any:
    """Ray Serve, with telemetry off, and where a cluster is started a secret that only its own processes know.

    Ray's processes listen on all addresses, and whoever may call them may run programs; without the secret they refuse.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if not sys.stderr.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # what replicas log comes to this log, without colours
    if starts:
        os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's workers give way to all else; here they are the work
        if "RAY_AUTH_MODE" not in os.environ:
            os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    try:
        from ray import serve
    except ModuleNotFoundError as error:
        raise RunError("--engine ray needs Ray Serve: pip install 'lapilli[ray]'") from error
    return serve
