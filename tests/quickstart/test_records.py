"""Data files as the quickstart writes them: what LLaVA's format asks for, with every kind of sample among them."""

import numpy as np
import pytest
from PIL import Image

from lapilli.data.read.llava import read
from lapilli.quickstart.records import (
    Exam,
    caption_records,
    conversation_records,
    exam_records,
    read_exams,
    write_json,
)
from lapilli.quickstart.scans import load_scans


@pytest.fixture(scope="module")
def scans():
    return load_scans(0)


def test_conversations_have_turns_pairs_and_text_only(scans, tmp_path):
    records = conversation_records(scans[0], np.random.default_rng(0), 80, tmp_path, "talk", 4)
    write_json(tmp_path / "talk.json", records)
    samples = list(read(tmp_path / "talk.json"))
    assert len(samples) == 80
    assert {len(s.images) for s in samples} == {0, 1, 2}
    assert max(len(s.messages) for s in samples) > 4
    placed = {s.messages[0].text.startswith("<image>") for s in samples if s.images}
    assert placed == {True, False}, "pictures stand before and after the words"
    names = [image.path for s in samples for image in s.images]
    assert len(set(names)) == len(names) == len(list(tmp_path.glob("*.png")))
    with Image.open(tmp_path / names[0]) as picture:
        assert (picture.size, picture.mode) == ((32, 32), "RGB")


def test_captions_have_one_picture_each(scans, tmp_path):
    records = caption_records(scans[0], np.random.default_rng(0), 5, tmp_path, "caption")
    write_json(tmp_path / "captions.json", records)
    assert [len(s.images) for s in read(tmp_path / "captions.json")] == [1] * 5


def test_exams_survive_the_file_and_never_share_a_picture(scans, tmp_path):
    exams = exam_records(scans[1], np.random.default_rng(0), 40, tmp_path, "exam")
    write_json(tmp_path / "exam.json", exams)
    assert read_exams(tmp_path / "exam.json") == exams
    names = [name for exam in exams for name in exam.images]
    assert len(set(names)) == len(names)
    assert all(exam.question.count("<image>") == len(exam.images) > 0 for exam in exams)
    assert isinstance(exams[0], Exam)


def test_two_pictures_stand_beside_their_names(scans, tmp_path):
    records = conversation_records(scans[0], np.random.default_rng(0), 60, tmp_path, "talk", 3)
    pairs = [r["conversations"][0]["value"] for r in records if isinstance(r.get("image"), list)]
    assert pairs
    assert all("First: <image>\nSecond: <image>" in text for text in pairs)
