"""Signals: on SIGTERM, SIGHUP or Ctrl-C a run finishes its step and saves a checkpoint."""

import os
import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))


class Stopped(BaseException):
    """A run ended because of a signal.

    It is not an Exception, so that code which handles errors does not catch it.
    """

    def __init__(self, signal: signal.Signals) -> None:
        super().__init__(signal.name)
        self.signal = signal

    @property
    def status(self) -> int:
        """Return the exit status: 130 for Ctrl-C, else 0.

        Schedulers send SIGTERM to a job that they will start again.
        """
        return 130 if self.signal is signal.SIGINT else 0


class StopRequest:
    """The signal of `SIGNALS` that has arrived, if any.

    Inside `deferred` it is only stored. Elsewhere, and on a second Ctrl-C, `Stopped` is raised.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._is_deferred = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals of the process inside the block.

        SIGHUP stays ignored under nohup. Only the main thread can handle signals; in other threads
        nothing changes.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        earlier = {
            number: signal.signal(number, self._receive)
            for number in SIGNALS
            if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN
        }
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Store signals inside the block, which checks `signal` where it can end."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False

    def _receive(self, number: int, frame: Any) -> None:
        impatient = self.signal is not None and number == signal.SIGINT
        self.signal = signal.Signals(number)
        if self.signal not in (signal.SIGTERM, signal.SIGINT):
            _leave_closed_terminal()
        if impatient or not self._is_deferred:
            raise Stopped(self.signal)


def _leave_closed_terminal() -> None:
    """Send output to the null device if the terminal is gone, since writing to it would fail."""
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, descriptor)
            os.close(null)
