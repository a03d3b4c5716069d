"""A reader meets the old state or the new one, whatever happens to the writer."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from lapilli.base import atomic
from lapilli.base.errors import RunError


def test_a_folder_appears_whole_with_its_marker(tmp_path):
    target = tmp_path / "deep" / "out"
    with atomic.atomic_folder(target, marker=True) as aside:
        (aside / "sub").mkdir()
        (aside / "sub" / "a").write_text("1")
        assert not target.exists()
    assert (target / "sub" / "a").read_text() == "1"
    assert atomic.is_complete(target)
    assert os.listdir(tmp_path / "deep") == ["out"]


def test_a_failed_writer_leaves_what_was_there(tmp_path):
    target = tmp_path / "out"
    with atomic.atomic_folder(target) as aside:
        (aside / "a").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic.atomic_folder(target, replace=True) as aside:
        (aside / "a").write_text(f"{1 / 0}")
    assert (target / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_nothing_is_overwritten_unless_asked(tmp_path):
    target = tmp_path / "out"
    with atomic.atomic_folder(target) as aside:
        (aside / "a").write_text("old")
    assert not atomic.is_complete(target)
    with pytest.raises(RunError, match="exists already"), atomic.atomic_folder(target):
        pass
    with atomic.atomic_folder(target, replace=True, marker=True) as aside:
        (aside / "b").write_text("new")
    assert sorted(os.listdir(target)) == [".complete", "b"]
    assert os.listdir(tmp_path) == ["out"]


def test_a_killed_writer_leaves_only_what_is_cleaned_up(tmp_path):
    program = textwrap.dedent(
        f"""
        import os, signal
        from lapilli.base import atomic
        with atomic.atomic_folder({str(tmp_path / "out")!r}) as aside:
            (aside / "a").write_text("1")
            os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL
    (tmp_path / "mine.tmp-notes").write_text("kept")
    assert not (tmp_path / "out").exists()
    assert len(atomic.remove_leftovers(tmp_path)) == 1
    assert os.listdir(tmp_path) == ["mine.tmp-notes"]


def test_files_are_replaced_in_one_step(tmp_path):
    atomic.atomic_write(tmp_path / "a", "one")
    atomic.write_json(tmp_path / "b", {"x": [1, "가"]})
    assert json.loads((tmp_path / "b").read_text()) == {"x": [1, "가"]}
    with pytest.raises(ValueError, match="JSON"):
        atomic.write_json(tmp_path / "b", {"x": float("nan")})
    with pytest.raises(TypeError):
        atomic.atomic_write(tmp_path / "a", None)
    assert (tmp_path / "a").read_text() == "one"
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_remove(tmp_path):
    (tmp_path / "x" / "y").mkdir(parents=True)
    atomic.remove(tmp_path / "x")
    atomic.remove(tmp_path / "x")
    assert os.listdir(tmp_path) == []
