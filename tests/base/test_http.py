"""Downloads against a real server that misbehaves."""

import hashlib
import random
from contextlib import contextmanager

import pytest
from tests.support.faulty_server import File, serving

from lapilli.base.http import Expected, Fetcher, HttpError, Limits, is_loopback, is_private

CONTENT = random.Random(7).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@contextmanager
def fetching(**options):
    waits = []
    with Fetcher(limits=Limits(attempts=3, read_seconds=5), sleep=waits.append, **options) as fetcher:
        fetcher.waits = waits
        yield fetcher


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_comes_whole_and_is_checked(tmp_path):
    heard = []
    with serving({"/a.bin": File(CONTENT)}) as server, fetching() as fetcher:
        got = fetcher.download(
            f"{server.url}/a.bin",
            tmp_path / "new" / "a.bin",
            Expected(sha256=SHA256),
            on_bytes=lambda *at: heard.append(at),
        )
    assert (tmp_path / "new" / "a.bin").read_bytes() == CONTENT
    assert (got.size, got.sha256, got.checked, got.final_host) == (len(CONTENT), SHA256, "sha256", "127.0.0.1")
    assert heard[-1] == (len(CONTENT), len(CONTENT))
    assert left(tmp_path / "new") == ["a.bin"]


def test_a_connection_cut_many_times_goes_on_by_range(tmp_path):
    cuts = [50_000, 60_000, 1, 70_000, 10]  # more cuts than tries allowed: each brings something
    with serving({"/a": File(CONTENT, cuts=cuts)}) as server, fetching() as fetcher:
        fetcher.download(f"{server.url}/a", tmp_path / "a")
        assert (tmp_path / "a").read_bytes() == CONTENT
        asked = server.ranges("/a")
    assert asked == [None, *(f"bytes={sum((50_000, 60_000, 1, 70_000, 10)[:n])}-" for n in range(1, 6))]


def test_a_later_run_goes_on_where_an_earlier_one_gave_up(tmp_path):
    file = File(CONTENT, cuts=[100_000, 0, 0, 0])
    with serving({"/a": file}) as server:
        with fetching() as fetcher, pytest.raises(HttpError, match="100,000 bytes are kept"):
            fetcher.download(f"{server.url}/a", tmp_path / "a")
        assert not (tmp_path / "a").exists()
        file.cuts.clear()
        with fetching() as fetcher:
            fetcher.download(f"{server.url}/a", tmp_path / "a")
        assert server.ranges("/a")[-1] == "bytes=100000-"
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_a_run_stopped_after_the_last_byte_only_checks(tmp_path):
    file = File(CONTENT, cuts=[len(CONTENT) - 1, 0, 0, 0])
    with serving({"/a": file}) as server, fetching() as fetcher:
        with pytest.raises(HttpError):
            fetcher.download(f"{server.url}/a", tmp_path / "a")
        with open(tmp_path / "a.part", "ab") as part:
            part.write(CONTENT[-1:])
        file.cuts.clear()
        fetcher.download(f"{server.url}/a", tmp_path / "a", Expected(sha256=SHA256))
    assert (tmp_path / "a").read_bytes() == CONTENT


