"""A replay buffer of recent values, and the designer's regression to them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metavpt.distributed import collectives
from metavpt.errors import MetaVPTError
from metavpt.hypergradients import params
from metavpt.problem import Problem
from metavpt.profiling import phase
from metavpt.strategies.learned import MakeOptimizer, trainable
from metavpt.training.schedule import WarmupCosine, make_optimizer

Replay = dict[str, Tensor]  # what `SupportsReplay.replay_batch` or `output_values` returns


class ReplayBuffer:
    """Fits the designer to the last `replay` batches of values, without a pass of the learner.

    Each entry holds detached values. Training on several of them averages out what is noise in one.

    Args:
        optimizer: Makes the designer's optimizer.
        phi_steps: Steps of the designer after each new entry.
        replay: Entries that are kept, the new one included.
        max_norm: The norm at which the designer's gradient is clipped.
        batch_size: Rows of an entry that a step takes at random. None: all of them.
        seed: Of these draws.
        anneal: Whether the learning rate falls to 0, along half a cosine, after each new entry.
    """

    def __init__(
        self,
        optimizer: MakeOptimizer,
        phi_steps: int,
        replay: int = 1,
        max_norm: float = 1.0,
        batch_size: int | None = None,
        seed: int = 0,
        anneal: bool = False,
    ) -> None:
        if phi_steps < 1 or replay < 1:
            raise MetaVPTError(
                f"strategy: phi_steps={phi_steps} and replay={replay} must be at least 1"
            )
        if batch_size is not None and batch_size < 1:
            raise MetaVPTError(f"strategy.batch_size={batch_size} must be at least 1")
        self.make, self.max_norm = optimizer, max_norm
        self.phi_steps, self.replay, self.batch_size = phi_steps, replay, batch_size
        self.schedule = WarmupCosine() if anneal else WarmupCosine(final=1.0)
        self.generator = torch.Generator().manual_seed(seed)
        self.entries: list[Replay] = []  # besides the new one, newest first
        self.num_skipped = 0

    def start(self, problem: Problem, owner: str) -> None:
        """Make the designer's optimizer.

        Raises:
            MetaVPTError: The designer has no trainable parameter.
        """
        parameters = trainable(problem.designer, owner).values()
        self.optimizer = make_optimizer(self.make, parameters, "strategy.optimizer")
        self.peak_lr = [group["lr"] for group in self.optimizer.param_groups]

    @phase("phi")
    def fit(
        self, problem: Problem, loss: Callable[[Replay], Tensor], new: Replay
    ) -> dict[str, float]:
        """Take `phi_steps` steps of the designer on `loss`, entries in turn, newest first.

        Returns:
            The record: the designer's loss on `new` before it was fitted to it. An entry that is
            not finite is skipped and counted.
        """
        finite = all(
            torch.isfinite(part).all() for part in new.values() if part.is_floating_point()
        )
        if collectives.any_of(None if finite else True):
            self.num_skipped += 1
            return {"skipped_updates": float(self.num_skipped)}
        if self.batch_size is not None:
            new = collectives.gather(new)  # the same rows whatever the number of processes
        entries, losses = [new, *self.entries], []
        for k in range(self.phi_steps):
            for group, peak_lr in zip(self.optimizer.param_groups, self.peak_lr, strict=True):
                group["lr"] = peak_lr * self.schedule(k, k / self.phi_steps)
            losses.append(self._step(problem, loss, self._rows(entries[k % len(entries)])))
        self.entries = entries[: self.replay - 1]
        return {"designer_loss": float(losses[0])}

    def _step(self, problem: Problem, loss: Callable[[Replay], Tensor], rows: Replay) -> Tensor:
        phi = params.named(problem.designer)
        value = loss(rows)
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()
        for p in phi.values():
            p.grad = None if p.grad is None else collectives.leave(p.grad)
        torch.nn.utils.clip_grad_norm_(phi.values(), self.max_norm)
        self.optimizer.step()
        return value.detach()

    def _rows(self, entry: Replay) -> Replay:
        if self.batch_size is None:
            return entry
        num = len(next(iter(entry.values())))
        drawn = collectives.own(torch.randint(num, (self.batch_size,), generator=self.generator))
        return {name: part[drawn.to(part.device)] for name, part in entry.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer, the entries of all ranks, the count and the generator."""
        whole = self.batch_size is not None  # entries are then those of all ranks
        return {
            "optimizer": self.optimizer.state_dict(),
            "entries": [self.entries] if whole else collectives.every(self.entries),
            "num_skipped": self.num_skipped,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, on any number of processes."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.num_skipped = state["num_skipped"]
        self.generator.set_state(state["generator"])
        saved: list[list[Replay]] = state["entries"]
        if len(saved) == collectives.size():
            self.entries = saved[collectives.rank()]
            return
        self.entries = [
            {name: torch.cat([entry[name] for entry in entries]) for name in entries[0]}
            for entries in zip(*saved, strict=True)
        ]
