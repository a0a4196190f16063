"""Phase timers: code names its phase, and an active clock counts the seconds."""

import time
from collections.abc import Callable, Iterator
from contextlib import ContextDecorator, contextmanager

_listening: list["Clock"] = []


class Clock:
    """Seconds by phase. An inner phase stops the outer one, so seconds add up to the elapsed time.

    Args:
        now: Returns seconds from any origin. On a GPU it waits for the device first.
        by_path: Whether phases are named by their path, such as `designer/product/teacher`.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter, by_path: bool = False) -> None:
        self.now, self.by_path = now, by_path
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Count the seconds inside the block for a phase."""
        self.start(name)
        try:
            yield
        finally:
            self.stop()

    def start(self, name: str) -> None:
        """Begin a phase."""
        now = self.now()
        self._count(now)
        self._open.append(f"{self._open[-1]}/{name}" if self.by_path and self._open else name)
        self._since = now

    def stop(self) -> None:
        """End the innermost phase."""
        now = self.now()
        self._count(now)
        self._open.pop()
        self._since = now

    @contextmanager
    def listen(self, name: str) -> Iterator[None]:
        """Count what runs inside as the phase `name`, except inner phases."""
        _listening.append(self)
        try:
            with self.timed(name):
                yield
        finally:
            _listening.pop()

    def _count(self, now: float) -> None:
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since


class phase(ContextDecorator):
    """Count the seconds inside `with phase("teacher"):` or `@phase("teacher")`, for a clock."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        if _listening:
            _listening[-1].start(self.name)

    def __exit__(self, *error: object) -> None:
        if _listening:
            _listening[-1].stop()