@pytest.mark.parametrize("etag", [True, False])
def test_a_file_that_changed_in_between_is_fetched_anew(tmp_path, etag):
    new = CONTENT[::-1]
    file = File(CONTENT, cuts=[100_000, 0, 0, 0], etag=etag)
    with serving({"/a": file}) as server, fetching() as fetcher:
        with pytest.raises(HttpError):
            fetcher.download(f"{server.url}/a", tmp_path / "a")
        file.cuts.clear()
        file.content = new
        fetcher.download(f"{server.url}/a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == new


def test_pieces_of_two_versions_are_found_by_the_hash_and_fetched_anew(tmp_path):
    file = File(CONTENT[::-1], cuts=[100_000, 0, 0, 0], etag=False)
    with serving({"/a": file}) as server, fetching() as fetcher:
        with pytest.raises(HttpError):
            fetcher.download(f"{server.url}/a", tmp_path / "a", Expected(sha256=SHA256))
        file.cuts.clear()
        file.content = CONTENT
        fetcher.download(f"{server.url}/a", tmp_path / "a", Expected(sha256=SHA256))
        assert server.ranges("/a")[-2:] == ["bytes=100000-", None]
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_a_server_without_ranges_starts_again(tmp_path):
    with serving({"/a": File(CONTENT, cuts=[100_000], ranges=False)}) as server, fetching() as fetcher:
        fetcher.download(f"{server.url}/a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_a_busy_server_is_asked_again_with_growing_waits(tmp_path):
    with serving({"/a": File(CONTENT, failures=[503, 500])}) as server, fetching() as fetcher:
        fetcher.download(f"{server.url}/a", tmp_path / "a")
        assert fetcher.waits == [1.0, 2.0]
    with serving({"/a": File(CONTENT, failures=[502] * 9)}) as server, fetching() as fetcher:
        with pytest.raises(HttpError, match="502 Bad Gateway; gave up after 3 tries"):
            fetcher.download(f"{server.url}/a", tmp_path / "b")
        assert len(server.requests) == 3


def test_a_refusal_is_not_repeated_and_says_its_status(tmp_path):
    with serving({"/a": File(CONTENT, failures=[404])}) as server, fetching() as fetcher:
        with pytest.raises(HttpError, match="404 Not Found") as caught:
            fetcher.download(f"{server.url}/a", tmp_path / "a")
        assert caught.value.status == 404
        assert len(server.requests) == 1
    assert left(tmp_path) == []


def test_a_server_that_is_not_there(tmp_path):
    with serving({}) as server:
        url = server.url
    with fetching() as fetcher, pytest.raises(HttpError, match="the connection failed"):
        fetcher.download(f"{url}/a", tmp_path / "a")


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        (Expected(sha256="0" * 64), f"the sha256 of what came is {SHA256}"),
        (Expected(md5="0" * 32), "the md5 of what came is"),
        (Expected(size=len(CONTENT) + 1), "offers 300,000 bytes, it should have 300,001"),
    ],
)
def test_what_is_not_as_expected_gets_no_name(tmp_path, expected, message):
    with serving({"/a": File(CONTENT)}) as server, fetching() as fetcher:
        with pytest.raises(HttpError, match=message):
            fetcher.download(f"{server.url}/a", tmp_path / "a", expected)
        assert len(server.requests) == 1
    assert left(tmp_path) == []


def test_a_wrong_hash_after_a_cut_is_tried_once_more_and_then_refused(tmp_path):
    with serving({"/a": File(CONTENT, cuts=[10, 300_000, 10])}) as server, fetching() as fetcher:
        with pytest.raises(HttpError, match="nothing was kept"):
            fetcher.download(f"{server.url}/a", tmp_path / "a", Expected(sha256="0" * 64))
        assert len(server.requests) == 4
    assert left(tmp_path) == []


def test_a_size_that_no_header_states_is_still_checked(tmp_path):
    with serving({"/a": File(CONTENT, states_size=False)}) as server, fetching() as fetcher:
        with pytest.raises(HttpError, match="300,000 bytes came, it should have 5"):
            fetcher.download(f"{server.url}/a", tmp_path / "a", Expected(size=5))
        with pytest.raises(HttpError, match="more came than the 1,000 bytes allowed"):
            fetcher.download(f"{server.url}/a", tmp_path / "b", max_bytes=1000)
    assert left(tmp_path) == []


def test_too_large_is_refused_before_a_byte(tmp_path):
    with (
        serving({"/a": File(CONTENT)}) as server,
        fetching() as fetcher,
        pytest.raises(HttpError, match="300,000 bytes are more than the 1,000 allowed"),
    ):
        fetcher.download(f"{server.url}/a", tmp_path / "a", max_bytes=1000)
    assert left(tmp_path) == []


def test_a_web_page_is_not_taken_for_a_file(tmp_path):
    page = File(b"<html>please log in</html>", kind="text/html; charset=utf-8")
    with serving({"/a.zip": page}) as server, fetching() as fetcher, pytest.raises(HttpError, match="a web page came"):
        fetcher.download(f"{server.url}/a.zip", tmp_path / "a.zip")
    assert left(tmp_path) == []


