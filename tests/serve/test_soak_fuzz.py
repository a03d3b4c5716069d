"""Ten thousand broken requests to one server, and a thousand to each part of a cluster: `make soak`."""

import itertools
import random
from collections import Counter

import httpx
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
    good_pictures,
)
from tests.support.proc import resident
from tests.support.server_process import serving

pytestmark = [pytest.mark.slow, pytest.mark.soak, pytest.mark.timeout(3600)]


def by_hand(rng):
    """For ever: (body of a chat request, whether it must be answered, or None)."""
    broken, urls = broken_pictures(rng), data_urls(rng)
    bodies = broken_bodies(rng, chat_body("tiny", as_url(good_pictures(rng)["rgb.jpeg"])))
    while True:
        for data in good_pictures(rng).values():
            yield chat_body("tiny", as_url(data)), True
        for data in bad_pictures(rng).values():
            yield chat_body("tiny", as_url(data)), False
        for _ in range(200):
            yield chat_body("tiny", as_url(next(broken)[1])), None
            yield chat_body("tiny", next(urls), stream=True), None
            yield next(bodies), None


def test_ten_thousand_requests(models, tmp_path):
    names = [str(models / "parrot"), str(models / "tiny"), "--new-tokens", "8", "--image-pixels", "250000"]
    (tmp_path / "log").mkdir(0o700)
    names += ["--log-dir", str(tmp_path / "log")]  # with it the page takes what was said, and votes
    with serving(*names) as server, httpx.Client(base_url=server.root, timeout=60) as http:
        requests = by_hand(random.Random(7))
        statuses, sizes = Counter(), []
        for part in (500, 4000, 4000):
            for body, answered in itertools.islice(requests, part):
                made = http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
                statuses[made.status_code] += 1
                assert made.status_code < 500, (body[:500], made.text)
                assert answered is None or (made.status_code == 200) == answered, (body[:500], made.text)
            sizes.append(resident(server.process.pid))
        described = ask_by_description(server.root, None, 1700, models=["parrot", "tiny"])
        sizes.append(resident(server.process.pid))
        print(statuses, described, [size >> 20 for size in sizes])  # noqa: T201
        assert statuses.total() + described.total() >= 10_000
        assert max(sizes) < sizes[0] * 1.05
        log = "\n".join(server.lines)
        assert "Traceback" not in log
        assert "base64," not in log
        assert http.get("/health").json() == {"status": "ok"}


def test_a_thousand_for_each_part_of_a_cluster(models):
    with (
        serving("controller") as controller,
        serving("worker", "--model-path", str(models / "parrot"), "--controller", controller.root) as worker,
    ):
        for part in (controller, worker):
            ask_by_description(part.root, None, 100, checks=CHECKS[:-1])
            before = resident(part.process.pid)
            said = ask_by_description(part.root, None, 1000, seed=1, checks=CHECKS[:-1])
            print(said, before >> 20, resident(part.process.pid) >> 20)  # noqa: T201
            assert resident(part.process.pid) < before * 1.05
            assert "Traceback" not in "\n".join(part.lines)
