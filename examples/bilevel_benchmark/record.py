"""What a solver leaves behind: the outer variable at moments of its run. Needs NumPy alone."""

import time
from dataclasses import dataclass, field

import numpy as np

GROWTH = 1.3  # each snapshot is taken this much later than the one before


@dataclass
class Recorder:
    """Clock of a solver, which stands still while a snapshot is taken.

    Seconds are those of the process on the CPU: on a shared machine the wall clock also measures
    the neighbours. Both are kept.

    Args:
        limit: CPU seconds that the solver gets.
    """

    limit: float
    first: float = 1e-3
    rows: list[tuple[float, float, float, np.ndarray]] = field(default_factory=list)
    spent: float = 0.0
    wall: float = 0.0

    def start(self) -> None:
        self._cpu, self._wall, self._next = time.process_time(), time.perf_counter(), 0.0

    def __call__(self, phi, evaluations: float) -> bool:
        """Note where the solver is; return whether it may go on.

        Args:
            phi: The outer variable, anything that `np.array` takes.
            evaluations: Gradients of one sample's loss so far.
        """
        self.spent += time.process_time() - self._cpu
        self.wall += time.perf_counter() - self._wall
        done = self.spent >= self.limit
        if self.spent >= self._next or done:
            values = np.array(phi, dtype=np.float64)
            self.rows.append((self.spent, self.wall, evaluations, values))
            self._next = max(self.first, self.spent * GROWTH)
            done = done or not np.isfinite(values).all()
        self._cpu, self._wall = time.process_time(), time.perf_counter()
        return not done

    def save(self, path: str, **more: object) -> None:
        seconds, wall, evaluations, phi = zip(*self.rows, strict=True)
        np.savez(path, seconds=seconds, wall=wall, evaluations=evaluations, phi=phi, **more)
