"""Tests that a first signal stops training after the step, a second one immediately, and an ignored one not at all."""

from __future__ import annotations

import contextlib
import os
import signal
import threading

import pytest

from shared.train.signals import exit_code, heed_stops, interruptible

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def _handlers():
    before = {n: signal.getsignal(n) for n in NUMBERS}
    for number in NUMBERS:  # as in a terminal, even if the tests run under nohup
        signal.signal(number, signal.SIG_DFL)
    heed_stops()
    yield
    heed_stops()  # forget earlier signals
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("first", NUMBERS)
@pytest.mark.parametrize("second", NUMBERS)
def test_the_first_signal_lets_the_step_finish_and_the_second_stops_it_immediately(first, second) -> None:
    with pytest.raises(KeyboardInterrupt), interruptible() as stop:
        os.kill(os.getpid(), first)
        assert stop.is_set() and exit_code() == 128 + first
        os.kill(os.getpid(), second)
        raise AssertionError("not reached")
    assert exit_code() == 128 + second


def test_a_swallowed_signal_still_stops_the_run() -> None:
    with contextlib.suppress(BaseException):  # a library may swallow the exception
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), interruptible():
        raise AssertionError("not reached")
    assert exit_code() == 143


def test_an_ignored_signal_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    heed_stops()
    with interruptible() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.is_set()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_handlers_are_restored_and_handled_stops_are_forgotten_when_pcs_is_used_as_a_library() -> None:
    """In a notebook, for example, a stop that has already been handled does not stop the next run."""
    for number in NUMBERS:
        signal.signal(number, signal.default_int_handler)
    for _ in range(2):
        with interruptible() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.is_set()
    with interruptible():
        assert signal.getsignal(signal.SIGINT) != signal.default_int_handler
    assert [signal.getsignal(n) for n in NUMBERS] == [signal.default_int_handler] * 3


def test_a_run_in_a_thread_installs_no_handlers() -> None:
    seen: list[bool] = []

    def work() -> None:
        with interruptible() as stop:
            seen.append(stop.is_set())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]
