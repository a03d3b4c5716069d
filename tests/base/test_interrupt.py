"""Signals that ask for a stop are noted, once; what they mean before and after is as it was, or nothing."""

import os
import signal
import subprocess

import pytest

from lapilli.base.interrupt import WISHES, StopWish


@pytest.fixture
def handlers():
    return {number: signal.getsignal(number) for number in WISHES}


@pytest.mark.parametrize("number", WISHES)
def test_a_wish_is_noted_and_the_first_one_stays(number, handlers):
    with StopWish() as wish:
        assert wish.signal is None
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        assert wish.signal == signal.Signals(number).name
    assert {one: signal.getsignal(one) for one in WISHES} == handlers


def test_a_second_ctrl_c_does_not_wait():
    with StopWish() as wish:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert wish.signal == "SIGINT"


def test_a_signal_that_comes_after_the_others_have_stopped_does_not_end_the_process_another_way(handlers):
    with StopWish(for_good=True):
        pass
    assert {one: signal.getsignal(one) for one in WISHES} == handlers
    with StopWish(for_good=True) as wish:
        wish.signal = "SIGUSR1"  # as another process's, agreed with it
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) == handlers[signal.SIGINT]
    other = subprocess.Popen(["sleep", "60"])
    other.terminate()
    assert other.wait(timeout=10) == -signal.SIGTERM, "what it starts may still be ended"
