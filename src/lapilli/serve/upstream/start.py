"""vLLM or SGLang as a child of this process: found, started, waited for, and ended with it.

The engine listens on this machine alone, on a port and with a key of its own that nobody else is told. It ends when
this process does, however that ends: asked to, or killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

import httpx

from lapilli.base.errors import RunError
from lapilli.checkpoint.tensors import read_json
from lapilli.serve.settings import KEY_VARIABLE
from lapilli.serve.upstream.backend import Endpoint

Engine = Literal["vllm", "sglang"]
_PROGRAMS: Mapping[Engine, tuple[str, str]] = {
    "vllm": ("vLLM", "pip install vllm (https://docs.vllm.ai, best in an environment of its own)"),
    "sglang": ("SGLang", "pip install sglang (https://docs.sglang.io, best in an environment of its own)"),
}
_OWN: Mapping[Engine, frozenset[str]] = {
    "vllm": frozenset({"--host", "--port", "--api-key", "--served-model-name", "--chat-template", "--model", "--uds",
                       "--chat-template-content-format", "--ssl-keyfile", "--ssl-certfile", "--root-path"}),
    "sglang": frozenset({"--host", "--port", "--api-key", "--served-model-name", "--chat-template", "--model-path",
                         "--model", "--config", "--ssl-keyfile", "--ssl-certfile", "--fastapi-root-path",
                         "--json-model-override-args"}),
}  # fmt: skip
"""Options that are set here: with others the engine would not be found, or be found by anybody."""
_QUIET = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
          "SGLANG_RETURN_ORIGINAL_LOGPROB": "1"}  # fmt: skip
"""Nothing is told to others or loaded from them; log-probabilities are the model's, before temperature."""
_PATCHES = ("--json-model-override-args", json.dumps({"vision_feature_select_strategy": "patch"}))
"""SGLang 0.5.23 refuses, when it loads a llava folder, transformers' word `default` for leaving the class token out;
its own word for it, `patch`, does the same in its forward pass."""
_TAIL_BYTES = 4000
_LOOK_SECONDS = 0.25


@dataclass(frozen=True)
class Wish:
    """What is to be started. `extra`: further options, as their documentation has them."""

    engine: Engine
    folder: Path
    name: str
    chat_template: str
    images: int
    gpus: int = 1
    extra: tuple[str, ...] = ()
    wait_seconds: float = 1800.0
    """For the model to be loaded."""
    stop_seconds: float = 30.0
    """For the engine to end when it is asked to."""


@dataclass
class Running:
    """A started engine."""

    engine: Engine
    process: subprocess.Popen[bytes]
    port: int
    key: str = field(repr=False)
    log: Path
    stopping: bool = False

    @property
    def endpoint(self) -> Endpoint:
        """Where and how it is asked."""
        return Endpoint(f"http://127.0.0.1:{self.port}", self.engine, self.key, ended=lambda: self.ended)

    @property
    def ended(self) -> str | None:
        """What became of it, if it ended by itself."""
        code = self.process.poll()
        if code is None or self.stopping:
            return None
        how = f"status {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        return f"it ended ({how}); its log: {self.log}"


def find(engine: Engine) -> str:
    """The engine's program: beside this Python's, else on the path. Raises RunError saying what to install."""
    beside = Path(sys.executable).with_name(engine)
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which(engine)
    if found is None:
        name, install = _PROGRAMS[engine]
        raise RunError(
            f"--engine {engine}: there is no program `{engine}` beside {sys.executable} or on PATH; install {name}: "
            f"{install}"
        )
    return found


def split_options(engine: Engine, given: str) -> tuple[str, ...]:
    """`--engine-args` as a list. Raises RunError for quotes without end, and for options that are set here."""
    try:
        options = shlex.split(given)
    except ValueError as error:
        raise RunError(f"--engine-args: {error}: {given}") from error
    own = [o for o in options if o.partition("=")[0].replace("_", "-") in _OWN[engine]]
    if own:
        raise RunError(f"--engine-args: {own[0]} is set by lapilli serve; leave it out")
    return tuple(options)


