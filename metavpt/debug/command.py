"""`python -m metavpt.debug run=<run folder>`: run the failed step of a run again and inspect it."""

import math
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from metavpt.cli.configuration import command, read_config
from metavpt.cli.console import Console
from metavpt.errors import MetaVPTError, NonFiniteError
from metavpt.hypergradients import params, trees
from metavpt.problem import Problem
from metavpt.strategies.learned import Learned
from metavpt.training import checkpoint, health
from metavpt.training.build import build
from metavpt.training.trainer import Trainer


@dataclass
class Replay:
    """The result of running the step again.

    Attributes:
        step: Its number.
        saved: Loss and gradient norm in the run. Empty if a designer update ended it.
        loss: The loss of the learner's step now.
        grad_norm: Its gradient norm now.
        same_task: Whether the data gave the saved task. The loss is that of the saved task.
        findings: What was not finite, in the order of the computation.
    """

    step: int
    saved: dict[str, float]
    loss: float
    grad_norm: float
    same_task: bool
    findings: list[str] = field(default_factory=list)

    @property
    def is_reproduced(self) -> bool:
        """Return whether the step gave the saved values again."""
        if not self.saved:
            return bool(self.findings)
        return all(
            _same(self.saved[name], value)
            for name, value in (("loss", self.loss), ("grad_norm", self.grad_norm))
        )

    def lines(self) -> Iterator[str]:
        """Describe the result, line by line."""
        yield f"step {self.step}: loss {self.loss:.6g}, gradient norm {self.grad_norm:.6g}"
        if self.saved:
            saved = self.saved
            norm = saved["grad_norm"]
            yield f"in the run: loss {saved['loss']:.6g}, gradient norm {norm:.6g}"
        if not self.same_task:
            yield "the data give another task than in the run; the loss is that of the saved task"
        why = "another device, version or thread count rounds differently"
        yield f"reproduced: {'yes' if self.is_reproduced else f'no; {why}'}"
        for rank, finding in enumerate(self.findings):
            yield f"{'first not finite' if rank == 0 else 'then'}: {finding}"


def replay(trainer: Trainer, file: Path) -> Replay:
    """Run the last step in failure.pt again with `trainer` as in the run; nothing is trained."""
    saved = checkpoint.read(file)
    if not {"trainer", "random", "task", "values"} <= saved.keys():
        raise MetaVPTError(f"{file}: not a failure that a run saved")
    problem, findings = trainer.problem, []
    trainer.restore(saved["trainer"], file, finite=False)
    _rewind(trainer, saved)
    step = trainer.budget.steps
    findings += [
        f"the parameter {name} of the {part}, before the step"
        for part, name in _bad_parameters(problem)
    ]
    findings += _watch_update(trainer)
    _rewind(trainer, saved)
    with first_not_finite(problem) as seen:
        proposal = trainer.strategy.next_task(trainer.state)
    task, same_task = _as_saved(proposal.task, saved["task"])
    if not trees.is_finite(task):
        findings += [*seen, "the task that the learner is given"]
    with first_not_finite(problem) as seen:
        theta = params.named(problem.learner)
        loss = proposal._replace(task=task).loss(problem, theta)
    findings += seen
    if not torch.isfinite(loss):
        findings.append("the pretraining loss")
    grad_norm, of_gradient = _gradient(loss, theta)
    return Replay(
        step, saved["values"], float(loss.detach()), grad_norm, same_task, findings + of_gradient
    )


@contextmanager
def first_not_finite(problem: Problem) -> Iterator[list[str]]:
    """Yield a list that receives one line: the first module whose output is not finite."""
    seen: list[str] = []
    handles = []

    def watch(name: str, module: nn.Module) -> None:
        def look(module: nn.Module, given: Any, output: Any) -> None:
            if not seen and not trees.is_finite(output):
                seen.append(
                    f"the output of {name} ({type(module).__name__})"
                    + ("" if trees.is_finite(given) else ", of an input that is not finite either")
                )

        handles.append(module.register_forward_hook(look))

    for attribute, value in vars(problem).items():
        if isinstance(value, nn.Module):
            for name, module in value.named_modules():
                watch(f"{attribute}.{name}".rstrip("."), module)
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _rewind(trainer: Trainer, saved: dict[str, Any]) -> None:
    """Bring the trainer and the generators to where the step began."""
    trainer.load_state_dict(saved["trainer"])
    checkpoint.set_random_state(saved["random"])
    trainer._schedule()


def _bad_parameters(problem: Problem) -> Iterator[tuple[str, str]]:
    for part in ("learner", "designer"):
        bad = [
            name
            for name, p in getattr(problem, part).named_parameters()
            if not torch.isfinite(p).all()
        ]
        if bad:
            yield part, bad[0]


def _watch_update(trainer: Trainer) -> list[str]:
    """Return why the designer update of this step fails, if there is one and it does."""
    strategy, budget = trainer.strategy, trainer.budget
    if not isinstance(strategy, Learned) or not strategy.period.due(budget):
        return []
    with first_not_finite(trainer.problem) as seen:
        try:
            strategy.apply(trainer.state, *strategy.estimate(trainer.state))
        except NonFiniteError as error:
            return [
                *(f"in the designer update, {line}" for line in seen),
                f"the designer update: {error}",
            ]
    return []


def _as_saved(task: Any, kept: list[Tensor]) -> tuple[Any, bool]:
    """Return `task` with the tensors that were saved in the run, and whether they were equal."""
    own = trees.tensors(task)
    if [tensor.shape for tensor in own] != [tensor.shape for tensor in kept]:
        raise MetaVPTError(
            "failure.pt: the saved task has other shapes than this configuration makes; the code "
            "of the problem has changed"
        )
    same = all(trees.same(a.detach().cpu(), b) for a, b in zip(own, kept, strict=True))
    rest = iter(kept)
    return trees.map_tensors(lambda tensor: next(rest).to(tensor.device), task), same


def _gradient(loss: Tensor, theta: params.Params) -> tuple[float, list[str]]:
    """Return the norm of the gradient, and where in the backward pass it stops being finite."""
    findings = []
    with warnings.catch_warnings():
        # Anomaly detection prints a page where one line is enough.
        warnings.simplefilter("ignore")
        gradients = torch.autograd.grad(
            loss, list(theta.values()), retain_graph=True, materialize_grads=True
        )
        bad = [
            name
            for name, gradient in zip(theta, gradients, strict=True)
            if not torch.isfinite(gradient).all()
        ]
        if bad and torch.isfinite(loss):
            try:
                with torch.autograd.detect_anomaly(check_nan=True):
                    torch.autograd.grad(loss, list(theta.values()), materialize_grads=True)
            except RuntimeError as error:
                findings.append(f"the gradient: {str(error).splitlines()[0]}")
    if bad:
        findings.append(
            f"the gradient of {bad[0]}"
            + (f" and {len(bad) - 1} other parameters" if len(bad) > 1 else "")
        )
    return float(params.norm(dict(zip(theta, gradients, strict=True)))), findings


def _same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


@command("debug")
def main(cfg: DictConfig) -> None:
    """Run the command."""
    folder = Path(cfg.run)
    file = folder / health.FAILURE_FILE
    if not file.is_file():
        raise MetaVPTError(
            f"{file}: no such file; a run writes it if a loss or gradient is not finite"
        )
    config = read_config(folder)
    config.tracker = None
    console = Console(soft_wrap=True)
    with tempfile.TemporaryDirectory() as scratch:
        for line in replay(build(config, Path(scratch), console), file).lines():
            console.print(line, highlight=False)
