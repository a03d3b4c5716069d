"""Who may use a server, and what its models are called."""

import hmac
import socket

import pytest

from lapilli.base.errors import RunError
from lapilli.serve.models import name_models
from lapilli.serve.server import bind, url_of
from lapilli.serve.settings import Keys, Limits, check_address, read_keys


def test_keys_of_a_file_and_the_environment(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# ours\n\nfirst\n  second \n")
    keys = read_keys(file, {"LAPILLI_API_KEY": "third"})
    assert [keys.find(k) for k in ("first", "second", "third", "# ours", "", "firs")] == [0, 1, 2, None, None, None]
    assert "first" not in repr(keys)
    assert not read_keys(None, {})


def test_a_key_is_compared_with_every_other_in_constant_time(monkeypatch):
    """How long a refusal takes says nothing of how much of a key was right, or of which key it was."""
    compared = []
    constant = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(a) or constant(a, b))
    keys = Keys.of(["first", "second", "third"])
    assert [keys.find(k) for k in ("first", "third", "firsx", "x")] == [0, 2, None, None]
    assert len(compared) == 12
    assert all(isinstance(one, bytes) and len(one) == 32 for one in compared)


@pytest.mark.parametrize("text", ["", "# nothing\n", "two words\n", "gr\u00fcn\n"])
def test_refused_key_files(tmp_path, text):
    (tmp_path / "keys").write_text(text)
    with pytest.raises(RunError, match="key"):
        read_keys(tmp_path / "keys", {})


def test_an_empty_key_is_no_key():
    with pytest.raises(RunError, match="not empty"):
        read_keys(None, {"LAPILLI_API_KEY": ""})


def test_addresses():
    for host in ("127.0.0.1", "localhost", "::1"):
        check_address(host, Keys())
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org", ""):
        with pytest.raises(RunError, match="give it a key"):
            check_address(host, Keys())
        check_address(host, Keys.of(["k"]))


def test_bound():
    bound = bind("127.0.0.1", 0)
    with bound:
        assert bound.proto == socket.IPPROTO_TCP  # else asyncio leaves Nagle's algorithm on, and answers wait 40 ms
        assert url_of(bound) == f"http://127.0.0.1:{bound.getsockname()[1]}/v1"
        bound.listen()
        with pytest.raises(RunError, match=r"--port \d+: Address already in use"):
            bind("127.0.0.1", bound.getsockname()[1])


def test_limits():
    with pytest.raises(RunError, match="--request-seconds"):
        Limits(request_seconds=0)


def test_names(tmp_path):
    (tmp_path / "a=b").mkdir()
    assert name_models([str(tmp_path), "mine=x/y", str(tmp_path / "a=b")]) == {
        tmp_path.name: str(tmp_path),
        "mine": "x/y",
        "a=b": str(tmp_path / "a=b"),
    }
    with pytest.raises(RunError, match='two models are called "y"'):
        name_models(["x/y", "z/y"])
    with pytest.raises(RunError, match="NAME=PATH"):
        name_models(["=x"])
