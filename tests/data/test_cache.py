"""One folder of indexes for all runs: found again, made again where it must be, and shared by processes."""

import io
import json
import multiprocessing
import os
import shutil
from pathlib import Path

import PIL.Image
import pytest

from lapilli.base.errors import DataError
from lapilli.data import check
from lapilli.data.cache import index_root, shared_folder
from lapilli.data.check import index
from lapilli.recipe.schema import Source


def run(source, encoder, spec, cache, **options):
    return index([source], encoder, spec, cache=cache, stream=io.StringIO(), **options)


def test_the_users_folder_is_found_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("LAPILLI_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "common"))
    assert index_root() == tmp_path / "own" / "index"
    assert index_root("elsewhere") == Path("elsewhere")
    monkeypatch.delenv("LAPILLI_CACHE")
    assert index_root() == tmp_path / "common" / "lapilli" / "index"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert index_root() == tmp_path / ".cache" / "lapilli" / "index"


def test_a_folder_that_cannot_be_written_is_an_error_with_its_remedy(world, make_encoder, make_spec, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/index: can't keep the data index there .*data\.index.*LAPILLI_CACHE"):
        run(world, make_encoder(), make_spec(), tmp_path / "file" / "index")


def test_an_index_is_said_to_be_made_and_then_found(world, make_encoder, make_spec, tmp_path):
    cache = tmp_path / "cache"
    assert run(world, make_encoder(), make_spec(), cache, keep=False).kept == ""
    assert not cache.exists()
    first, second = (run(world, make_encoder(), make_spec(), cache) for _ in range(2))
    assert first.kept.endswith(", made now")
    assert second.kept.endswith(", found")
    assert first.index.stamp == second.index.stamp
    assert run(world, make_encoder(), make_spec(), cache, keep=False).kept == second.kept
    assert {p.name.partition("-")[0] for p in cache.iterdir()} <= {"index", "hashes.json"}


def test_a_picture_that_is_there_now_is_used_though_an_index_was_kept(world, make_encoder, make_spec, tmp_path):
    cache, picture = tmp_path / "cache", Path(world.images) / "12_0.png"
    content = picture.read_bytes()
    picture.unlink()
    allowed = {"max_bad_ratio": 0.05}
    without = run(world, make_encoder(), make_spec(), cache, **allowed)
    assert len(without) == 22
    picture.write_bytes(content)
    whole = run(world, make_encoder(), make_spec(), cache, **allowed)
    assert len(whole) == 23
    assert whole.kept.endswith(f"made now ({world.images} has changed)")
    assert whole.index.stamp != without.index.stamp  # a run that left it out does not go on with this one
    assert [p.sample.id for p in without.samples] == [p.sample.id for p in whole.samples if p.sample.id != "r12"]
    assert run(world, make_encoder(), make_spec(), cache, **allowed).kept.endswith("found")


def test_an_archive_of_pictures_is_watched_too(world, make_encoder, make_spec, tmp_path):
    archive = shutil.make_archive(str(tmp_path / "all"), "zip", world.images)
    source = Source(path=world.path, images=archive)
    stamps = []
    for expected in ("made now", "found", "has changed)"):
        if expected == "has changed)":
            PIL.Image.new("RGB", (9, 9)).save(Path(world.images) / "0_0.png")
            shutil.make_archive(str(tmp_path / "all"), "zip", world.images)
        corpus = run(source, make_encoder(), make_spec(), tmp_path / "cache")
        assert corpus.kept.endswith(expected)
        stamps.append(corpus.index.stamp)
    assert stamps[0] == stamps[1] != stamps[2]


def test_messages_name_the_file_that_was_asked_for(world, make_encoder, make_spec, tmp_path):
    copy = tmp_path / "copy.json"
    shutil.copy(world.path, copy)
    for path in (Path(world.path), copy):
        source = Source(path=str(path), images=world.images)
        corpus = run(source, make_encoder(), make_spec(), tmp_path / "cache")
        assert corpus.where(0).startswith(str(path))


def _build(source, encoder, spec, cache, barrier, results):
    entered = check.Watch.save

    def together(*arguments):
        barrier.wait(30)  # nobody gives its folder the name before all have filled theirs
        entered(*arguments)

    check.Watch.save = together
    results.put((os.getpid(), run(source, encoder, spec, cache).index.stamp))


def test_processes_that_make_the_same_index_all_succeed(world, make_encoder, make_spec, tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    arguments = (world, make_encoder(), make_spec(), tmp_path / "cache", barrier, results)
    processes = [context.Process(target=_build, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    again = run(world, make_encoder(), make_spec(), tmp_path / "cache")
    assert again.kept.endswith("found")
    assert {stamp for _, stamp in found} == {again.index.stamp}
    assert len({process for process, _ in found}) == 3
    assert [p.name for p in (tmp_path / "cache").iterdir() if p.name.startswith(".")] == []


def _killed(path):
    with shared_folder(path) as folder:
        (folder / "half").write_text("")
        os._exit(9)


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_fills_is_not(tmp_path):
    path = tmp_path / "cache" / "index-a"
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(path,))
    process.start()
    process.join()
    assert len(list(path.parent.iterdir())) == 2  # its draft, and the lock that nobody holds any more
    with shared_folder(path) as living:
        (living / "whole").write_text("a")
        with shared_folder(path) as other:
            (other / "whole").write_text("b")
        assert (path / "whole").read_text() == "b"
    assert (path / "whole").read_text() == "a"
    assert [p.name for p in path.parent.iterdir()] == ["index-a"]


def test_after_an_error_nothing_is_left(world, make_encoder, make_spec, tmp_path):
    (Path(world.images) / "12_0.png").unlink()
    with pytest.raises(DataError):
        run(world, make_encoder(), make_spec(), tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache").iterdir() if p.name != "hashes.json"]


def test_hashes_that_another_process_added_are_kept(tmp_path):
    from lapilli.data.stamp import FileHashes

    for name in "ab":
        (tmp_path / name).write_text(name)
        os.utime(tmp_path / name, (1, 1))
    one, two = FileHashes(tmp_path), FileHashes(tmp_path)
    one.of(str(tmp_path / "a")), two.of(str(tmp_path / "b"))
    one.save(), two.save()
    assert sorted(Path(name).name for name in json.loads((tmp_path / "hashes.json").read_text())) == ["a", "b"]