def test_a_redirect_is_followed_and_the_hubs_hash_on_the_way_is_checked(tmp_path):
    said = {"X-Linked-ETag": f'"{SHA256}"', "X-Linked-Size": str(len(CONTENT)), "X-Repo-Commit": "abc"}
    files = {"/hub": File(redirect="/store", headers=said), "/store": File(CONTENT)}
    with serving(files) as server, fetching() as fetcher:
        got = fetcher.download(f"{server.url}/hub", tmp_path / "a")
        assert (got.checked, got.revision) == ("sha256 (server)", "abc")
        files["/hub"].headers = {"X-Linked-ETag": f'"{"0" * 64}"'}
        with pytest.raises(HttpError, match=r"the sha256 \(server\) of what came"):
            fetcher.download(f"{server.url}/hub", tmp_path / "b")
        files["/hub"].headers = {"X-Linked-Size": "12"}
        with pytest.raises(HttpError, match="the hub says 12"):
            fetcher.download(f"{server.url}/hub", tmp_path / "c")
    assert left(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("file:///etc/passwd", "only https addresses"),
        ("ftp://127.0.0.1/x", "only https addresses"),
        ("http://example.com/x", "plain http can be changed"),
        ("https://10.1.2.3/x", "leads into a private network"),
        ("https://[::ffff:192.168.0.1]/x", "leads into a private network"),
        ("https://169.254.169.254/latest/meta-data", "leads into a private network"),
        ("https://user:secret@example.com/x", "an address with a password"),
    ],
)
def test_a_redirect_to_a_forbidden_place_is_refused(tmp_path, place, message):
    with serving({"/a": File(redirect=place)}) as server, fetching() as fetcher:
        with pytest.raises(HttpError, match=message) as caught:
            fetcher.download(f"{server.url}/a", tmp_path / "a")
        assert "redirected from" in str(caught.value)
        assert "secret" not in str(caught.value)


def test_redirects_in_a_circle_end(tmp_path):
    with serving({"/a": File(redirect="/a")}) as server, fetching() as fetcher:
        with pytest.raises(HttpError, match="more than 5 redirects"):
            fetcher.download(f"{server.url}/a", tmp_path / "a")
        assert len(server.requests) == 6


def test_a_public_host_may_not_lead_to_this_machine():
    with fetching() as fetcher:
        with pytest.raises(HttpError, match="private network"):
            fetcher._allowed("http://localhost:8000/x", "https://example.com/x")
        assert fetcher._allowed("https://example.com/x", "https://example.com/x") == "example.com"
    with fetching(http_hosts=frozenset({"example.com"}), open_hosts=frozenset({"10.0.0.1"})) as fetcher:
        assert fetcher._allowed("http://example.com/x", "http://example.com/x") == "example.com"
        assert fetcher._allowed("https://10.0.0.1/x", "https://example.com/x") == "10.0.0.1"


def test_a_token_goes_to_its_host_alone(tmp_path):
    with serving({"/there": File(CONTENT)}) as other:
        place = other.url.replace("127.0.0.1", "localhost")
        files = {"/a": File(redirect=f"{place}/there", wants_token="secret")}
        with serving(files) as server, fetching(tokens={"127.0.0.1": "secret"}) as fetcher:
            fetcher.download(f"{server.url}/a", tmp_path / "a")
            assert "secret" not in repr(fetcher)
        assert "authorization" not in other.requests[0][1]
    with serving({"/a": File(CONTENT, wants_token="secret")}) as server, fetching() as fetcher:
        with pytest.raises(HttpError) as caught:
            fetcher.download(f"{server.url}/a", tmp_path / "b")
        assert caught.value.status == 403


def test_what_counts_as_inside():
    assert is_loopback("localhost")
    assert is_loopback("127.8.8.8")
    assert is_loopback("::1")
    assert is_loopback("::ffff:127.0.0.1")
    assert not is_private("::ffff:8.8.8.8")
    assert not is_loopback("localhost.example.com")
    assert is_private("fd00::1")
    assert not is_private("8.8.8.8")
    assert not is_private("example.com")
