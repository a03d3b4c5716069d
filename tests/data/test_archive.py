"""Pictures in tar and zip archives: found, measured, contained; damaged archives end in a reason."""

import gzip
import io
import os
import random
import tarfile
import zipfile
from contextlib import suppress

import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lapilli.base.errors import DataError
from lapilli.data.archive import open_archive
from lapilli.data.picture import ImageLimits, image_size, open_image
from lapilli.data.sample import Image
from lapilli.data.tar import tar_members


def picture(width, height=4):
    stream = io.BytesIO()
    PIL.Image.new("RGB", (width, height), (width, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


MEMBERS = {"a/one.png": picture(5), "b/" + "long" * 60 + ".png": picture(6), "무엇.png": picture(7), "empty.png": b""}


def write_tar(path, members, form=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=form) as file:
        folder = tarfile.TarInfo("a")
        folder.type = tarfile.DIRTYPE
        file.addfile(folder)
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)


def write_zip(path, members, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as file:
        for name, data in members.items():
            file.writestr(name, data)


WRITERS = {
    "pax": write_tar,
    "gnu": lambda path, members: write_tar(path, members, tarfile.GNU_FORMAT),
    "deflated": write_zip,
    "stored": lambda path, members: write_zip(path, members, zipfile.ZIP_STORED),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_root_or_a_folder_on_the_way_may_be_an_archive(tmp_path, write):
    write(tmp_path / "pictures", MEMBERS)
    for number, name in enumerate(list(MEMBERS)[:3]):
        assert image_size(Image(name), tmp_path / "pictures") == (5 + number, 4)
        assert image_size(Image(f"pictures/./{name}"), tmp_path) == (5 + number, 4)
    assert open_image(Image("pictures/a/one.png"), tmp_path).getpixel((0, 0)) == (5, 0, 0)


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_what_is_refused_in_an_archive_names_picture_and_archive(tmp_path, write):
    write(tmp_path / "x.tar", MEMBERS)
    refusals = {
        "a/two.png": 'has no member "a/two.png"',
        "empty.png": "the file is empty",
        "../../etc/passwd": "the path leaves the image folder",
        "a": "has no member" if write is WRITERS["deflated"] or write is WRITERS["stored"] else "is a link or another",
    }
    for name, message in refusals.items():
        with pytest.raises(DataError) as error:
            image_size(Image(name), tmp_path / "x.tar", where="f: record 1")
        assert str(error.value).startswith(f'f: record 1: image "{name}": ')
        assert message in str(error.value)
    with pytest.raises(DataError, match="bytes are more than 10; shrink the picture"):
        image_size(Image("a/one.png"), tmp_path / "x.tar", ImageLimits(max_bytes=10))


def test_links_in_tar_files_are_not_followed(tmp_path):
    write_tar(tmp_path / "x", MEMBERS)
    with pytest.raises(DataError, match="is a link"):
        image_size(Image("link.png"), tmp_path / "x")


def test_a_file_that_is_no_archive_is_said_to_be_none(tmp_path):
    (tmp_path / "notes").write_text("hello")
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(b"x" * 2000))
    for name in ("notes", "x.tar.gz"):
        with pytest.raises(DataError, match="must be decompressed first"):
            image_size(Image(f"{name}/a.png"), tmp_path)


def test_the_last_member_of_a_name_counts_and_a_changed_file_is_looked_up_again(tmp_path):
    path = str(tmp_path / "x")
    with tarfile.open(path, "w") as file:
        for width in (5, 6):
            info = tarfile.TarInfo("./a.png")
            info.size = len(picture(width))
            file.addfile(info, io.BytesIO(picture(width)))
    assert open_archive(path).read("a.png") == picture(6)
    write_tar(path, {"a.png": picture(9), "more": b"x" * 9999})
    assert open_archive(path).read("a.png") == picture(9)


def test_archives_are_read_after_a_fork(tmp_path):
    path = str(tmp_path / "x")
    write_zip(path, MEMBERS)
    archive = open_archive(path)
    child = os.fork()
    good = all(archive.read("a/one.png") == MEMBERS["a/one.png"] for _ in range(50))
    if child == 0:
        os._exit(0 if good else 1)
    assert good
    assert os.waitpid(child, 0)[1] == 0


def test_a_truncated_or_joined_tar_file_is_never_taken_for_a_whole_one(tmp_path):
    path = tmp_path / "x"
    write_tar(path, MEMBERS)
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0"))
    ends = -(-end // 512) * 512
    for size in (0, 1, 512, 700, ends - 512, ends - 1, ends):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match="truncated"):
            list(tar_members(str(path)))
    path.write_bytes(whole * 2)
    with pytest.raises(DataError, match="more data follows"):
        list(tar_members(str(path)))


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), changes=st.integers(1, 12), cut=st.booleans())
def test_damaged_archives_end_in_a_reason(write, tmp_path_factory, seed, changes, cut):
    path = tmp_path_factory.getbasetemp() / f"damaged-{write is write_zip}"
    write(path, MEMBERS)
    data, rng = bytearray(path.read_bytes()), random.Random(seed)
    for _ in range(changes):
        data[rng.randrange(min(len(data), 4096))] = rng.randrange(256)
    path.write_bytes(data[: rng.randrange(len(data))] if cut else data)
    os.utime(path, ns=(0, rng.randrange(2**40)))
    for name in (*MEMBERS, "link.png"):
        with suppress(DataError):
            open_image(Image(f"{path.name}/{name}"), path.parent, ImageLimits(10**4, 10**6), "f: record 1")
