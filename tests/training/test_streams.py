import pytest

from metavpt.errors import MetaVPTError
from metavpt.training.streams import Stream


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
