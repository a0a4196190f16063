"""How far ahead must a designer look? The value of a policy against the steps that it is used for.

    OMP_NUM_THREADS=1 python benchmarks/horizon.py [--seeds 0 1 2] [--steps 16] [key=value ...]

Each estimator scores all patches of the next K unlabelled batches of `problem=data2vec_nyuv2`: how
much the feedback loss would fall if the patch counted more. There is no network between, so these
are the best scores that a policy of patches could learn from the estimator, for these batches. The
learner then takes K real steps, with the patches weighted by the scores, and the feedback loss is
measured on the labelled frames that the estimators saw, and on others. The table holds its fall
below the recipe's after 1 to K steps, in percent. Rows are appended to `--output` as they are
measured.
"""

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from torch import Tensor

from metavpt import AdamAware, Implicit, OneStep, Unrolled
from metavpt.cli.console import Console
from metavpt.feedback.cross_fitted import PatchLabels
from metavpt.hypergradients import params
from metavpt.hypergradients.curvature import GaussNewton
from metavpt.hypergradients.estimators import Estimator
from metavpt.hypergradients.linear_solvers import DampedLanczos
from metavpt.hypergradients.params import Params
from metavpt.strategies.learned import LearnerStep, _through_aligned, feedback_on, tail_loss
from metavpt.training.build import build
from metavpt.training.strategy import TrainState
from metavpt.training.streams import Streams
from metavpt.training.trainer import Trainer

WARM_STEPS = 10  # of the recipe, so that the learner's optimizer has moments
CLIP_NORM = 1.0
GAUSS_NEWTON = Implicit(DampedLanczos(max_iterations=5, tolerance=0.3), curvature=GaussNewton())


def trained(seed: int, overrides: list[str], folder: Path) -> Trainer:
    """Build the problem, and take a few steps of the recipe."""
    options = [
        "problem=data2vec_nyuv2", "experiment=rooms", "designer=patch_policy",
        "strategy=fixed", f"seed={seed}", "threads=1",
    ]  # fmt: skip
    with initialize_config_module("metavpt.configs", version_base="1.3"):
        cfg = compose("run", [*options, *overrides])
        function_space = compose("run", [*options, *overrides, "strategy=functional"]).strategy
    trainer = build(cfg, folder, Console())
    trainer.function_space = instantiate(function_space)  # type: ignore[attr-defined]
    for _ in range(WARM_STEPS):
        trainer.step()
    return trainer


