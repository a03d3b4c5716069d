"""Pictures by address: what is fetched, and that no trick reaches a machine that the public network does not route to.

127.0.0.2 plays the public network; everything else on this machine plays the private one.
"""

import base64
import ipaddress
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler

import pytest
from tests.support.loopback import loopback

from lapilli.generate.engine import Engine
from lapilli.generate.processor import Processor
from lapilli.serve.reading import Reader
from lapilli.serve.refusal import ApiError
from lapilli.serve.remote import RemotePictures, is_public, resolve
from lapilli.serve.request import ChatRequest
from lapilli.serve.settings import Limits

PUBLIC = "127.0.0.2"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append((self.path, self.headers["Host"]))
        self.server.replies[self.path](self)

    def log_message(self, *_):
        pass


def reply(body=b"", status=200, **headers):
    def write(handler):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return write


def drip(handler):
    """A byte of a header every twentieth of a second, for ever."""
    try:
        while True:
            handler.wfile.write(b"H")
            handler.wfile.flush()
            time.sleep(0.05)
    except OSError:
        pass


@contextmanager
def listening(host, **replies):
    with loopback(Handler, host, asked=[], replies={f"/{name}": made for name, made in replies.items()}) as server:
        server.port, server.url = server.server_address[1], server.root
        yield server


def remote(*servers, **more):
    settings = {"max_bytes": 1000, "seconds": 2.0, "allowed": lambda a: str(a) == PUBLIC}
    return RemotePictures(**{**settings, "ports": [s.port for s in servers], **more})


def fetch(fetcher, url):
    return fetcher.fetch(url, "messages.0", fetcher.until())


def refusal(fetcher, url):
    with pytest.raises(ApiError) as caught:
        fetch(fetcher, url)
    return caught.value


def test_a_picture_comes_as_it_is_and_redirects_are_followed():
    with listening(PUBLIC, here=reply(status=302, Location="there?a=1")) as server:
        server.replies["/there?a=1"] = reply(b"picture")
        assert fetch(remote(server), f"{server.url}/here") == b"picture"
        assert [path for path, _ in server.asked] == ["/here", "/there?a=1"]


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.0.1", "169.254.169.254", "100.64.0.1", "100.100.100.200",
        "0.0.0.0", "224.0.0.1", "255.255.255.255", "168.63.129.16", "192.0.0.192", "::1", "::", "fe80::1",
        "fd00:ec2::254", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:1::1",
        "ff02::1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address):
    assert not is_public(ipaddress.ip_address(address))


def test_addresses_that_are_public():
    assert all(is_public(ipaddress.ip_address(a)) for a in ("8.8.8.8", "151.101.1.69", "2606:4700::6810:84e5"))


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "127.1", "[::1]", "[::ffff:127.0.0.1]", "0"]
)
def test_no_spelling_of_this_machine_is_connected_to(host):
    with listening("127.0.0.1", secret=reply(b"secret")) as inside:
        plain = RemotePictures(1000, seconds=5, ports=[inside.port])
        error = refusal(plain, f"http://{host}:{inside.port}/secret")
        assert error.code in ("image_url_refused", "image_url_failed")
        assert not inside.asked


def test_a_redirect_into_the_private_network_is_refused():
    with (
        listening("127.0.0.1", secret=reply(b"secret")) as inside,
        listening(PUBLIC, here=reply(status=301, Location=f"{inside.url}/secret")) as outside,
    ):
        assert refusal(remote(inside, outside), f"{outside.url}/here").code == "image_url_refused"
        assert len(outside.asked) == 1
        assert not inside.asked


def test_a_name_that_means_another_machine_the_second_time_gains_nothing():
    """DNS rebinding: each look-up is checked, and the connection goes to what was checked."""
    answers = iter([[PUBLIC], ["127.0.0.1"]])
    with (
        listening("127.0.0.1", again=reply(b"secret")) as inside,
        listening(PUBLIC, here=reply(status=302, Location="/again", Connection="close")) as outside,
    ):
        fetcher = remote(inside, outside, resolver=lambda host, port: next(answers))
        assert refusal(fetcher, f"http://rebinding.test:{outside.port}/here").code == "image_url_refused"
        assert outside.asked == [("/here", f"rebinding.test:{outside.port}")]
        assert not inside.asked


