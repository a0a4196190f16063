"""Runs that end on something not finite, and the step that ended them taken again."""

import math

import pytest
import torch
from channels import Channels
from helpers import command_process
from torch import nn
from torch.func import functional_call

from metavpt import Budget, Learned, MetaVPTError, NonFiniteError, OneStep, RunLog, Trainer
from metavpt.debug.command import replay
from metavpt.training import checkpoint

BAD_FROM = 5  # the first batch that is not as it should be


class Broken(Channels):
    """Batches from `BAD_FROM` on are those of `damage`."""

    def damage(self, x):
        return x

    def pretrain_batches(self, seed):
        for k, x in enumerate(super().pretrain_batches(seed)):
            yield self.damage(x) if k >= BAD_FROM else x

    def feedback_batches(self, seed):
        return ((x, x[:, :4]) for x in Channels.pretrain_batches(self, seed))


class BadData(Broken):
    def damage(self, x):
        return x.where(torch.arange(16) != 3, math.nan)


class Overflow(Broken):
    def damage(self, x):
        return 3e38 * x.sign()


class RootOfZero(Broken):
    """A finite loss with a non-finite gradient: the slope of a root at 0 times that of a square."""

    def damage(self, x):
        return torch.zeros_like(x)

    def pretrain_loss(self, theta, task):
        hidden = functional_call(self.learner[0], {"weight": theta["0.weight"]}, (task[0],))
        return super().pretrain_loss(theta, task) + hidden.square().sum().sqrt()

    def __init__(self):
        super().__init__()
        self.learner[0] = nn.Linear(16, 4, bias=False)

    def meta_batches(self, seed):
        return Channels.pretrain_batches(self, seed)


class LogDesigner(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, batch):
        return batch, (self.scale * batch.abs().max(dim=0).values.neg().add(100).log())


class BadDesigner(Broken):
    """A designer that takes the logarithm of a negative number."""

    def __init__(self):
        super().__init__()
        self.designer = LogDesigner()

    def damage(self, x):
        return 200 + x


class BadLabels(Broken):
    def feedback_batches(self, seed):
        return ((x, y * math.nan) for x, y in super().feedback_batches(seed))


class BadRegularizer(Broken):
    def regularizer(self, task):
        return (task[1].detach() - task[1]).sqrt().sum()


def trainer(folder, kind, **options):
    torch.manual_seed(0)
    strategy = Learned(OneStep(), lambda p: torch.optim.Adam(p, lr=0.01), every=2)
    return Trainer(kind(), strategy, Budget(steps=50), RunLog(folder), max_failures=3, **options)


def failed(folder, kind):
    """The message that the run ends with."""
    with pytest.raises(NonFiniteError) as error:
        trainer(folder, kind).run()
    return str(error.value)


CASES = {
    BadData: [
        "the output of designer (ChannelWeights), of an input that is not finite either",
        "the task that the learner is given",
    ],
    Overflow: ["the output of learner.0 (Linear)", "the pretraining loss"],
    RootOfZero: ["the gradient: Function 'PowBackward0' returned nan", "the gradient of 0.weight"],
    BadDesigner: ["the output of designer (LogDesigner)", "the task that the learner is given"],
    BadLabels: ["the designer update: the feedback loss is nan"],
    BadRegularizer: [
        "the designer update: the gradient of the designer's regularizer is not finite"
    ],
}


@pytest.mark.parametrize(
    ("kind", "findings"), CASES.items(), ids=lambda value: getattr(value, "__name__", None)
)
def test_the_step_that_ended_a_run_is_reproduced_and_its_beginning_named(tmp_path, kind, findings):
    message = failed(tmp_path / "run", kind)
    assert (
        "3 updates in a row" in message
        if kind in (BadLabels, BadRegularizer)
        else "3 steps in a row" in message
    )
    assert f"python -m metavpt.debug run={tmp_path / 'run'}" in message
    found = replay(trainer(tmp_path / "again", kind), tmp_path / "run" / "failure.pt")
    assert found.is_reproduced
    assert found.same_task
    for line, beginning in zip(found.findings, findings, strict=False):
        assert line.startswith(beginning)
    assert len(found.findings) >= len(findings)
    if kind in (BadData, Overflow, RootOfZero, BadDesigner):
        assert found.step == BAD_FROM + 2


def test_nothing_of_the_learner_is_changed_by_steps_that_fail(tmp_path):
    run = trainer(tmp_path, BadData)
    with pytest.raises(NonFiniteError):
        run.run()
    before = checkpoint.read(tmp_path / "failure.pt")["trainer"]["problem"]["learner"]
    assert all(torch.equal(p, before[name]) for name, p in run.problem.learner.state_dict().items())
    assert all(torch.isfinite(p).all() for p in run.problem.designer.parameters())


def test_one_bad_step_among_good_ones_is_skipped_and_leaves_no_file(tmp_path):
    class Once(Channels):
        def pretrain_batches(self, seed):
            return (
                x * math.nan if k % 3 == 1 else x
                for k, x in enumerate(super().pretrain_batches(seed))
            )

        def meta_batches(self, seed):
            return Channels.pretrain_batches(self, seed)

        def feedback_batches(self, seed):
            return ((x, x[:, :4]) for x in Channels.pretrain_batches(self, seed))

    run = trainer(tmp_path, Once)
    run.run()
    assert not (tmp_path / "failure.pt").exists()
    warnings = [record["message"] for record in run.log.records() if record["kind"] == "warning"]
    assert len(warnings) == 17
    assert "the designer's task is not finite either" in warnings[0]


def test_other_data_than_in_the_run_are_noticed_and_the_saved_task_is_taken(tmp_path):
    class Changed(BadData):
        def damage(self, x):
            return x

    failed(tmp_path / "run", BadData)
    found = replay(trainer(tmp_path / "again", Changed), tmp_path / "run" / "failure.pt")
    assert not found.same_task
    assert found.is_reproduced


def test_the_failure_of_another_model_or_of_no_run_is_named(tmp_path):
    failed(tmp_path / "run", BadData)
    with pytest.raises(MetaVPTError, match="another model or configuration"):
        replay(trainer(tmp_path / "again", BadDesigner), tmp_path / "run" / "failure.pt")
    checkpoint.write(tmp_path / "other.pt", {"value": 1})
    with pytest.raises(MetaVPTError, match=r"other\.pt"):
        replay(trainer(tmp_path / "again", BadData), tmp_path / "other.pt")


def test_the_command_replays_a_run_by_its_folder(tmp_path):
    options = [
        "problem=toy_sources",
        "strategy=fixed",
        "trainer.optimizer.lr=1e30",
        "trainer.max_failures=2",
        "budget.steps=50",
        "output=run",
    ]
    status, output = command_process.finish(tmp_path, *options, "threads=1")
    assert status == 2
    assert "python -m metavpt.debug run=run" in output
    status, output = command_process.finish(tmp_path, "run=run", module="debug")
    assert status == 0
    assert "reproduced: yes" in output
    assert "first not finite: " in output
