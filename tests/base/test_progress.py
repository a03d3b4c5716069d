"""Logs get few lines, the last state is never lost, and markup in data is shown as it is."""

import io

import pytest

from lapilli.base.progress import Progress, duration, track


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_a_log_gets_a_line_per_interval_and_the_last_state():
    stream, clock = io.StringIO(), Clock()
    with Progress("step", 100, stream=stream, interval_seconds=10, clock=clock) as progress:
        for step in range(1, 101):
            clock.now += 1
            progress.update(step, f"loss {step}")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "step 1/100  loss 1  eta 1m39s"
    assert lines[1] == "step 11/100  loss 11  eta 1m29s"
    assert lines[-1] == "step 100/100  loss 100"
    assert len(lines) == 11


def steps(progress):
    progress.update(1)
    progress.update(2, "x")
    raise KeyError


def test_the_last_state_is_written_after_an_error_too():
    stream = io.StringIO()
    with pytest.raises(KeyError), Progress("step", 9, stream=stream) as progress:
        steps(progress)
    assert stream.getvalue().splitlines() == ["step 1/9  eta 0s", "step 2/9  x"]


def test_text_is_not_markup_and_lines_are_not_wrapped():
    stream = io.StringIO()
    with Progress("x", stream=stream) as progress:
        progress.write("[bold]a[/bold] " + "word " * 60)
    assert stream.getvalue().splitlines()[0] == "[bold]a[/bold] " + "word " * 60


def test_track_yields_everything():
    stream = io.StringIO()
    assert list(track("abc", "letters", 3, stream=stream)) == ["a", "b", "c"]
    assert stream.getvalue().splitlines()[-1] == "letters 3/3"


def test_eta():
    clock = Clock()
    progress = Progress("x", 10, stream=io.StringIO(), clock=clock)
    assert progress.eta_seconds() is None
    clock.now = 4.0
    progress.update(2)
    assert progress.eta_seconds() == 16.0


class Stream:
    """1,000 records of 30 kB each; reading is 10 records ahead of the work."""

    total = 30_000_000

    def done(self, records):
        return records * 30_000


def test_work_whose_units_are_not_known_ends_with_what_is_read_for_it():
    stream, clock = io.StringIO(), Clock()
    with Progress("checking data", reading=Stream(), stream=stream, interval_seconds=10, clock=clock) as progress:
        for _ in range(50):
            clock.now += 4
            progress.advance(20, "3 bad")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "checking data 20  600 kB of 30 MB  3 bad  eta 3m16s"
    assert lines[1] == "checking data 80  2.4 MB of 30 MB  3 bad  eta 3m04s"
    assert lines[-1] == "checking data 1,000  30 MB of 30 MB  3 bad"


def test_a_text_that_says_the_time_left_is_not_added_to():
    stream = io.StringIO()
    with Progress("x", 9, stream=stream) as progress:
        progress.update(1, "eta 5m00s")
    assert stream.getvalue().splitlines() == ["x 1/9  eta 5m00s"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar_of_what_is_read(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    stream, clock = Terminal(), Clock()
    with Progress("checking data", reading=Stream(), stream=stream, clock=clock) as progress:
        clock.now = 100.0
        progress.advance(500)
    shown = stream.getvalue()
    assert "15 MB of 30 MB" in shown
    assert "eta 1m40s" in shown
    assert "\u2501" in shown


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0s"), (59, "59s"), (125, "2m05s"), (6720, "1h52m"), (273600, "3d04h")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text
