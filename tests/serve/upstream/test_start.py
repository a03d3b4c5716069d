"""Engines as children: found, started, waited for, ended. A small program stands for vLLM and SGLang.

It takes their command line, notes it, and serves by our own server, so that what answers is a real one.
"""

import json
import os
import signal
import stat
import subprocess
import sys
import time

import httpx
import pytest
from tests.support.server_process import serving
from tests.support.tiny import PARTS

from lapilli.base.errors import ModelError, RunError
from lapilli.serve.upstream import start as upstream_start
from lapilli.serve.upstream.folder import loadable, with_prefix
from lapilli.serve.upstream.start import split_options

ASK = {"messages": [{"role": "user", "content": "?"}], "temperature": 0}

_PROGRAM = """#!{python}
import json, os, pathlib, subprocess, sys
arguments = sys.argv[1:]
given = dict(zip(arguments, arguments[1:]))
template = pathlib.Path(given["--chat-template"]).read_text()
config = pathlib.Path(given["--config"]).read_text() if "--config" in given else ""
key = config.partition(": ")[2].strip() or os.environ["VLLM_API_KEY"]
note = {{"arguments": arguments, "template": template, "pid": os.getpid(), "key": key,
        "ours": os.environ.get("LAPILLI_API_KEY")}}
pathlib.Path({note!r}).write_text(json.dumps(note))
print("loading the weights", flush=True)
if "--fail" in arguments:
    sys.exit("no memory on the device")
folder = arguments[1] if arguments[1][0] != "-" else given["--model-path"]
os.environ["LAPILLI_API_KEY"] = key
os.execv(sys.executable, [sys.executable, "-m", "lapilli.cli", "serve", given["--served-model-name"] + "=" + folder,
         "--port", given["--port"], "--device", "cpu", "--no-page", "--slots", "2"])
"""


@pytest.fixture
def engine(tmp_path):
    """A folder for PATH with both programs, and a reader of what they were started with."""
    note = tmp_path / "note.json"
    for name in ("vllm", "sglang"):
        program = tmp_path / name
        program.write_text(_PROGRAM.format(python=sys.executable, note=str(note)))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TMPDIR": str(tmp_path), "LAPILLI_API_KEY": "sk-ours"}
    return environment, lambda: json.loads(note.read_text())


def gone(pid, seconds=5.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


def asked(server, body):
    headers = {"authorization": "Bearer sk-ours"}
    return httpx.post(server.url + "/chat/completions", json=ASK | body, headers=headers, timeout=30)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_an_engine_is_started_asked_and_ended(name, engine, models, tmp_path):
    environment, note = engine
    arguments = (f"it={models / 'parrot'}", "--engine", name, "--engine-args", "--dtype float16 --seed 1")
    with serving(*arguments, "--images", "5", environment=environment, seconds=300) as server:
        started = note()
        assert started["arguments"][0] == "serve"
        assert started["arguments"][-4:] == ["--dtype", "float16", "--seed", "1"]
        assert str(models / "parrot") in started["arguments"]
        assert "add_generation_prompt" in started["template"]
        assert started["ours"] is None
        assert started["key"] not in " ".join([*started["arguments"], *server.lines])
        if name == "vllm":
            assert '{"image": 5}' in started["arguments"]
        else:
            assert '{"vision_feature_select_strategy": "patch"}' in started["arguments"]
        assert any("starting" in line and "--served-model-name it" in line for line in server.lines)
        made = asked(server, {"model": "it"}).json()
        assert (made["model"], made["choices"][0]["message"]["content"]) == ("it", "a red dog 음식")
        (log,) = tmp_path.glob(f"lapilli-{name}-*.log")
        assert "loading the weights" in log.read_text()
        assert log.stat().st_mode & 0o077 == 0
        server.terminate()
        assert server.process.wait(30) == 0, server.lines
        assert gone(started["pid"], 0.5)
        assert not list(tmp_path.glob("lapilli-engine-*"))


@pytest.mark.slow
def test_with_the_server_killed_its_engine_ends_and_with_the_engine_killed_the_server_says_so(engine, models):
    environment, note = engine
    arguments = (f"it={models / 'parrot'}", "--engine", "vllm")
    with serving(*arguments, environment=environment, seconds=300) as server:
        server.process.kill()
        assert gone(note()["pid"])
    with serving(*arguments, environment=environment, seconds=300) as server:
        os.kill(note()["pid"], signal.SIGKILL)
        assert server.process.wait(30) == 1
    said = "\n".join(server.lines)
    assert "it ended (signal SIGKILL); its log: " in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_an_engine_that_fails_to_start_is_quoted(engine, models):
    environment, _ = engine
    command = [sys.executable, "-m", "lapilli.cli", "serve", str(models / "parrot"), "--engine", "vllm"]
    command += ["--engine-args", "--fail", "--port", "0"]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "it ended (status 1)" in done.stderr
    assert "no memory on the device" in done.stderr


def test_what_can_not_be_started_is_said_before_anything_long(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RunError, match="pip install sglang"):
        upstream_start.find("sglang")
    assert split_options("vllm", "--a 'b c' --d=e") == ("--a", "b c", "--d=e")
    for options, what in (("'", "quotation"), ("--api-key x", "set by lapilli"), ("--port=1", "set by lapilli")):
        with pytest.raises(RunError, match=what):
            split_options("vllm", options)
    with pytest.raises(RunError, match="--config"):
        split_options("sglang", "--config mine.yaml")


def test_folders_that_an_engine_can_not_load_name_the_command_that_helps(models, tmp_path):
    with pytest.raises(ModelError, match=r"lapilli convert .*--to hf"):
        loadable(PARTS / "tiny-llava-v1.5", "vllm")
    config = json.loads((models / "tiny" / "config.json").read_text())
    for change, what in (
        ({"model_type": "llava_next"}, "llava_next"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "SGLang takes CLIP"),
        ({"quantization_config": {}}, "quantised"),
        ({"model_type": "llama"}, "not a joined one"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ModelError, match=what):
            loadable(tmp_path, "sglang")


def test_a_template_gets_the_first_token_once():
    from transformers.utils.chat_template_utils import render_jinja_template

    for jinja in ("\n {{ messages[0].content }}  \n", "<s>\n {{ messages[0].content }}  \n"):
        ((text,), _) = render_jinja_template([[{"content": "it's"}]], chat_template=with_prefix(jinja, "<s>"))
        ((bare,), _) = render_jinja_template([[{"content": "it's"}]], chat_template="{{ '' }}" + jinja + "{{ '' }}")
        assert text == "<s>" + bare.removeprefix("<s>")
    assert with_prefix("x", "") == "x"
