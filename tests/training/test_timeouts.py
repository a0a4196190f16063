import signal
import time

import pytest

from metavpt.errors import MetaVPTError
from metavpt.training.streams import Stream
from metavpt.training.timeouts import time_limit


def test_what_hangs_is_an_error_and_the_alarm_is_given_back():
    handler = signal.getsignal(signal.SIGALRM)
    with pytest.raises(MetaVPTError, match="too long"), time_limit(0.05, "too long"):
        time.sleep(5)
    assert signal.getsignal(signal.SIGALRM) is handler
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_what_is_in_time_is_left_alone():
    handler = signal.getsignal(signal.SIGALRM)
    with time_limit(5.0, "too long"):
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 5.0
        assert signal.getsignal(signal.SIGALRM) is not handler
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)  # no alarm comes later
    assert signal.getsignal(signal.SIGALRM) is handler


def test_zero_is_no_limit():
    with time_limit(0, "too long"):
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_stream_whose_source_hangs_says_which():
    def source(seed):
        yield 1
        time.sleep(5)

    stream = Stream(source, 0, "meta_batches", timeout=0.05)
    assert next(stream) == 1
    with pytest.raises(
        MetaVPTError, match=r"meta_batches: no batch came within 0\.05 s.*trainer\.data_timeout"
    ):
        next(stream)
