"""Endless streams of batches, with a position for checkpoints."""

import itertools
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

from metavpt.distributed import collectives
from metavpt.errors import MetaVPTError
from metavpt.problem import Problem, supports
from metavpt.profiling import phase

TIMEOUT = 600.0  # seconds


class Stream:
    """The batches of `source(seed)`, then of `source(seed + 1)`, and so on.

    `state_dict` holds only the position. To restore it, the source starts again and skips: by the
    iterable's own `skip(n)` if it has one (without decoding), else by drawing and dropping batches.

    With several processes, each gets its own rows of the same batches, see
    `metavpt.distributed.collectives`: by the iterable's own `share(rank, size)` if it has one, else
    by cutting whole batches. The position does not depend on the number of processes.

    Args:
        source: Returns batches in an order set by a seed.
        seed: The first seed.
        name: The name in errors.
        timeout: The limit on waiting for a batch, in seconds. 0: no limit.
    """

    def __init__(
        self,
        source: Callable[[int], Iterable[Any]],
        seed: int,
        name: str = "stream",
        timeout: float = TIMEOUT,
    ) -> None:
        self.source, self.seed, self.name, self.timeout = source, seed, name, timeout
        self.epoch = 0
        self.position = 0
        self._batches: Iterator[Any] | None = None
        self._is_shared = False

    @phase("data")
    def __next__(self) -> Any:
        if self._batches is None:
            self._batches = self._begin()
        try:
            batch = self._draw(self._batches)
        except StopIteration:
            if self.position == 0:
                raise MetaVPTError(f"{self.name}: the source is empty, it gave no batch") from None
            self.epoch, self.position = self.epoch + 1, 0
            self._batches = self._begin()
            return next(self)
        self.position += 1
        return batch if self._is_shared else collectives.own(batch)

    def check(self, draw: bool) -> None:
        """Open the source of a stream that has not begun, to find errors early.

        Args:
            draw: Whether to draw the first batch too. The next call of `next` then returns it.

        Raises:
            MetaVPTError: The source is empty, or no batch arrives in time.
        """
        if self.has_begun or self._batches is not None:
            return
        self._batches = self._begin()
        if draw:
            try:
                first = self._draw(self._batches)
            except StopIteration:
                raise MetaVPTError(f"{self.name}: the source is empty, it gave no batch") from None
            self._batches = itertools.chain([first], self._batches)

    @property
    def has_begun(self) -> bool:
        """Return whether a batch was drawn."""
        return self.epoch > 0 or self.position > 0

    def _begin(self) -> Iterator[Any]:
        batches = self.source(self.seed + self.epoch)
        self._is_shared = hasattr(batches, "share")
        if self._is_shared:
            batches.share(collectives.rank(), collectives.size())  # type: ignore[attr-defined]
        if self.position and hasattr(batches, "skip"):
            batches.skip(self.position)  # type: ignore[attr-defined]
            return iter(batches)
        iterator = iter(batches)
        for _ in range(self.position):
            self._draw(iterator)
        return iterator

    def _draw(self, batches: Iterator[Any]) -> Any:
        hung = (
            f"{self.name}: no batch within {self.timeout:g} s; check the disk that the data is on, "
            "or raise trainer.data_timeout"
        )
        with time_limit(self.timeout, hung):
            return next(batches)

    def state_dict(self) -> dict[str, int]:
        """Return the position."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore a position."""
        self.epoch, self.position = state["epoch"], state["position"]
        self._batches = None


class Streams(NamedTuple):
    """The streams that strategies draw from.

    Attributes:
        pretrain: Unlabelled batches of the learner.
        meta: Unlabelled batches of the designer's updates, so that the learner's order is
            unchanged.
        feedback: Labelled batches.
    """

    pretrain: Stream
    meta: Stream
    feedback: Stream


Source = Callable[[int], Iterable[Any]]  # seed -> batches


class HasMetaBatches(Protocol):
    """A problem whose designer updates read unlabelled batches of their own."""

    def meta_batches(self, seed: int) -> Iterable[Any]:
        """Return unlabelled batches for the designer's updates, in an order set by `seed`."""
        ...


class HasHeldOutBatches(Protocol):
    """A problem with labelled batches that no designer update reads."""

    def held_out_batches(self, seed: int) -> Iterable[Any]:
        """Return labelled batches, to measure the predictions of designer updates."""
        ...


def meta_batches(problem: Problem) -> Source:
    """Return the source of the designer's unlabelled batches. Default: the learner's."""
    return problem.meta_batches if supports(problem, HasMetaBatches) else problem.pretrain_batches


def held_out_batches(problem: Problem) -> Source:
    """Return the source of held-out labelled batches. Default: that of the feedback."""
    if supports(problem, HasHeldOutBatches):
        return problem.held_out_batches
    return problem.feedback_batches


@contextmanager
def time_limit(seconds: float, message: str) -> Iterator[None]:
    """Limit the time of the block.

    It uses SIGALRM, so there is no limit on Windows and outside of the main thread.

    Args:
        seconds: The limit. 0: none.
        message: The message of the error.

    Raises:
        MetaVPTError: The block takes longer.
    """
    if (
        not seconds
        or not hasattr(signal, "SIGALRM")
        or threading.current_thread() is not threading.main_thread()
    ):
        yield
        return

    def ring(*_: object) -> None:
        raise MetaVPTError(message)

    handler = signal.signal(signal.SIGALRM, ring)
    earlier, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, earlier)
