"""SIGTERM and Ctrl-C: a run that is asked to stop takes its step to the end, saves itself and says how it goes on."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """A run has ended because `signal` asked it to. No Exception: what forgives errors on the way must not forgive this one."""

    def __init__(self, signal: signal.Signals) -> None:
        super().__init__(signal.name)
        self.signal = signal

    @property
    def status(self) -> int:
        """Of the process: 0 for SIGTERM, which schedulers send to what they will start again; 130 for Ctrl-C."""
        return 0 if self.signal is signal.SIGTERM else 130


class StopRequest:
    """Which of `SIGNALS` has come, if any. Inside `deferred` it is only noted; elsewhere, and at a second Ctrl-C, `Stopped` is raised."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._is_deferred = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals of the process for as long as the block runs. Only a main thread can; in another one nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        earlier = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """What runs inside is not to be cut short; it looks at `signal` where it can end."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False

    def _receive(self, number: int, frame: Any) -> None:
        impatient = self.signal is not None and number == signal.SIGINT
        self.signal = signal.Signals(number)
        if impatient or not self._is_deferred:
            raise Stopped(self.signal)
