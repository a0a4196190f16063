"""SIGTERM, SIGHUP and Ctrl-C: a run that is asked to stop finishes its step, saves itself and says how to go on."""

import os
import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))


class Stopped(BaseException):
    """A run has ended because `signal` asked it to. No Exception: what forgives errors on the way must not forgive this one."""

    def __init__(self, signal: signal.Signals) -> None:
        super().__init__(signal.name)
        self.signal = signal

    @property
    def status(self) -> int:
        """Of the process: 130 for Ctrl-C; 0 for SIGTERM, which schedulers send to what they will start again, and SIGHUP."""
        return 130 if self.signal is signal.SIGINT else 0


class StopRequest:
    """Which of `SIGNALS` has come, if any. Inside `deferred` it is only noted; elsewhere, and at a second Ctrl-C, `Stopped` is raised."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._is_deferred = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals of the process inside the block. SIGHUP that nohup made ignored stays ignored.

        Only a main thread can; in another one nothing changes.
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
        """What runs inside is not to be cut short; it looks at `signal` where it can end."""
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
    """Send the output of the process nowhere if its terminal is gone, where writing would fail."""
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, descriptor)
            os.close(null)
