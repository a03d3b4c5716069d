"""A mixture from a local server into its tree: the whole command, with what goes wrong on the way."""

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
import time
import zipfile

import pytest
import yaml
from tests.support.faulty_server import File, serving
from typer import Typer
from typer.testing import CliRunner

from lapilli.base.errors import DataError, LapilliError
from lapilli.base.http import Fetcher, Limits
from lapilli.base.progress import Progress
from lapilli.cli.data_fetch import fetch
from lapilli.data.fetch.links import fetch_links, read_list
from lapilli.data.fetch.plan import make_plan, read_receipts
from lapilli.data.fetch.run import run_plan
from lapilli.data.fetch.table import Table

JPEG, GIF, PNG = b"\xff\xd8\xff\xe0 a jpeg", b"GIF89a a gif", b"\x89PNG\r\n\x1a\n a png"
RECORDS = [
    {"id": "1", "image": "coco/train2017/1.jpg", "conversations": []},
    {"id": "2", "image": "ocr_vqa/images/A1.jpg", "conversations": []},
    {"id": "3", "image": "ocr_vqa/images/B2.jpg", "conversations": []},
    {"id": "4", "conversations": []},
]
TEXT = json.dumps(RECORDS).encode()
LICENCE = {"licence": "free to test", "licence_page": "https://example.com/terms"}


def zipped(members):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as out:
        for name, content in members.items():
            out.writestr(name, content)
    return stream.getvalue()


COCO = zipped({"train2017/1.jpg": JPEG, "train2017/2.jpg": JPEG * 2})


def a_table(url, **changes):
    """A mixture as mix665k is made: annotations, an archive, a list to get by hand, and the pictures it lists."""
    items = {
        "notes": {"url": f"{url}/mix.json", "save": "mix.json", "about": "1 kB", **LICENCE},
        "coco": {
            "url": f"{url}/coco.zip",
            "save": "downloads/coco.zip",
            "bytes": len(COCO),
            "md5": hashlib.md5(COCO).hexdigest(),
            "hash_from": "its maker",
            "unpack": {"into": "coco"},
            **LICENCE,
        },
        "list": {"page": "https://example.com/ask", "request": "ask nicely", "save": "downloads/o/l.json", **LICENCE},
        "covers": {
            "save": "ocr_vqa/images",
            "links": {
                "list": "downloads/o/l.json",
                "hosts": ["127.0.0.1"],
                "http": True,
                "only_named_in": "mix.json",
                "named_below": "ocr_vqa/images",
            },
            **LICENCE,
        },
    }
    for name, change in changes.items():
        items[name] = {**items[name], **change}
    mixture = {
        "title": "A small mixture",
        "folder": "small_data",
        "items": list(items),
        "sources": [{"path": "mix.json", "images": "."}],
    }
    return {"items": items, "mixtures": {"small": mixture}}


def files():
    return {
        "/mix.json": File(TEXT),
        "/coco.zip": File(COCO),
        "/I/a.jpg": File(JPEG),
        "/I/b.gif": File(GIF),
        "/I/c.png": File(PNG),
    }


def put_list(out, url, **more):
    path = out / "downloads" / "o" / "l.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = {"A1": f"{url}/I/a.jpg", "B2": f"{url}/I/b.gif", "C3": f"{url}/I/c.png", **more}
    path.write_text(json.dumps({name: {"imageURL": address} for name, address in entries.items()}), "utf-8")


def run(table, out, *, keep_archives=False, attempts=2, **options):
    sources = Table.model_validate(table)
    plan = make_plan("small", sources.mixtures["small"], sources.items, out, **options)
    with Fetcher(limits=Limits(attempts=attempts, read_seconds=5), sleep=lambda _: None) as fetcher:
        return run_plan(plan, fetcher, keep_archives=keep_archives, stream=io.StringIO())


def states(table, out, **options):
    sources = Table.model_validate(table)
    return {s.name: s.state for s in make_plan("small", sources.mixtures["small"], sources.items, out, **options).steps}


