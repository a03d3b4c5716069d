"""The page in a real browser: its script runs under its own policy, filters, and looks like a page."""

import re
import shutil
import subprocess

import numpy as np
import PIL.Image
import pytest

from lapilli.evaluate.report.write import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: chromium, google-chrome or chrome"),
]


def browse(tmp_path, address, *options):
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1100,1400", "--virtual-time-budget=3000"]
    found = subprocess.run([*command, *options, address], capture_output=True, text=True, timeout=240, check=True)
    return found.stdout


def shown(dom):
    """Ids of the questions that a filter left, and what the page says of their number."""
    cards = re.findall(r'<article class="case"([^>]*)>.*?mine, (\d+)</span>', dom, re.DOTALL)
    count = re.search(r'id="filter-count"[^>]*>([^<]*)<', dom)
    return [int(name) for attributes, name in cards if "hidden" not in attributes], count and count[1]


def test_filters_work_and_the_page_is_drawn(outs, tmp_path):
    write_report(outs, html=tmp_path / "r.html")
    address = (tmp_path / "r.html").as_uri()
    everything, said = shown(browse(tmp_path, address, "--dump-dom"))
    assert (sorted(everything), said) == (list(range(12)), "12 of 12 questions")
    for given, left in (
        ("model=0&verdict=wrong", [0, 3, 6, 9]),
        ("model=1&verdict=wrong&group=kind%3Dsecond", [7, 8, 10, 11]),
        ("text=evil+alert", [5]),
        ("verdict=differ&text=no.+7", [7]),
    ):
        found, said = shown(browse(tmp_path, f"{address}#{given}", "--dump-dom"))
        assert (sorted(found), said) == (left, f"{len(left)} of 12 questions"), given
    browse(tmp_path, address, f"--screenshot={tmp_path / 'page.png'}")
    pixels = np.asarray(PIL.Image.open(tmp_path / "page.png").convert("L"), dtype=np.float32)
    assert pixels.shape == (1400, 1100)
    assert pixels.std() > 10  # something is drawn
