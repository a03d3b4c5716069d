"""Broken requests by the hundred: none is a server's error, what can be seen is answered. `make soak` sends 10,000."""

import itertools
import random
from collections import Counter

import PIL.Image
import pytest
from tests.support.malformed import (
    CHECKS,
    as_url,
    ask_by_description,
    bad_pictures,
    broken_bodies,
    broken_pictures,
    chat_body,
    data_urls,
    encoded,
    good_pictures,
)
from tests.support.proc import resident
from tests.support.server_process import serving

from lapilli.generate.processor import Processor

KEY = "sk-a-key-for-tests"
"""As in conftest.py."""


def statuses(api, urls):
    return Counter(api.post(chat_body("tiny", url)).status_code for url in urls)


def test_unusual_pictures_are_seen(api):
    made = {name: api.post(chat_body("tiny", as_url(data))) for name, data in good_pictures(random.Random(1)).items()}
    assert {name: one.text for name, one in made.items() if one.status_code != 200} == {}


def test_bombs_and_foreign_formats_are_refused(api):
    for name, data in bad_pictures(random.Random(1)).items():
        made = api.post(chat_body("tiny", as_url(data)))
        assert (made.status_code, made.json()["error"]["code"]) == (400, "invalid_image"), (name, made.text)
        assert "passwd" not in made.text


def test_of_an_animation_one_frame_is_decoded(tiny):
    """However many there are, and whatever is wrong with the others."""
    frames = [PIL.Image.new("RGB", (30, 30), (40 * i, 99, 99)) for i in range(6)]
    processor = Processor(tiny)
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})):
        still = encoded(frames[0], kind, **options)
        moving = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert processor.picture(moving).key == processor.picture(still).key, kind
        if kind == "GIF":
            assert processor.picture(moving[: len(still) + 20]).key == processor.picture(still).key


def test_a_wrong_media_type_does_not_matter(api):
    data = good_pictures(random.Random(1))["rgba.png"]
    for media, status in (("image/jpeg", 200), ("image/x-anything", 200), ("text/html", 400), ("", 400)):
        assert api.post(chat_body("tiny", as_url(data, media))).status_code == status, media


def test_broken_pictures_addresses_and_bodies(api):
    rng = random.Random(2)
    pictures = statuses(api, (as_url(data) for _, data in itertools.islice(broken_pictures(rng), 80)))
    assert set(pictures) == {200, 400}
    assert set(statuses(api, itertools.islice(data_urls(rng), 40))) <= {200, 400}
    whole = chat_body("tiny", as_url(good_pictures(rng)["rgb.jpeg"]))
    bodies = Counter(api.post(body).status_code for body in itertools.islice(broken_bodies(rng, whole), 60))
    assert set(bodies) <= {200, 400, 404}
    assert api.post(chat_body("tiny", as_url(good_pictures(rng)["rgb.jpeg"]))).status_code == 200
    assert "Traceback" not in "\n".join(api.server.lines)


@pytest.mark.slow
def test_what_the_description_allows_and_forbids(api):
    before = resident(api.server.process.pid)
    said = ask_by_description(api.server.root, KEY, 120, models=["parrot"])
    assert {"200", "400"} <= set(said)
    assert resident(api.server.process.pid) < before * 1.1
    assert "Traceback" not in "\n".join(api.server.lines)


@pytest.mark.slow
def test_the_page_takes_what_was_said(models, tmp_path):
    (tmp_path / "log").mkdir(0o700)
    with serving(str(models / "parrot"), "--log-dir", str(tmp_path / "log")) as server:
        said = ask_by_description(server.root, None, 60, models=["parrot"])
        assert {"200", "400"} <= set(said), said
        assert "Traceback" not in "\n".join(server.lines)


@pytest.mark.slow
def test_the_parts_of_a_cluster(models):
    """They take LLaVA's loose types, so not all that their description forbids is refused."""
    with (
        serving("controller") as controller,
        serving("worker", "--model-path", str(models / "parrot"), "--controller", controller.root) as worker,
    ):
        for part in (controller, worker):
            said = ask_by_description(part.root, None, 60, checks=CHECKS[:-1])
            assert {"200", "400"} <= set(said), said
            assert "Traceback" not in "\n".join(part.lines)