def pictures(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.jpg")}


def test_everything_comes_into_its_tree_and_a_second_run_asks_nobody(tmp_path):
    with serving(files()) as server:
        table = a_table(server.url)
        put_list(tmp_path, server.url)
        outcome = run(table, tmp_path)
        assert outcome.problems == []
        assert pictures(tmp_path) == {
            "coco/train2017/1.jpg": JPEG,
            "coco/train2017/2.jpg": JPEG * 2,
            "ocr_vqa/images/A1.jpg": JPEG,
            "ocr_vqa/images/B2.jpg": GIF,
        }
        assert any("4 records name 3 pictures, all there" in note for note in outcome.notes)
        assert any("1 of the list are not named by mix.json" in note for note in outcome.notes)
        unchecked = f"notes: came whole; nothing is published to check it with but its size, {len(TEXT):,} bytes"
        assert [note for note in outcome.notes if note.startswith("notes:")] == [unchecked]
        assert any(note.startswith("list:") and "taken as it is, not checked" in note for note in outcome.notes)
        assert not (tmp_path / "downloads" / "coco.zip").exists()
        receipts = read_receipts(tmp_path)
        assert receipts["coco"].checked == "md5"
        assert receipts["coco"].sha256 == hashlib.sha256(COCO).hexdigest()
        assert (receipts["coco"].unpacked_files, receipts["covers"].unpacked_files) == (2, 2)
        assert states(table, tmp_path) == {
            "notes": "done",
            "coco": "done",
            "list": "here, not checked",
            "covers": "done",
        }
        asked = len(server.requests)
        assert run(table, tmp_path).problems == []
        assert len(server.requests) == asked


def test_one_source_that_fails_does_not_stop_the_others_and_the_next_run_does_the_rest(tmp_path):
    served = files()
    served["/mix.json"].cuts = [50, 0, 0]
    with serving(served) as server:
        table = a_table(server.url)
        first = run(table, tmp_path)
        assert [problem.split(":")[0] for problem in first.problems] == ["notes", "list", "covers"]
        assert "50 bytes are kept" in first.problems[0]
        assert (
            f"ask nicely. Page: https://example.com/ask. Put it at {tmp_path}/downloads/o/l.json" in first.problems[1]
        )
        assert set(pictures(tmp_path)) == {"coco/train2017/1.jpg", "coco/train2017/2.jpg"}
        assert states(table, tmp_path)["notes"] == "partly here"
        served["/mix.json"].cuts.clear()
        put_list(tmp_path, server.url)
        assert run(table, tmp_path).problems == []
        assert server.ranges("/mix.json")[-1] == "bytes=50-"
        assert len([path for path, _ in server.requests if path == "/coco.zip"]) == 1


def test_a_wrong_checksum_leaves_nothing(tmp_path):
    with serving(files()) as server:
        outcome = run(a_table(server.url, coco={"md5": "0" * 32}), tmp_path, skip=["list", "covers"])
    assert any("the md5 of what came is" in problem for problem in outcome.problems)
    assert not (tmp_path / "coco").exists()
    assert any("3 of the 3 pictures it names are not below" in problem for problem in outcome.problems)


def test_a_wrong_size_is_refused_before_it_comes(tmp_path):
    with serving(files()) as server:
        outcome = run(a_table(server.url, coco={"bytes": 10}), tmp_path, skip=["list", "covers"])
    assert any(f"offers {len(COCO):,} bytes, it should have 10" in problem for problem in outcome.problems)


def test_an_archive_with_a_trap_is_refused(tmp_path):
    trap = zipped({"train2017/1.jpg": JPEG, "../../outside.jpg": JPEG})
    served = {**files(), "/coco.zip": File(trap)}
    with serving(served) as server:
        table = a_table(server.url, coco={"bytes": len(trap), "md5": hashlib.md5(trap).hexdigest()})
        outcome = run(table, tmp_path / "out", skip=["list", "covers"])
    assert any("would leave the folder" in problem for problem in outcome.problems)
    assert list(tmp_path.rglob("outside.jpg")) == []


def test_unpacking_goes_on_after_a_stop(tmp_path):
    with serving(files()) as server:
        table = a_table(server.url)
        run(table, tmp_path, keep_archives=True, skip=["list", "covers"])
        archive = tmp_path / "downloads" / "coco.zip"
        assert archive.exists()
        (tmp_path / "downloads" / "receipts.json").unlink()  # as if killed before it was noted
        (tmp_path / "coco" / "train2017" / "2.jpg").unlink()
        assert states(table, tmp_path)["coco"] == "here, to unpack"
        outcome = run(table, tmp_path, skip=["list", "covers", "notes"])
        assert len([path for path, _ in server.requests if path == "/coco.zip"]) == 1
    assert any("2 files" in note and "1 of them were there" in note for note in outcome.notes)
    assert any("is taken as it is, not checked" in note for note in outcome.notes)
    assert (tmp_path / "coco" / "train2017" / "2.jpg").read_bytes() == JPEG * 2
    assert not archive.exists()


def test_a_file_put_there_by_hand_is_unpacked_and_kept(tmp_path):
    change = {"coco": {"url": None, "page": "https://example.com/ask", "request": "ask"}}
    with serving(files()) as server:
        table = a_table(server.url, **change)
        assert states(table, tmp_path)["coco"] == "waits for you"
        (tmp_path / "downloads").mkdir()
        (tmp_path / "downloads" / "coco.zip").write_bytes(COCO)
        run(table, tmp_path, skip=["list", "covers"])
    assert (tmp_path / "coco" / "train2017" / "1.jpg").exists()
    assert (tmp_path / "downloads" / "coco.zip").exists()
    assert states(table, tmp_path)["coco"] == "done"


def test_a_folder_filled_by_hand_is_taken_as_it_is(tmp_path):
    covers = {"links": None, "page": "https://example.com/ask", "request": "unpack it there"}
    with serving(files()) as server:
        table = a_table(server.url, covers=covers)
        (tmp_path / "ocr_vqa" / "images").mkdir(parents=True)
        assert states(table, tmp_path)["covers"] == "waits for you"
        assert any("unpack it there" in problem for problem in run(table, tmp_path, skip=["list"]).problems)
        (tmp_path / "ocr_vqa" / "images" / "A1.jpg").write_bytes(JPEG)
        assert states(table, tmp_path)["covers"] == "here, not checked"
        outcome = run(table, tmp_path, skip=["list"])
    assert any(note.startswith("covers:") and "not checked" in note for note in outcome.notes)
    assert len(outcome.problems) == 1
    assert "1 of the 3 pictures it names are not below" in outcome.problems[0]


def test_a_refused_file_says_what_to_ask_for(tmp_path):
    served = files()
    served["/mix.json"].wants_token = "secret"
    with serving(served) as server:
        table = a_table(
            server.url, notes={"request": "accept the conditions", "page": "https://example.com/conditions"}
        )
        outcome = run(table, tmp_path, skip=["list", "covers", "coco"])
    assert "403" in outcome.problems[0]
    assert "accept the conditions (https://example.com/conditions)" in outcome.problems[0]


def test_pictures_that_cannot_be_had_are_counted_listed_and_tried_again(tmp_path):
    served = files()
    del served["/I/b.gif"]
    with serving(served) as server:
        table = a_table(server.url)
        put_list(tmp_path, server.url)
        outcome = run(table, tmp_path)
        assert any("covers: 1 pictures could not be had (1: the server answered 404" in p for p in outcome.problems)
        assert any("1 of the 3 pictures it names are not below" in problem for problem in outcome.problems)
        missing = json.loads((tmp_path / "downloads" / "o" / "missing.json").read_text())
        assert list(missing) == ["B2"]
        assert states(table, tmp_path)["covers"] == "partly here"
        served["/I/b.gif"] = File(GIF)
        assert run(table, tmp_path).problems == []
        assert len([path for path, _ in server.requests if path == "/I/a.jpg"]) == 1


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("http://10.0.0.1/x.jpg", "its host is none of"),
        ("file:///etc/passwd", "its host is none of"),
        ("URL/I/page.jpg", "a web page came"),
        ("URL/I/text.jpg", "what came is no picture"),
        ("URL/I/huge.jpg", "bytes are more than"),
        ("URL/I/away.jpg", "leads into a private network"),
    ],
)
def test_a_list_cannot_lead_elsewhere_or_bring_anything_else(tmp_path, address, reason):
    served = {
        **files(),
        "/I/page.jpg": File(b"<html>", kind="text/html"),
        "/I/text.jpg": File(b"root:x:0:0"),
        "/I/huge.jpg": File(JPEG * 10_000),
        "/I/away.jpg": File(redirect="https://192.168.1.1/x.jpg"),
    }
    with serving(served) as server:
        table = a_table(server.url)
        table["items"]["covers"]["links"]["max_each"] = "50 kB"
        put_list(tmp_path, server.url, B2=address.replace("URL", server.url))
        outcome = run(table, tmp_path)
    assert any(reason in problem for problem in outcome.problems)
    assert not (tmp_path / "ocr_vqa" / "images" / "B2.jpg").exists()
    assert (tmp_path / "ocr_vqa" / "images" / "A1.jpg").read_bytes() == JPEG


