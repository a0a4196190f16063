"""A limit on how long something may take that may never come back: a network disk, a worker that waits for another."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from metavpt.errors import MetaVPTError


@contextmanager
def time_limit(seconds: float, message: str) -> Iterator[None]:
    """Raises MetaVPTError with `message` when the block takes longer than `seconds`; 0: no limit.

    It rests on SIGALRM, which reaches a main thread alone and not Windows: elsewhere there is no limit.
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
