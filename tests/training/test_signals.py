"""Signals: noted in a step, acted on after it."""

import os
import signal
import threading

import pytest

from metavpt.training.signals import Stopped, StopRequest


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 0), (signal.SIGHUP, 0), (signal.SIGINT, 130)]
)
def test_outside_of_a_step_a_signal_stops_at_once(number, status):
    with pytest.raises(Stopped) as stopped, StopRequest().listening():
        send(number)
    assert stopped.value.status == status


def test_inside_of_a_step_it_is_noted_and_only_a_second_interrupt_cuts_the_step_short():
    stop = StopRequest()
    with stop.listening(), stop.deferred():
        send(signal.SIGTERM)
        assert stop.signal is signal.SIGTERM
        send(signal.SIGTERM)
        with pytest.raises(Stopped):
            send(signal.SIGINT)


def test_handlers_are_put_back():
    earlier = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopRequest().listening():
        assert signal.getsignal(signal.SIGTERM) != earlier[0]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == earlier


def test_a_thread_listens_to_nothing():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work():
        with StopRequest().listening():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_hangup_that_nohup_ignores_stays_ignored():
    earlier = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = StopRequest()
        with stop.listening():
            send(signal.SIGHUP)
        assert stop.signal is None
    finally:
        signal.signal(signal.SIGHUP, earlier)