def test_a_name_that_the_list_lacks_is_reported(tmp_path):
    with serving(files()) as server:
        put_list(tmp_path, server.url)
        path = tmp_path / "downloads" / "o" / "l.json"
        value = json.loads(path.read_text())
        del value["B2"]
        path.write_text(json.dumps(value))
        outcome = run(a_table(server.url), tmp_path)
    assert any("the annotations name it, l.json does not" in problem for problem in outcome.problems)


def test_a_host_that_gives_nothing_ends_the_list_early(tmp_path):
    with serving({"/mix.json": File(TEXT)}) as server:
        table = a_table(server.url)
        links = Table.model_validate(table).items["covers"].links.model_copy(update={"only_named_in": None})
        put_list(tmp_path, server.url, **{f"N{n}": f"{server.url}/I/{n}.jpg" for n in range(500)})
        with (
            Fetcher(sleep=lambda _: None) as fetcher,
            Progress("pictures", stream=io.StringIO()) as progress,
            pytest.raises(DataError, match=r"the first \d\d pictures could not be had; last: .* 404"),
        ):
            fetch_links(links, tmp_path, tmp_path / "x", fetcher, progress)
        assert len(server.requests) < 100


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must be an object"),
        ("{", "not JSON"),
        ('{"../evil": {"imageURL": "http://x/y"}}', "can't be a file name"),
        ('{".hidden": {"imageURL": "http://x/y"}}', "can't be a file name"),
        ('{"a": {"url": "http://x/y"}}', "has no `imageURL`"),
        ('{"a": null}', "has no `imageURL`"),
    ],
)
def test_a_list_that_cannot_be_used(tmp_path, text, message):
    path = tmp_path / "l.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_list(path)
    assert "l.json" in str(caught.value)


