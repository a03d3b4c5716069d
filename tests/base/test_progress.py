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
    assert lines[0] == "step 1/100  loss 1"
    assert lines[1] == "step 11/100  loss 11"
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
    assert stream.getvalue().splitlines() == ["step 1/9", "step 2/9  x"]


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


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0s"), (59, "59s"), (125, "2m05s"), (6720, "1h52m"), (273600, "3d04h")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text