class Horizon:
    """Scores of the next K batches by every estimator, and what each of them is worth."""

    def __init__(self, trainer: Trainer, num_steps: int, seed: int) -> None:
        self.trainer, self.problem, self.seed = trainer, trainer.problem, seed
        batches = iter(self.problem.pretrain_batches(seed + 1000))
        self.batches = [next(batches) for _ in range(num_steps)]
        self.tasks = [self.problem.recipe(batch) for batch in self.batches]
        labelled = next(iter(self.problem.feedback_batches(0)))["labelled"]
        half = len(labelled.image) // 2
        # Their memory is cached by address, so both halves must live as long as the problem.
        self.seen = {"labelled": PatchLabels(*(part[:half].clone() for part in labelled))}
        self.unseen = {"labelled": PatchLabels(*(part[half:].clone() for part in labelled))}
        self.start = self._state()

    def _state(self) -> Any:
        modules = (self.problem.learner, self.problem.teacher)  # type: ignore[attr-defined]
        return copy.deepcopy(
            ([m.state_dict() for m in modules], self.trainer.optimizer.state_dict())
        )

    def _restore(self) -> None:
        modules, optimizer = copy.deepcopy(self.start)
        self.problem.learner.load_state_dict(modules[0])
        self.problem.teacher.load_state_dict(modules[1])  # type: ignore[attr-defined]
        self.trainer.optimizer.load_state_dict(optimizer)

    def estimated(self, estimator: Estimator, num_steps: int) -> list[Tensor]:
        """Return minus the hypergradient with respect to the scores of each batch."""
        problem, tasks = self.problem, self.tasks[:num_steps]
        feedback = feedback_on(problem, self.seen)
        phi = {"scores": torch.stack([torch.zeros_like(task.shift[..., :1]) for task in tasks])}

        def inner(k: int) -> Callable[[Params], Any]:
            return lambda phi: tail_loss(
                problem, feedback.theta, tasks[k]._replace(scores=phi["scores"][k])
            )

        theta, update = feedback.aligned, None
        inners, outer_loss = [inner(k) for k in range(num_steps)], feedback.loss
        if estimator.needs_update:
            theta, update = LearnerStep()(
                problem, feedback.theta, theta, lambda: inners[0](phi), self.trainer.optimizer
            )
            outer_loss = _through_aligned(outer_loss, feedback.aligned)
        found = estimator(inners, outer_loss, theta, phi, update=update)
        return list(-found.by_phi["scores"])

    def function_space(self) -> list[Any]:
        """Fit the network in function space, and return its tasks of all batches."""
        strategy = self.trainer.function_space  # type: ignore[attr-defined]
        strategy.start(self.problem)
        only: Any = (iter([]), iter([]), iter([self.seen]))
        streams = Streams(*only)
        strategy._update(
            TrainState(self.problem, streams, self.trainer.optimizer, self.trainer.budget)
        )
        with torch.no_grad():
            return [self.problem.designer(batch) for batch in self.batches]

    def losses(self, tasks: list[Any]) -> dict[str, dict[int, float]]:
        """Take the real steps. Return the feedback losses after 1, 2, 4, ... of them."""
        self._restore()
        problem, optimizer = self.problem, self.trainer.optimizer
        frames = {"seen": self.seen, "unseen": self.unseen}
        found: dict[str, dict[int, float]] = {name: {} for name in frames}
        for k, task in enumerate(tasks, start=1):
            optimizer.zero_grad(set_to_none=True)
            problem.pretrain_loss(params.named(problem.learner), task).backward()
            torch.nn.utils.clip_grad_norm_(problem.learner.parameters(), CLIP_NORM)
            optimizer.step()
            problem.after_step(task, 0.5)
            if k & (k - 1) == 0 or k == len(tasks):
                theta = params.detach(params.named(problem.learner))
                with torch.no_grad():
                    for name, labelled in frames.items():
                        found[name][k] = float(problem.feedback_loss(theta, labelled))
        self._restore()
        return found

    def scored(self, scores: list[Tensor]) -> list[Any]:
        """Weight the patches of each batch by scores, whose size does not matter."""
        tiny = torch.finfo(torch.float32).tiny
        return [
            task._replace(scores=own / own.square().mean().sqrt().clamp_min(tiny))
            for task, own in zip(self.tasks, scores, strict=False)
        ]

    def policies(self) -> dict[str, Callable[[], list[Any]]]:
        """Return what makes the tasks of each row."""
        generator, num = torch.Generator().manual_seed(self.seed), len(self.tasks)
        noise = [torch.randn(task.shift[..., :1].shape, generator=generator) for task in self.tasks]
        rows: dict[str, Callable[[], list[Any]]] = {
            "recipe": lambda: self.tasks,
            "random scores": lambda: self.scored(noise),
            "one step": lambda: self.scored(self.estimated(OneStep(num_batches=num), num)),
            "one step, through AdamW": lambda: self.scored(
                self.estimated(OneStep(AdamAware(), num_batches=num), num)
            ),
            "implicit": lambda: self.scored(self.estimated(GAUSS_NEWTON, num)),
            "function space": self.function_space,
        }
        for k in (4, num):
            rows[f"unrolled, {k} steps"] = lambda k=k: self.scored(self.estimated(Unrolled(k), k))
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--strength", type=float, default=1.0, help="of the scores")
    parser.add_argument("--rows", nargs="*", help="some rows instead of all")
    parser.add_argument("--output", type=Path, default=Path("horizon.jsonl"))
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    torch.set_num_threads(1)
    gains: dict[tuple[str, str], dict[int, list[float]]] = {}
    for seed in given.seeds:
        with tempfile.TemporaryDirectory() as folder:
            horizon = Horizon(
                trained(
                    seed, [f"designer.strength={given.strength}", *given.overrides], Path(folder)
                ),
                given.steps,
                seed,
            )
            recipe: dict[str, dict[int, float]] = {}
            for name, make in horizon.policies().items():
                if given.rows and name not in ("recipe", *given.rows):
                    continue
                began = time.perf_counter()
                tasks = make()
                seconds = time.perf_counter() - began
                losses = horizon.losses(tasks)
                recipe = recipe or losses
                row = {"seed": seed, "row": name, "seconds": seconds, "feedback_loss": losses}
                with given.output.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                for frames, by_step in losses.items():
                    for k, loss in by_step.items():
                        gain = 100 * (recipe[frames][k] - loss) / recipe[frames][k]
                        gains.setdefault((name, frames), {}).setdefault(k, []).append(gain)
                print(seed, name, f"{seconds:.0f} s", losses, flush=True)
    print(f"fall of the feedback loss below the recipe's, %, mean and s.e. of {len(given.seeds)}")
    for (name, frames), by_step in gains.items():
        cells = [
            f"{k}: {fmean(found):+.2f}"
            + (f" ({stdev(found) / len(found) ** 0.5:.2f})" if len(found) > 1 else "")
            for k, found in by_step.items()
        ]
        print(f"{name:24} {frames:7}", "  ".join(cells))


if __name__ == "__main__":
    main()