def test_two_at_once_in_one_folder_are_refused(tmp_path):
    script = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); print('held', flush=True); input()"
    (tmp_path / "downloads").mkdir()
    command = [sys.executable, "-c", script, os.fspath(tmp_path / "downloads" / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(DataError, match="another `lapilli data fetch` works in this folder"):
            run(a_table("http://127.0.0.1:1"), tmp_path)
        other.communicate(b"\n")


def test_the_disk_is_looked_at_first(tmp_path, monkeypatch):
    table = Table.model_validate(a_table("https://example.com", coco={"bytes": None, "about": "20 GB"}))
    plan = make_plan("small", table.mixtures["small"], table.items, tmp_path / "not" / "yet")
    assert plan.disk_bytes(keep_archives=False) == 1000 + 20_000_000_000 + round(20_000_000_000 * 1.03)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 30_000_000_000}))
    with pytest.raises(DataError, match=r"takes about 40\.6 GB and 30 GB are free"):
        plan.check_disk(keep_archives=False)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 50_000_000_000}))
    plan.check_disk(keep_archives=False)


def test_archives_that_are_removed_do_not_add_up():
    table = a_table("https://example.com", coco={"bytes": None, "about": "10 GB"})
    table["items"]["more"] = {**table["items"]["coco"], "save": "downloads/more.zip"}
    table["mixtures"]["small"]["items"] = ["coco", "more"]
    sources = Table.model_validate(table)
    plan = make_plan("small", sources.mixtures["small"], sources.items, "/nowhere")
    assert plan.disk_bytes(keep_archives=False) == 30_600_000_000
    assert plan.disk_bytes(keep_archives=True) == 40_600_000_000


