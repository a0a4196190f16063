"""What value has said of the last few batches, and the designer that is fitted to it."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from metavpt.distributed import collectives
from metavpt.errors import MetaVPTError
from metavpt.hypergradients import params
from metavpt.problem import Problem
from metavpt.profiling.timers import phase
from metavpt.training.schedule import WarmupCosine

Lesson = dict[str, Tensor]  # see `Problem.lesson`, `Problem.functional_lesson`


class Lessons:
    """`phi_steps` steps of the designer on `problem.taught` after each lesson, which cost no pass through the learner.

    A lesson holds what the learner had to say, and averaging goes on in the designer: what value says by chance of one batch it does not
    say of the last `replay` of them.

    optimizer   of the designer
    max_norm    at which the designer's gradient is clipped
    batch_size  rows of a lesson that a step takes, drawn at random from `seed` on; None: all of them
    anneal      the learning rate falls to 0 within each lesson, along half a cosine, which leaves little of what single rows say by chance
    """

    def __init__(
        self,
        optimizer: Callable[[Iterable[Tensor]], Optimizer],
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
            raise MetaVPTError(f"strategy.lesson_batch_size={batch_size} must be at least 1")
        self.make_optimizer, self.max_norm = optimizer, max_norm
        self.phi_steps, self.replay, self.batch_size = phi_steps, replay, batch_size
        self.schedule = WarmupCosine() if anneal else WarmupCosine(final=1.0)
        self.generator = torch.Generator().manual_seed(seed)
        self.held: list[Lesson] = []  # that the next one is replayed with, newest first
        self.num_skipped = 0

    def start(self, problem: Problem) -> None:
        phi = params.named(problem.designer)
        if not phi:
            raise MetaVPTError(
                f"the designer {type(problem.designer).__name__} has no trainable parameter, so no lesson teaches it anything"
            )
        self.optimizer = self.make_optimizer(phi.values())
        self.peak_lr = [group["lr"] for group in self.optimizer.param_groups]

    @phase("phi")
    def learn(self, problem: Problem, lesson: Lesson) -> dict[str, float]:
        """Newest first; the record is of the first step, which has not seen the newest lesson. One that is not finite is skipped."""
        finite = all(
            torch.isfinite(part).all() for part in lesson.values() if part.is_floating_point()
        )
        if collectives.any_of(None if finite else True):
            self.num_skipped += 1
            return {"skipped_updates": float(self.num_skipped)}
        if self.batch_size is not None:
            lesson = collectives.gather(
                lesson
            )  # so that a step takes the same rows whatever the number of processes
        lessons, losses = [lesson, *self.held], []
        for k in range(self.phi_steps):
            for group, peak_lr in zip(self.optimizer.param_groups, self.peak_lr, strict=True):
                group["lr"] = peak_lr * self.schedule(k, k / self.phi_steps)
            losses.append(self._step(problem, self._rows(lessons[k % len(lessons)])))
        self.held = lessons[: self.replay - 1]
        return {"value": -float(losses[0])}

    def _step(self, problem: Problem, lesson: Lesson) -> Tensor:
        phi = params.named(problem.designer)
        loss = problem.taught(lesson)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for p in phi.values():
            p.grad = None if p.grad is None else collectives.leave(p.grad)
        torch.nn.utils.clip_grad_norm_(phi.values(), self.max_norm)
        self.optimizer.step()
        return loss.detach()

    def _rows(self, lesson: Lesson) -> Lesson:
        if self.batch_size is None:
            return lesson
        num = len(next(iter(lesson.values())))
        drawn = collectives.own(torch.randint(num, (self.batch_size,), generator=self.generator))
        return {name: part[drawn.to(part.device)] for name, part in lesson.items()}

    def state_dict(self) -> dict[str, Any]:
        held = (
            collectives.every(self.held) if self.batch_size is None else [self.held]
        )  # of every rank, or what all of them have
        state = {
            "optimizer": self.optimizer.state_dict(),
            "held": held,
            "num_skipped": self.num_skipped,
        }
        return {**state, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.num_skipped = state["num_skipped"]
        self.generator.set_state(state["generator"])
        held: list[list[Lesson]] = state["held"]
        whole = [
            {name: torch.cat([lesson[name] for lesson in lessons]) for name in lessons[0]}
            for lessons in zip(*held, strict=True)
        ]
        self.held = held[collectives.rank()] if len(held) == collectives.size() else whole