def test_one_private_address_among_public_ones_is_enough_to_refuse():
    with listening(PUBLIC, here=reply(b"picture")) as server:
        fetcher = remote(server, resolver=lambda host, port: [PUBLIC, "10.0.0.1"])
        assert refusal(fetcher, f"http://mixed.test:{server.port}/here").code == "image_url_refused"
        assert not server.asked


@pytest.mark.parametrize(
    "url",
    [
        "ftp://127.0.0.2/x", "file:///etc/passwd", "gopher://127.0.0.2:80/_x", "http://", "http:///x", "http://[::1/x",
        "http://user:secret@127.0.0.2/x", "http://127.0.0.2:22/x", "http://127.0.0.2/a b", "http://127.0.0.2/\r\nX: 1",
        "http://127.0.0.2:99999/x",
    ],
)  # fmt: skip
def test_what_is_no_plain_web_address_is_refused(url):
    error = refusal(RemotePictures(1000), url)
    assert (error.status, error.code) == (400, "image_url_refused")
    assert "secret" not in error.message


def test_redirects_bytes_seconds_and_errors_are_bounded():
    with listening(
        PUBLIC,
        round=reply(status=302, Location="/round"),
        nowhere=reply(status=302),
        scheme=reply(status=302, Location="file:///etc/passwd"),
        large=reply(b"x" * 1001),
        boasts=reply(b"x", Content_Length="5000"),
        packed=reply(b"x", Content_Encoding="gzip"),
        missing=reply(b"no", status=404),
        slow=drip,
    ) as server:
        fetcher = remote(server)
        codes = {path: refusal(fetcher, f"{server.url}{path}").code for path in server.replies if path != "/slow"}
        assert [path for path, _ in server.asked].count("/round") == 4
        began = time.monotonic()
        late = refusal(remote(server, seconds=0.5), f"{server.url}/slow")
    assert codes == {
        "/round": "image_url_failed",
        "/nowhere": "image_url_failed",
        "/scheme": "image_url_refused",
        "/large": "image_too_large",
        "/boasts": "image_too_large",
        "/packed": "image_url_failed",
        "/missing": "image_url_failed",
    }
    assert "0.5 s" in late.message
    assert time.monotonic() - began < 2


def test_only_so_many_are_fetched_at_a_time():
    with listening(PUBLIC, slow=drip, here=reply(b"picture")) as server:
        fetcher = remote(server, at_once=1, seconds=0.8)
        held = threading.Thread(target=refusal, args=(fetcher, f"{server.url}/slow"))
        held.start()
        while not server.asked:
            time.sleep(0.01)
        with pytest.raises(ApiError, match="too many") as caught:
            fetcher.fetch(f"{server.url}/here", "messages.0", time.monotonic() + 0.1)
        held.join()
        assert caught.value.status == 429
        assert fetch(fetcher, f"{server.url}/here") == b"picture"


def asking(url):
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
    return ChatRequest.model_validate({"model": "tiny", "messages": [{"role": "user", "content": content}]})


def test_a_request_may_name_a_picture_by_its_address_where_that_is_allowed(tiny, models):
    picture = (models / "wide.jpg").read_bytes()
    engine, processor = Engine(tiny), Processor(tiny)
    inside = asking(f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}")
    with listening(PUBLIC, here=reply(picture)) as server:
        outside = asking(f"{server.url}/here")
        reader = Reader(engine, processor, Limits(), remote(server, max_bytes=len(picture)))
        assert reader.fetches(outside)
        assert not reader.fetches(inside)
        assert reader.read(outside).keys == reader.read(inside).keys
        closed = Reader(engine, processor, Limits())
        assert not closed.fetches(outside)
        with pytest.raises(ApiError, match="fetches no addresses"):
            closed.read(outside)
    assert len(server.asked) == 1


def test_names_are_looked_up_as_the_system_does():
    assert "127.0.0.1" in resolve("localhost", 80)
