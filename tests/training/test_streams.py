import signal
import time

import pytest

from metavpt.errors import MetaVPTError
from metavpt.training.streams import Stream, time_limit


class Skipping:
    """Counts how many batches were made."""

    def __init__(self, seed):
        self.seed, self.first, self.made = seed, 0, 0

    def skip(self, n):
        self.first = n

    def __iter__(self):
        for i in range(self.first, 5):
            self.made += 1
            yield (self.seed, i)


def take(stream, n):
    return [next(stream) for _ in range(n)]


@pytest.mark.parametrize(
    "source", [Skipping, lambda seed: [(seed, i) for i in range(5)]], ids=["skip", "plain"]
)
@pytest.mark.parametrize("at", [0, 1, 4, 5, 7, 12])
def test_a_loaded_position_goes_on_as_the_uninterrupted_stream(source, at):
    whole = take(Stream(source, seed=3), 20)
    first = Stream(source, seed=3)
    assert take(first, at) == whole[:at]
    second = Stream(source, seed=3)
    second.load_state_dict(first.state_dict())
    assert take(second, 20 - at) == whole[at:]


def test_a_source_that_ends_begins_again_with_the_next_seed():
    assert take(Stream(lambda seed: [seed], seed=5), 3) == [5, 6, 7]


def test_skip_makes_no_batch_that_is_dropped():
    made = []

    def source(seed):
        made.append(Skipping(seed))
        return made[-1]

    stream = Stream(source, seed=0)
    stream.load_state_dict({"epoch": 0, "position": 3})
    assert next(stream) == (0, 3)
    assert made[0].made == 1


def test_an_empty_source_is_an_error():
    with pytest.raises(MetaVPTError, match="pretrain_batches: the source is empty"):
        next(Stream(lambda seed: [], seed=0, name="pretrain_batches"))


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
    with pytest.raises(MetaVPTError, match=r"meta_batches: .*0\.05 s.*trainer\.data_timeout"):
        next(stream)
