"""Unpacking what others packed: nothing escapes, nothing but files, no more than stated."""

import gzip
import io
import os
import random
import stat
import tarfile
import zipfile

import pytest

from lapilli.base.errors import DataError
from lapilli.data.fetch.extract import unpack, unpacked_bytes
from lapilli.data.fetch.table import Unpack

LIMIT = 10**6


def make_zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for name, content in members.items():
            info = name if isinstance(name, zipfile.ZipInfo) else zipfile.ZipInfo(name)
            out.writestr(info, content, zipfile.ZIP_DEFLATED)
    return path


def make_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as out:
        for name, content in members.items():
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))
    return path


MAKERS = {
    "zip": make_zip,
    "tar": make_tar,
    "tar.gz": lambda path, members: make_tar(path, members, "w:gz"),
    "tar.xz": lambda path, members: make_tar(path, members, "w:xz"),
}


def tree(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", MAKERS)
def test_files_come_into_their_folders(tmp_path, kind):
    archive = MAKERS[kind](tmp_path / "any-name", {"train/1.jpg": b"one", "./train/deep/2.jpg": b"two", "3.jpg": b""})
    heard = []
    got = unpack(
        archive, tmp_path / "out", Unpack(into="coco"), max_bytes=LIMIT, on_file=lambda *now: heard.append(now)
    )
    assert tree(tmp_path / "out") == {"coco/train/1.jpg": b"one", "coco/train/deep/2.jpg": b"two", "coco/3.jpg": b""}
    assert (got.files, got.kept, got.bytes) == (3, 0, 6)
    assert heard[-1] == (3, 6)
    assert unpacked_bytes(archive) == (6 if kind == "zip" else None)


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize(
    "name", ["../evil", "a/../../evil", "/tmp/evil", "..", "C:\\evil", "a\\..\\evil", "C:evil", "a/b\\c", ""]
)
def test_a_name_that_leaves_the_folder_stops_everything(tmp_path, kind, name):
    archive = MAKERS[kind](tmp_path / "archive", {"good.jpg": b"good", name: b"evil", "after.jpg": b"after"})
    with pytest.raises(DataError, match=r"would leave the folder|no file in it") as caught:
        unpack(archive, tmp_path / "out", Unpack(into="in"), max_bytes=LIMIT)
    assert "archive" in str(caught.value)
    assert set(tree(tmp_path)) == {"archive", "out/in/good.jpg"}


def test_links_and_devices_are_refused(tmp_path):
    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with pytest.raises(DataError, match="member 'link' is a link or a device"):
        unpack(make_zip(tmp_path / "a", {link: b"/etc/passwd"}), tmp_path, Unpack(into="in"), max_bytes=LIMIT)
    for number, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)):
        info = tarfile.TarInfo("odd")
        info.type, info.linkname = kind, "/etc/passwd"
        archive = make_tar(tmp_path / f"t{number}", {info: b""})
        with pytest.raises(DataError, match="member 'odd' is a link or a device"):
            unpack(archive, tmp_path, Unpack(into="in"), max_bytes=LIMIT)
    assert tree(tmp_path / "in") == {}


def test_a_link_already_in_the_folder_leads_nowhere(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_bytes(b"kept")
    (tmp_path / "out" / "in").mkdir(parents=True)
    (tmp_path / "out" / "in" / "sub").symlink_to(outside)
    (tmp_path / "out" / "in" / "file").symlink_to(outside / "kept")
    with pytest.raises(DataError, match="would be written through a link"):
        unpack(make_zip(tmp_path / "a", {"sub/x": b"x"}), tmp_path / "out", Unpack(into="in"), max_bytes=LIMIT)
    unpack(make_zip(tmp_path / "b", {"file": b"new!"}), tmp_path / "out", Unpack(into="in"), max_bytes=LIMIT)
    assert tree(outside) == {"kept": b"kept"}
    assert not (tmp_path / "out" / "in" / "file").is_symlink()


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_a_bomb_ends_at_the_budget(tmp_path, kind):
    archive = MAKERS[kind](tmp_path / "bomb", {"small": b"x", "big": bytes(5_000_000)})
    assert archive.stat().st_size < 100_000
    with pytest.raises(DataError, match="holds more than the 1 MB expected"):
        unpack(archive, tmp_path / "out", Unpack(into="in"), max_bytes=LIMIT)
    assert tree(tmp_path / "out") == {"in/small": b"x"}


def test_a_member_larger_than_it_says_is_refused(tmp_path):
    archive = make_zip(tmp_path / "liar", {"big": bytes(100_000)})
    content = archive.read_bytes()
    true, lie = (100_000).to_bytes(4, "little"), (10).to_bytes(4, "little")
    archive.write_bytes(content.replace(true, lie))
    with pytest.raises(DataError, match="liar"):
        unpack(archive, tmp_path / "out", Unpack(into="in"), max_bytes=LIMIT)
    assert tree(tmp_path / "out") == {}


@pytest.mark.parametrize("size", [5, 3_000_000])
def test_a_changed_byte_is_found_by_the_members_crc(tmp_path, size):
    with zipfile.ZipFile(tmp_path / "a", "w", zipfile.ZIP_STORED) as out:
        out.writestr("x.jpg", b"Q" * size)
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes().replace(b"QQQ", b"QqQ", 1))
    with pytest.raises(DataError, match=r"Bad CRC-32 for file 'x\.jpg'"):
        unpack(tmp_path / "a", tmp_path / "out", Unpack(into="in"), max_bytes=10 * LIMIT)
    assert tree(tmp_path / "out") == {}


