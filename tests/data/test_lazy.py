from metavpt.data.lazy import Lazy, runs
from metavpt.distributed import collectives


def test_items_are_made_when_they_are_asked_for():
    made = []
    squares = Lazy(lambda k: made.append(k) or k * k, range(5))
    assert (len(squares), squares[3], made) == (5, 9, [3])
    assert list(squares) == [0, 1, 4, 9, 16]


def test_runs_are_in_order_and_the_last_may_be_shorter():
    assert [list(run) for run in runs(range(5), 2)] == [[0, 1], [2, 3], [4]]
    assert runs([], 2) == []


def test_one_process_computes_item_after_item():
    """Nothing ahead of time: a set of images does not fit into memory."""
    seen = []
    results = collectives.share_out(lambda k: seen.append(k) or 2 * k, iter(range(3)))
    assert (next(results), seen) == (0, [0])
    assert list(results) == [2, 4]