def test_a_killed_command_goes_on_where_it_was(tmp_path):
    served = files()
    release = threading.Event()
    content = os.urandom(600_000)
    served["/mix.json"] = File(content, stall=(400_000, release))
    with serving(served) as server:
        table = a_table(server.url)
        table["mixtures"]["small"]["items"] = ["notes"]
        table["mixtures"]["small"]["sources"] = []
        table["items"]["notes"]["about"] = "1 MB"
        (tmp_path / "own.yaml").write_text(yaml.safe_dump(table), "utf-8")
        command = [sys.executable, "-m", "lapilli.cli", "data", "fetch", "small", "--table", "own.yaml", "--out", "o"]
        part = tmp_path / "o" / "mix.json.part"
        with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as killed:
            end = time.monotonic() + 20
            while time.monotonic() < end and not (part.is_file() and part.stat().st_size > 300_000):
                time.sleep(0.02)
            killed.kill()
        had = part.stat().st_size
        release.set()
        served["/mix.json"].stall = None
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=30)
        assert done.returncode == 0, done.stdout + done.stderr
        assert server.ranges("/mix.json") == [None, f"bytes={had}-"]
    assert 300_000 < had < 600_000
    assert (tmp_path / "o" / "mix.json").read_bytes() == content
    assert "[partly here]" in done.stdout


class TestCommand:
    """The verb itself."""

    @pytest.fixture
    def lapilli(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        app = Typer()
        app.command()(fetch)
        return lambda *arguments: CliRunner().invoke(app, list(arguments))

    def own(self, tmp_path, table):
        path = tmp_path / "own.yaml"
        path.write_text(yaml.safe_dump(table), "utf-8")
        return ["--table", str(path)]

    def test_list(self, lapilli):
        shown = lapilli("--list")
        assert shown.exit_code == 0
        assert "llava-mix665k" in shown.stdout
        assert "27.6 GB; into pretraining_data/" in shown.stdout

    def test_dry_run_shows_licences_requests_and_checks_and_touches_nothing(self, lapilli, tmp_path):
        shown = lapilli("llava-mix665k", "--dry-run")
        assert shown.exit_code == 0
        for text in ("CC BY 4.0", "by hand", "MD5 in the table", "no checksum is published", "SHA-256 that the hub"):
            assert text in shown.stdout
        assert "waiting for you, see `request`: ocr-vqa-list, ocr-vqa-images" in shown.stdout
        assert list(tmp_path.iterdir()) == []

    def test_it_fetches_and_shows_the_recipe(self, lapilli, tmp_path):
        with serving(files()) as server:
            own = self.own(tmp_path, a_table(server.url))
            put_list(tmp_path / "small_data", server.url)
            done = lapilli("small", *own, "--keep-archives")
        assert done.exit_code == 0, done.output
        assert "free to test" in done.stdout
        assert "path: small_data/mix.json\n      images: small_data" in done.stdout
        assert (tmp_path / "small_data" / "downloads" / "coco.zip").exists()

    def test_what_is_left_to_do_makes_it_fail(self, lapilli, tmp_path):
        with serving(files()) as server:
            done = lapilli("small", *self.own(tmp_path, a_table(server.url)), "--out", "there")
        assert done.exit_code == 1
        assert "error: list: ask nicely" in done.output
        assert (tmp_path / "there" / "coco" / "train2017" / "1.jpg").exists()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "name a mixture"),
            (["llava-mix"], 'unknown mixture "llava-mix"'),
            (["llava-mix665k", "--skip", "coco"], "--skip: unknown item"),
            (["cc3m-595k", "--token-file", "none", "--no-disk-check"], "can't read a token"),
        ],
    )
    def test_mistakes_are_answered_at_once(self, lapilli, arguments, message):
        failed = lapilli(*arguments)
        assert isinstance(failed.exception, LapilliError)
        assert message in str(failed.exception)