def test_damage_is_found_and_leaves_no_half_file(tmp_path):
    archive = make_zip(tmp_path / "a.zip", {"one": b"first", "two": os.urandom(5000)})
    content = bytearray(archive.read_bytes())
    at = content.index(b"two") + 500
    content[at] ^= 0xFF
    archive.write_bytes(content)
    with pytest.raises(DataError, match="can't be unpacked"):
        unpack(archive, tmp_path / "out", Unpack(into="in"), max_bytes=LIMIT)
    assert tree(tmp_path / "out") == {"in/one": b"first"}
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(gzip.compress(make_tar(tmp_path / "t", {"x": os.urandom(50_000)}).read_bytes())[:20_000])
    with pytest.raises(DataError, match=r"cut\.tar\.gz"):
        unpack(cut, tmp_path / "out2", Unpack(into="in"), max_bytes=LIMIT)
    assert tree(tmp_path / "out2") == {}


@pytest.mark.parametrize("harm", ["header", "cut", "no end"])
def test_a_tar_is_not_taken_for_whole_at_its_first_bad_header(tmp_path, harm):
    content = make_tar(tmp_path / "a", {"1": b"one", "2": b"two", "3": b"three"}).read_bytes()
    harmed = {
        "header": content[:1024] + b"\xff" + content[1025:],
        "cut": content[:1300],
        "no end": content[: 3 * 1024],
    }[harm]
    (tmp_path / "a").write_bytes(harmed)
    with pytest.raises(DataError, match="damaged or cut short"):
        unpack(tmp_path / "a", tmp_path / "out", Unpack(into="in"), max_bytes=LIMIT)


def test_what_is_no_archive_or_empty(tmp_path):
    (tmp_path / "page.zip").write_bytes(b"<html>")
    with pytest.raises(DataError, match="neither a zip nor a tar"):
        unpack(tmp_path / "page.zip", tmp_path, Unpack(into="in"), max_bytes=LIMIT)
    with pytest.raises(DataError, match="there is no file in it"):
        unpack(make_zip(tmp_path / "a", {"folder/": b""}), tmp_path, Unpack(into="in"), max_bytes=LIMIT)


def test_encrypted_members_are_refused(tmp_path):
    archive = make_zip(tmp_path / "a", {"secret": b"x"})
    content = bytearray(archive.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(content)
    with pytest.raises(DataError, match="is encrypted"):
        unpack(archive, tmp_path, Unpack(into="in"), max_bytes=LIMIT)


def test_unpacking_again_keeps_what_is_whole_and_mends_the_rest(tmp_path):
    archive = make_zip(tmp_path / "a", {"d/1": b"one", "d/2": b"two", "d/3": b"three"})
    unpack(archive, tmp_path / "out", Unpack(into="in"), max_bytes=LIMIT)
    (tmp_path / "out" / "in" / "d" / "2").write_bytes(b"")
    (tmp_path / "out" / "in" / "d" / "3").unlink()
    got = unpack(archive, tmp_path / "out", Unpack(into="in"), max_bytes=LIMIT)
    assert (got.files, got.kept) == (3, 1)
    assert tree(tmp_path / "out") == {"in/d/1": b"one", "in/d/2": b"two", "in/d/3": b"three"}


def test_names_are_shortened_and_a_lone_top_folder_left_out_as_asked(tmp_path):
    members = {"train2014/COCO_train2014_01.jpg": b"a", "train2014/other.jpg": b"b", "__MACOSX/._x": b"junk"}
    got = unpack(
        make_zip(tmp_path / "a", members),
        tmp_path / "out",
        Unpack(into="coco", drop_prefix="COCO_train2014_"),
        max_bytes=LIMIT,
    )
    assert set(tree(tmp_path / "out")) == {"coco/train2014/01.jpg", "coco/train2014/other.jpg"}
    assert dict(got.skipped) == {"files of macOS or Windows": 1}
    unpack(make_zip(tmp_path / "b", members), tmp_path / "top", Unpack(into="q", drop_top=True), max_bytes=LIMIT)
    assert set(tree(tmp_path / "top")) == {"q/COCO_train2014_01.jpg", "q/other.jpg"}
    two = make_tar(tmp_path / "c", {"a/1": b"1", "b/2": b"2"})
    unpack(two, tmp_path / "two", Unpack(into="q", drop_top=True), max_bytes=LIMIT)
    assert set(tree(tmp_path / "two")) == {"q/a/1", "q/b/2"}


@pytest.mark.parametrize("kind", MAKERS)
def test_damaged_archives_end_in_a_reason(tmp_path, kind):
    whole = MAKERS[kind](tmp_path / "whole", {f"d/{n}.jpg": bytes([n]) * 900 for n in range(4)}).read_bytes()
    chance, reasons = random.Random(3), {}
    for number in range(60):
        damaged = bytearray(whole)
        for _ in range(chance.randint(1, 6)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        if chance.random() < 0.3:
            del damaged[chance.randrange(len(damaged)) :]
        archive = tmp_path / f"a{number}"
        archive.write_bytes(damaged)
        try:
            unpack(archive, tmp_path / f"out{number}", Unpack(into="in", drop_top=number % 2 == 0), max_bytes=LIMIT)
            unpacked_bytes(archive)
        except DataError as error:
            reasons[archive] = str(error)
    assert len(reasons) > 5
    assert all(str(archive) in reason for archive, reason in reasons.items())
    outside = {path for path in tree(tmp_path) if not path.startswith("out")}
    assert outside == {"whole", *(f"a{number}" for number in range(60))}
