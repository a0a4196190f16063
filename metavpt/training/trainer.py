"""The training loop: get a task from the strategy, take a pretraining step, count, measure."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from metavpt.distributed import collectives, fsdp
from metavpt.errors import MetaVPTError, brief
from metavpt.hypergradients import params, trees
from metavpt.problem import Problem, check_directions, supports
from metavpt.profiling import phase
from metavpt.training.budget import Budget
from metavpt.training.checkpoint import Checkpoints
from metavpt.training.engine import Execution
from metavpt.training.first_order import Before, FirstOrderProbe
from metavpt.training.health import (
    Failures,
    HealthMetric,
    Monitored,
    Watch,
    check_labels,
    untouched,
)
from metavpt.training.run_log import Reportable, ReportsClasses, RunLog, target_metrics
from metavpt.training.run_state import (
    Options,
    Parameters,
    faults,
    not_finite,
    optimizer_options,
    optimizer_states,
)
from metavpt.training.schedule import WarmupCosine, make_optimizer, parameter_groups
from metavpt.training.signals import Stopped, StopRequest
from metavpt.training.strategy import LearnerPasses, Proposal, SteeredSteps, Strategy, TrainState
from metavpt.training.streams import TIMEOUT, Stream, Streams, meta_batches

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class Trainer:
    """Pretrains `problem.learner` on the tasks of `strategy` until the budget is spent.

    Only `step` writes the learner's parameters and their `.grad`, and only from the pretraining
    loss of a detached task. While `stop` listens, SIGTERM and Ctrl-C end `run` by `Stopped`, after
    the current step and a checkpoint of it.

    Args:
        problem: The problem.
        strategy: Chooses the tasks.
        budget: Ends the run.
        log: The log of the run.
        checkpoints: Where checkpoints are saved. None: none are saved.
        optimizer: Builds the learner's optimizer. Default: AdamW with a learning rate of 1e-4.
        schedule: The factor of the learning rate. Default: a cosine without warm-up.
        weight_decay: The decay of matrices.
        clip_norm: The limit on the gradient norm.
        head_warmup_steps: First steps that train only the problem's `warm_up_parameters`, for new
            heads on a released backbone.
        head_warmup_lr: The peak learning rate of these steps. None: the optimizer's, which is low
            for a released backbone.
        seed: The seed of the streams.
        log_every: Steps between two train records.
        probe_every: Steps between two measurements. 0: only before and after.
        checkpoint_every: Steps between two checkpoints. 0: only after.
        first_order_every: Steps between two measurements of the first-order prediction. 0: none.
        max_failures: Learner steps, or designer updates, that may be skipped in a row because a
            value is not finite. Then the run stops.
        data_timeout: The limit on waiting for a batch, in seconds. 0: no limit.
        dry_run: `python -m metavpt.run` only describes this run, see `metavpt.run.dry_run`.
        accumulate: Gradient accumulation: the number of microbatches. Operations across samples
            (Sinkhorn, KoLeo) act within a microbatch.
        recompute: Activation checkpointing: recompute the activations of blocks in the backward
            pass.
        compile: The backend of torch.compile for the blocks in the learner's step. None: not
            compiled.
        fabric: Device, precision and processes. None: one process, in float32.

    Attributes:
        options: The options that the run's numbers depend on, see `run_state`. A checkpoint with
            other options is refused.

    Raises:
        MetaVPTError: An option is out of range, or the strategy needs more than the problem has.
    """

    def __init__(
        self,
        problem: Problem,
        strategy: Strategy,
        budget: Budget,
        log: RunLog,
        checkpoints: Checkpoints | None = None,
        optimizer: Callable[[list[dict[str, Any]]], Optimizer] | None = None,
        schedule: WarmupCosine | None = None,
        weight_decay: float = 0.04,
        clip_norm: float = 1.0,
        head_warmup_steps: int = 0,
        head_warmup_lr: float | None = None,
        seed: int = 0,
        log_every: int = 10,
        probe_every: int = 0,
        checkpoint_every: int = 0,
        first_order_every: int = 0,
        max_failures: int = 10,
        data_timeout: float = TIMEOUT,
        dry_run: bool = False,
        accumulate: int = 1,
        recompute: bool = False,
        compile: str | None = None,
        fabric: "Fabric | None" = None,
    ) -> None:
        _check_at_least(1, log_every=log_every, max_failures=max_failures, accumulate=accumulate)
        _check_at_least(
            0,
            probe_every=probe_every,
            checkpoint_every=checkpoint_every,
            first_order_every=first_order_every,
            head_warmup_steps=head_warmup_steps,
            head_warmup_lr=head_warmup_lr or 0,
            weight_decay=weight_decay,
            data_timeout=data_timeout,
        )
        if not clip_norm > 0:
            raise MetaVPTError(f"trainer.clip_norm={clip_norm} must be positive")
        self.problem, self.strategy, self.budget = problem, strategy, budget
        self.log, self.checkpoints = log, checkpoints
        self.schedule = schedule or WarmupCosine()
        self.head_warmup_steps, self.head_warmup_lr = head_warmup_steps, head_warmup_lr
        self.log_every, self.probe_every = log_every, probe_every
        self.checkpoint_every = checkpoint_every
        self.first_order_every, self.dry_run, self.clip_norm = first_order_every, dry_run, clip_norm
        check_directions(problem.metric_directions, "metric_directions")
        self.failures = Failures(max_failures, log.folder)
        self.watch, self.stop, self.steered = Watch(), StopRequest(), SteeredSteps()
        self.metrics: dict[str, float] = {}  # the last measurement
        self.measured_at = 0  # its step
        # Before the optimizer, since sharding replaces the parameters.
        self.execution = Execution(problem, fabric, accumulate, recompute, compile)
        self.passes = LearnerPasses(problem, self._measuring_passes)
        strategy.start(problem)
        groups = parameter_groups(problem, weight_decay)
        self.optimizer = make_optimizer(
            optimizer or _default_optimizer, groups, "trainer.optimizer"
        )
        self.peak_lr = [group["lr"] for group in self.optimizer.param_groups]
        self.options = self._own_options(seed)
        # A stream uses a new seed for every pass. This leaves room for 300,000 passes.
        self._draw_from(1_000_000 * seed, data_timeout)

    def _own_options(self, seed: int) -> Options:
        """Collect the options that are known without a configuration.

        Call it before the first step, which changes learning rates.
        """
        options: Options = {
            "seed": seed,
            "problem": _kind(self.problem),
            "strategy": _kind(self.strategy),
            "trainer.optimizer": type(self.optimizer).__name__,
            "trainer.schedule": type(self.schedule).__name__,
            "trainer.clip_norm": self.clip_norm,
            "trainer.accumulate": self.execution.accumulate,
            "trainer.head_warmup_steps": self.head_warmup_steps,
            "trainer.head_warmup_lr": self.head_warmup_lr,
        }
        state = {
            "trainer.optimizer": self.optimizer.state_dict(),
            "strategy": self.strategy.state_dict(),
        }
        for part, value in state.items():
            for name, found in optimizer_states(value, part):
                options |= optimizer_options(name, found["param_groups"])
        return options

    def _draw_from(self, first: int, timeout: float) -> None:
        """Create the streams and the first-order probe, with seeds from `first` on."""
        problem = self.problem
        self.streams = Streams(
            pretrain=Stream(problem.pretrain_batches, first, "pretrain_batches", timeout),
            meta=Stream(meta_batches(problem), first + 300_000, "meta_batches", timeout),
            feedback=Stream(problem.feedback_batches, first + 600_000, "feedback_batches", timeout),
        )
        self.first_order = FirstOrderProbe(problem, first + 800_000)

    @property
    def state(self) -> TrainState:
        """Return what the strategy sees."""
        return TrainState(self.problem, self.streams, self.optimizer, self.budget)

    def run(self) -> None:
        """Train to the end of the budget. Step 0 is measured first.

        Raises:
            MetaVPTError: The data are wrong, or too many steps in a row are not finite.
            Stopped: A signal arrived.
        """
        if self.dry_run:
            raise MetaVPTError(
                "trainer.dry_run=true: use python -m metavpt.run, which describes this run"
            )
        if self.budget.exhausted:  # resumed after its end
            if self.measured_at != self.budget.steps:
                self.measure()
            return
        if self.budget.steps == 0:
            self.check()
        if self.budget.steps == 0 and not self.metrics:
            self.measure()
        self.budget.memory.restart()
        with self.log.progress(self.budget), self.stop.deferred():
            while not self.budget.exhausted:
                self.step()
                if self.budget.steps == 1:
                    self.budget.check_first_step()
                if not self.budget.exhausted:
                    self._between_steps()
            if message := self.steered.warning(self.budget.steps):
                self.log.warn(self.budget.steps, message)
            self.measure()
            self.log.write("time", self.budget.steps, seconds=dict(self.budget.times))
            self.save()

    def check(self) -> None:
        """Find errors in the data before step 0 is measured, which may take minutes.

        The first unlabelled batch is drawn, and the first labelled one for strategies that use it.
        """
        steers = hasattr(self.strategy, "period")
        self.streams.pretrain.check(draw=True)
        if steers:
            self.streams.meta.check(draw=False)
        if steers or getattr(self.strategy, "trains_on_labels", False):
            self.streams.feedback.check(draw=True)

    def _between_steps(self) -> None:
        """Measure and save when due, and end the run after a signal."""
        step, stopping = self.budget.steps, collectives.any_of(self.stop.signal)
        if self.probe_every and step % self.probe_every == 0:
            self.measure()
        if stopping or (self.checkpoint_every and step % self.checkpoint_every == 0):
            self.save()
        if stopping:
            raise Stopped(stopping)

    def start_from(self, problem_state: dict[str, Any], metrics: dict[str, float]) -> None:
        """Start from the end of another run.

        Args:
            problem_state: The state of its problem.
            metrics: Its metrics, as step 0.

        Raises:
            MetaVPTError: The learner has another architecture.
        """
        try:
            self.problem.load_state_dict(problem_state)
        except Exception as error:
            what = "the warm start has another learner; compare learners in separate comparisons"
            raise MetaVPTError(f"{what} ({brief(error)})") from error
        self.metrics = as_metrics(metrics, "the warm start")
        self._log_metrics()

    def resume(self) -> None:
        """Resume the newest checkpoint that can be read.

        Raises:
            MetaVPTError: There is none, or it belongs to another configuration.
        """
        if self.checkpoints is None:
            raise MetaVPTError("Trainer.resume: the trainer has no checkpoints")
        state, path, unreadable = self.checkpoints.load(self._layout())
        self.restore(state, path)
        for line in self.log.rewind(state["log"], self.budget.steps):
            self.log.warn(self.budget.steps, line)
        for line in unreadable:
            self.log.warn(self.budget.steps, f"{line}; resumed from {path.name} instead")
        before = state["budget"]["limits"]
        if before != self.budget.limits:
            self.log.warn(
                self.budget.steps,
                f"the budget was {before} and is {self.budget.limits}; "
                "the learning rate follows the new one",
            )

    def restore(self, state: dict[str, Any], source: Path, finite: bool = True) -> None:
        """Load a state of `state_dict`.

        Args:
            state: The state.
            source: The file of the state, for errors.
            finite: Refuse a state that holds NaN, or was saved while steps failed.

        Raises:
            MetaVPTError: The state is damaged, or belongs to another model or configuration.
        """
        learner = [p for group in self.optimizer.param_groups for p in group["params"]]
        designer = list(params.named(self.problem.designer).values())
        try:
            found = faults(state, self.state_dict(), Parameters(learner, designer))
            fault = next(found, None)
            if fault is None and finite:
                bad = (
                    "a step before" if any(state["failures"].values()) else self._not_finite(state)
                )
                fault = bad and f"{bad} is not finite; delete it to resume from an earlier one"
        except Exception as error:
            fault = f"is not the state of a run ({brief(error)})"
        if fault := collectives.any_of(fault):
            raise MetaVPTError(f"{source}: {fault}")
        try:
            self.load_state_dict(state)
        except Exception as error:
            raise MetaVPTError(
                f"{source}: is the checkpoint of another model or configuration ({brief(error)})"
            ) from error

    def measure(self) -> None:
        """Measure metrics and health, and save figures and texts. Warns if features collapse."""
        with self.budget.timed("probe"), self.execution.eager():
            self.metrics = as_metrics(self.problem.evaluate(), type(self.problem).__name__)
            self.measured_at = self.budget.steps
            self._log_metrics()
            if supports(self.problem, ReportsClasses):
                for name, values in self.problem.class_metrics().items():
                    self.log.write("classes", self.budget.steps, metric=name, values=values)
            if supports(self.problem, Reportable):
                self.log.save_figures(self.budget.steps, self.problem.figures())
                self.log.save_texts(self.budget.steps, self.problem.texts())
            if supports(self.problem, Monitored):
                self._check_health(self.problem.health_metrics())

    def _check_health(self, metrics: dict[str, HealthMetric]) -> None:
        unhealthy = self.watch(metrics)
        if metrics:
            values = {name: metric.value for name, metric in metrics.items()}
            bounds = self.watch.bounds(metrics)
            self.log.write("watch", self.budget.steps, **values, bounds=bounds)
        for line in unhealthy:
            self.log.warn(self.budget.steps, line)

    def step(self) -> None:
        """Take one step.

        1. Get a task from the strategy.
        2. Compute its pretraining loss and gradient.
        3. Take the step of the learner's optimizer.
        4. Update the state that follows it (EMA, centre).
        """
        self._schedule()  # first, since strategies read the learning rate of this step
        self.failures.prepare(lambda: fsdp.gathered(self.state_dict()))
        self.optimizer.zero_grad(set_to_none=True)
        with (
            self.execution.eager(),
            untouched(self.problem.learner, f"{type(self.strategy).__name__}.next_task"),
            self.passes.counter.on(),
        ):
            proposal = self.strategy.next_task(self.state)
        check_labels(self.strategy, proposal)
        self.steered.count(proposal)
        if proposal.warning:
            self.log.warn(self.budget.steps, proposal.warning)
        self.failures.count_update(proposal.record, proposal.task)
        with self.budget.timed("learner"):
            loss = self.execution.backward(proposal)
            grad_norm = self.execution.clip_gradients(self.optimizer, self.clip_norm)
            if torch.isfinite(grad_norm) and torch.isfinite(loss):
                before = self._before_step()
                with phase("optimizer"):
                    self.execution.take_step(self.optimizer)
                self._after_step(before)
                if proposal.task is not None:
                    with phase("ema"):
                        self.problem.after_step(proposal.task, self.budget.progress)
                self.failures.steps = 0
            else:
                self._skip(proposal.task, loss, grad_norm)
        self.budget.charge(
            steps=1,
            samples=collectives.total(proposal.num_samples),
            grad_evals=1 + self._passes_of(proposal),
        )
        self.budget.agree()
        if proposal.record:
            self.log.write("designer", self.budget.steps, **proposal.record)
            if warning := self.watch.check_regularizer(proposal.record):
                self.log.warn(self.budget.steps, warning)
        if self.budget.steps % self.log_every == 0 or self.budget.exhausted:
            self._log_train(float(loss), float(grad_norm))
        self.log.advance(self.budget)

    def _passes_of(self, proposal: Proposal) -> float:
        """Return what the strategy spent on this step, in passes of the learner's own batch."""
        if "grad_evals" in self.budget.limits:
            self.passes.require_layers(proposal)
        return self.passes.spent(proposal)

    @contextmanager
    def _measuring_passes(self) -> Iterator[None]:
        with self.budget.timed("probe"), self.execution.eager(), self.execution.fabric.autocast():
            yield

    def save(self) -> None:
        """Write a checkpoint, unless steps fail or the state is not finite.

        A bad checkpoint would replace good ones.
        """
        if self.checkpoints is None:
            return
        state = self.state_dict()
        bad = self._not_finite(state)
        fault = self.failures.in_a_row or (f"{bad} is not finite" if bad else None)
        if fault := collectives.any_of(fault):
            self.log.warn(self.budget.steps, f"no checkpoint of this step: {fault}")
        else:
            self.checkpoints.save(self.budget.steps, state)

    def _not_finite(self, state: Mapping[str, Any]) -> str | None:
        parts = {name: state[name] for name in ("problem", "optimizer", "strategy")}
        names = {
            f"problem.{part}.{name}"
            for part in ("learner", "designer")
            for name, _ in getattr(self.problem, part).named_parameters()
        }
        return not_finite(parts, names)

    def _schedule(self) -> None:
        factor = self.schedule(self.budget.steps, self.budget.progress)
        warming_up = self.budget.steps < self.head_warmup_steps
        for group, peak_lr in zip(self.optimizer.param_groups, self.peak_lr, strict=True):
            if warming_up:
                peak_lr = (self.head_warmup_lr or peak_lr) if group["warm"] else 0.0
            group["lr"] = peak_lr * factor
            group["max_grad_norm"] = self.clip_norm

    def _skip(self, task: Any, loss: torch.Tensor, grad_norm: torch.Tensor) -> None:
        what = "" if trees.is_finite(task) else ", and the designer's task is not finite either"
        self.log.warn(
            self.budget.steps,
            f"step skipped: loss {float(loss):.4g}, gradient norm {float(grad_norm):.4g}{what}",
        )
        self.execution.skip_step()
        self.failures.count_step(task, loss, grad_norm)

    def _before_step(self) -> Before | None:
        if not self.first_order_every or (self.budget.steps + 1) % self.first_order_every:
            return None
        with self.budget.timed("probe"), self.execution.eager():
            return self.first_order.before(self.optimizer)

    def _after_step(self, before: Before | None) -> None:
        if before is not None:
            with self.budget.timed("probe"), self.execution.eager():
                self.log.write(
                    "first_order", self.budget.steps + 1, **self.first_order.after(before)
                )

    def _log_metrics(self) -> None:
        """Write the metrics and their better directions as a probe record."""
        self.log.write(
            "probe",
            self.budget.steps,
            metrics=self.metrics,
            directions=dict(self.problem.metric_directions),
            targets=target_metrics(self.problem, self.metrics),
        )

    def _log_train(self, loss: float, grad_norm: float) -> None:
        budget = self.budget
        self.log.write(
            "train",
            budget.steps,
            loss=loss,
            grad_norm=grad_norm,
            lr=self.optimizer.param_groups[0]["lr"],
            samples=budget.samples,
            grad_evals=budget.grad_evals,
            seconds=budget.seconds,
            samples_per_s=budget.samples / max(budget.seconds, 1e-9),
            **self.steered.record(),
            **(self.problem.counters() if supports(self.problem, Reportable) else {}),
        )
        self.log.write("time", budget.steps, seconds=dict(budget.times))

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the run."""
        return {
            "problem": self.problem.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "precision": self.execution.precision.state_dict(),
            "strategy": self.strategy.state_dict(),
            "streams": {
                name: stream.state_dict() for name, stream in self.streams._asdict().items()
            },
            "budget": self.budget.state_dict(),
            "passes": self.passes.state_dict(),
            "first_order": self.first_order.state_dict(),
            "log": self.log.state_dict(),
            "failures": self.failures.state_dict(),
            "metrics": self.metrics,
            "measured_at": self.measured_at,
            "options": self.options,
            "watch": self.watch.state_dict(),
            "steered": self.steered.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        state = fsdp.scattered(state, self._layout())
        self.problem.load_state_dict(state["problem"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.execution.precision.load_state_dict(state["precision"])
        self.strategy.load_state_dict(state["strategy"])
        for name, stream in self.streams._asdict().items():
            stream.load_state_dict(state["streams"][name])
        self.budget.load_state_dict(state["budget"])
        self.passes.load_state_dict(state["passes"])
        self.first_order.load_state_dict(state["first_order"])
        self.failures.load_state_dict(state["failures"])
        self.metrics, self.measured_at = state["metrics"], state["measured_at"]
        self.watch.load_state_dict(state["watch"])
        self.steered.load_state_dict(state["steered"])

    def _layout(self) -> dict[str, Any]:
        """Return the sharded parts of `state_dict`.

        The optimizer is described by its parameters, since it has no state before its first step.
        """
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        return {
            "problem": self.problem.state_dict(),
            "optimizer": {"state": dict(enumerate(parameters))},
        }


def as_metrics(found: Mapping[str, Any], problem: str) -> dict[str, float]:
    """Convert the metrics of `evaluate` to Python floats. They may be of NumPy or torch.

    Args:
        found: The metrics by name.
        problem: The name of the problem, for errors.

    Raises:
        MetaVPTError: A metric is not a number.
    """
    if not isinstance(found, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise MetaVPTError(
            f"{problem}.evaluate returns {type(found).__name__}; it must map names to numbers"
        )
    metrics = {}
    for name, value in found.items():
        try:
            if isinstance(value, str | bytes):
                raise TypeError
            metrics[str(name)] = float(value)
        except (TypeError, ValueError, RuntimeError):
            raise MetaVPTError(
                f"{problem}.evaluate: the metric {name!r} is a {type(value).__name__}, not a number"
            ) from None
    return metrics


def _kind(value: object) -> str:
    """Return the class name, or that of the package's class that it extends."""
    classes = type(value).__mro__
    ours = (kind for kind in classes if kind.__module__.partition(".")[0] == "metavpt")
    return next(ours, classes[0]).__name__


def _check_at_least(least: float, **options: float) -> None:
    for name, value in options.items():
        if not value >= least:
            raise MetaVPTError(f"trainer.{name}={value} must be at least {least}")


def _default_optimizer(groups: list[dict[str, Any]]) -> Optimizer:
    return torch.optim.AdamW(groups, lr=1e-4)
