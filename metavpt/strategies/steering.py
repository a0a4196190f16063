"""Steering for a training loop of your own: an unlabelled batch in, the designed task out."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from metavpt.errors import MetaVPTError
from metavpt.hypergradients import params
from metavpt.hypergradients.params import Params
from metavpt.problem import Problem
from metavpt.strategies.learned import Learned
from metavpt.training.budget import Budget
from metavpt.training.schedule import Period
from metavpt.training.strategy import LearnerPasses, Strategy, TrainState
from metavpt.training.streams import Stream, Streams


class Steering:
    """Updates a designer when it is due, and turns batches into tasks, inside any training loop.

    The loop stays yours: compute the pretraining loss of the returned task, call `backward`, and
    step your optimizer. Labels never reach the learner.

    Args:
        learner: The model that your loop trains.
        designer: designer(batch) returns a task, differentiable by its parameters.
        pretrain_loss: pretrain_loss(theta, task), a scalar. It evaluates the learner with the
            parameters `theta`, see `torch.func.functional_call`.
        feedback_loss: feedback_loss(theta, labelled_batch), a scalar.
        feedback: Labelled batches. They are iterated again when they end, so a generator that
            ends is not enough.
        optimizer: The learner's optimizer, which your loop steps. Strategies read it.
        strategy: Who updates the designer. Default: `Learned()`.
        aligned_parameters: Names of theta_S. Default: all parameters of the learner.
        regularizer: regularizer(task), a scalar for the designer's loss. Default: none.

    Example:
        >>> steering = Steering(model, designer, pretrain_loss, feedback_loss, labelled, optimizer)
        >>> for batch in unlabelled:
        ...     loss = pretrain_loss(named(model), steering(batch))
        ...     optimizer.zero_grad(), loss.backward(), optimizer.step()
    """

    def __init__(
        self,
        learner: nn.Module,
        designer: nn.Module,
        pretrain_loss: Callable[[Params, Any], Tensor],
        feedback_loss: Callable[[Params, Any], Tensor],
        feedback: Iterable[Any],
        optimizer: Optimizer,
        strategy: Strategy | None = None,
        aligned_parameters: Sequence[str] | None = None,
        regularizer: Callable[[Any], Tensor] | None = None,
    ) -> None:
        if iter(feedback) is feedback:
            raise MetaVPTError(
                "Steering: feedback is an iterator, which ends; give a list or a DataLoader"
            )
        self.problem = _Closures(
            learner,
            designer,
            pretrain_loss,
            feedback_loss,
            feedback,
            aligned_parameters,
            regularizer,
        )
        self.strategy: Strategy = strategy or Learned()
        self.optimizer = optimizer
        self.budget = Budget(steps=10**12)  # counts; your loop decides when to stop
        self.record: dict[str, float] = {}
        self._current = _Current()
        self._feedback = Stream(self.problem.feedback_batches, 0, "feedback")
        self._check_strategy()
        self._passes = LearnerPasses(self.problem)
        self.strategy.start(self.problem)

    def _check_strategy(self) -> None:
        """Raise MetaVPTError for a strategy that needs what only the trainer has."""
        name = type(self.strategy).__name__
        if getattr(self.strategy, "trains_on_labels", False):
            raise MetaVPTError(
                f"Steering: {name} trains the learner on labels, which your loop does"
            )
        period = getattr(self.strategy, "period", None)
        if isinstance(period, Period) and period.start is None:
            raise MetaVPTError(
                f"Steering: burn_in={period.burn_in} is a share of a budget, which your own loop "
                "does not state; give a number of steps"
            )

    def __call__(self, batch: Any) -> Any:
        """Return the task of an unlabelled batch, detached from the designer.

        Call it once per step of the learner. `record` then holds the measurements of the
        designer's update, and is empty if there was none.
        """
        self._current.batch = batch
        own = cast(Stream, self._current)
        streams = Streams(pretrain=own, meta=own, feedback=self._feedback)
        state = TrainState(self.problem, streams, self.optimizer, self.budget)
        with self._passes.counter.on():
            proposal = self.strategy.next_task(state)
        spent = self._passes.spent(proposal)
        self.budget.charge(steps=1, samples=proposal.num_samples, grad_evals=1 + spent)
        self.record = proposal.record
        return proposal.task

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed loop needs besides the learner and its optimizer."""
        return {
            "designer": self.problem.designer.state_dict(),
            "strategy": self.strategy.state_dict(),
            "budget": self.budget.state_dict(),
            "passes": self._passes.state_dict(),
            "feedback": self._feedback.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.problem.designer.load_state_dict(state["designer"])
        self.strategy.load_state_dict(state["strategy"])
        self.budget.load_state_dict(state["budget"])
        self._passes.load_state_dict(state["passes"])
        self._feedback.load_state_dict(state["feedback"])


class _Current:
    """A stream that gives the batch at hand, again and again."""

    batch: Any = None

    def __next__(self) -> Any:
        return self.batch


class _Closures(Problem):
    """A problem made of functions, for a loop that brings its own batches."""

    def __init__(
        self,
        learner: nn.Module,
        designer: nn.Module,
        pretrain_loss: Callable[[Params, Any], Tensor],
        feedback_loss: Callable[[Params, Any], Tensor],
        feedback: Iterable[Any],
        aligned: Sequence[str] | None,
        regularizer: Callable[[Any], Tensor] | None,
    ) -> None:
        self.learner, self.designer = learner, designer
        self._pretrain, self._feedback_loss, self._feedback = pretrain_loss, feedback_loss, feedback
        self._aligned, self._regularizer = aligned, regularizer

    def pretrain_batches(self, seed: int) -> Iterable[Any]:
        raise MetaVPTError("Steering: the loop brings the unlabelled batches")

    def feedback_batches(self, seed: int) -> Iterable[Any]:
        return self._feedback

    def pretrain_loss(self, theta: Params, task: Any) -> Tensor:
        return self._pretrain(theta, task)

    def feedback_loss(self, theta: Params, batch: Any) -> Tensor:
        return self._feedback_loss(theta, batch)

    def evaluate(self) -> dict[str, float]:
        return {}

    def aligned_parameters(self) -> Sequence[str]:
        return self._aligned if self._aligned is not None else list(params.named(self.learner))

    def regularizer(self, task: Any) -> Tensor | None:
        return self._regularizer(task) if self._regularizer else None