def command_of(wish: Wish, program: str, port: int, scratch: Path) -> list[str]:
    """The engine's command line; `scratch` holds what it reads beside the model."""
    template = scratch / "chat_template.jinja"
    place = ["--host", "127.0.0.1", "--port", str(port)]
    named = ["--served-model-name", wish.name, "--chat-template", str(template)]
    gpus = ["--tensor-parallel-size", str(wish.gpus)] if wish.gpus > 1 else []
    if wish.engine == "vllm":
        pictures = json.dumps({"image": wish.images})
        own = ["--chat-template-content-format", "openai", "--limit-mm-per-prompt", pictures]
        return [program, "serve", str(wish.folder), *place, *named, *own, *gpus, *wish.extra]
    model = ["--model-path", str(wish.folder), "--config", str(scratch / "key.yaml")]
    strategy = read_json(wish.folder / "config.json").get("vision_feature_select_strategy", "default")
    patches = _PATCHES if strategy == "default" else ()
    return [program, "serve", *model, *place, *named, *gpus, *patches, *wish.extra]


@contextlib.contextmanager
def started(wish: Wish, say: Callable[[str], None]) -> Iterator[Running]:
    """Inside, the engine runs and has loaded the model. `say` hears the command line, the log's place, and the wait.

    Raises RunError with the end of the engine's log if it ends, or is not ready in time. At the end it is asked to
    stop, and killed with all its processes if it does not.
    """
    program, key, port = find(wish.engine), secrets.token_urlsafe(32), _free_port()
    handle, log = tempfile.mkstemp(prefix=f"lapilli-{wish.engine}-", suffix=".log")  # for this user's eyes alone
    with tempfile.TemporaryDirectory(prefix="lapilli-engine-") as scratch, os.fdopen(handle, "wb") as out:
        command = command_of(wish, program, port, Path(scratch))
        _write_scratch(wish, key, Path(scratch))
        say(f"starting {shlex.join(command)}")
        say(f"its output: {log}")
        running = Running(wish.engine, _spawn(command, key, out), port, key, Path(log))
        try:
            _wait(running, wish, say)
            yield running
        finally:
            _end(running, wish.stop_seconds, say)


def _write_scratch(wish: Wish, key: str, scratch: Path) -> None:
    (scratch / "chat_template.jinja").write_text(wish.chat_template, encoding="utf-8")
    if wish.engine == "sglang":  # a key among the arguments could be read by every user of the machine
        (scratch / "key.yaml").write_text(f"api-key: {key}\n", encoding="utf-8")


def _spawn(command: Sequence[str], key: str, out: IO[bytes]) -> subprocess.Popen[bytes]:
    child = Path(__file__).with_name("child.py")
    environment = {name: value for name, value in os.environ.items() if name != KEY_VARIABLE}
    environment |= _QUIET | {"VLLM_API_KEY": key}
    return subprocess.Popen(
        [sys.executable, "-I", str(child), str(os.getpid()), *command],
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,  # Ctrl-C is for this process, which lets answers end first
    )


def _wait(running: Running, wish: Wish, say: Callable[[str], None]) -> None:
    begun = said = time.monotonic()
    endpoint = running.endpoint
    with httpx.Client(headers=endpoint.headers, trust_env=False, timeout=10.0) as client:
        while True:
            what = running.ended
            if what is not None:
                raise RunError(f"{wish.engine}: {what}\n{tail(running.log)}")
            with contextlib.suppress(httpx.HTTPError):
                if client.get(endpoint.root + endpoint.health).status_code == 200:
                    say(f"{wish.engine} has loaded {wish.name} in {time.monotonic() - begun:.0f} s")
                    return
            now = time.monotonic()
            if now - begun > wish.wait_seconds:
                raise RunError(
                    f"{wish.engine}: not ready after {wish.wait_seconds:g} s (--engine-seconds); its log: "
                    f"{running.log}\n{tail(running.log)}"
                )
            if now - said >= 10:
                said = now
                lines = tail(running.log).splitlines()
                say(f"{wish.engine} is loading, {now - begun:.0f} s: {lines[-1][:160] if lines else ''}")
            time.sleep(_LOOK_SECONDS)


def _end(running: Running, wait_seconds: float, say: Callable[[str], None]) -> None:
    """Ask the engine to stop; then nothing of it is left."""
    process, running.stopping = running.process, True
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(wait_seconds)
        except subprocess.TimeoutExpired:
            say(f"{running.engine} did not end within {wait_seconds:g} s and is killed")
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # its group: what it started itself, too
    process.wait()


def tail(log: Path) -> str:
    """The end of a log, as text."""
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL_BYTES))
        return "\n".join(file.read().decode("utf-8", "replace").splitlines()[-15:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
