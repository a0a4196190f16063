"""Checkpoints and logs: what is saved, what a resumed run refuses, and what it mends."""

import copy
import json

import numpy as np
import pytest
import torch
from channels import Channels

from metavpt import (
    Budget,
    Checkpoints,
    Fixed,
    Learned,
    MetaVPTError,
    NonFiniteError,
    OneStep,
    RunLog,
    Trainer,
)
from metavpt.training.checkpoint import digest
from metavpt.training.streams import time_limit


def adam(parameters, lr=0.05):
    return torch.optim.Adam(parameters, lr=lr)


def adamw(groups, lr=1e-2):
    return torch.optim.AdamW(groups, lr=lr)


def trainer(folder, problem=None, strategy=None, steps=6, **options):
    torch.manual_seed(0)
    return Trainer(
        problem or Channels(),
        strategy or Learned(OneStep(), adam, every=2),
        Budget(steps=steps),
        RunLog(folder),
        Checkpoints(folder / "checkpoints"),
        **{"optimizer": adamw, "log_every": 1, "checkpoint_every": 3, **options},
    )


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def messages(folder):
    return [record["message"] for record in records(folder) if record["kind"] == "warning"]


@pytest.fixture
def run(tmp_path):
    """The folder of a run that stands at step 3 of 6."""
    trainer(tmp_path, steps=3).run()
    return tmp_path


# R1


class Breaks(Channels):
    """Its loss is NaN from one step on."""

    at = 5

    def __init__(self):
        super().__init__()
        self.steps = 0

    def after_step(self, task, progress):
        self.steps += 1

    def pretrain_loss(self, theta, task):
        return super().pretrain_loss(theta, task) * (float("nan") if self.steps >= self.at else 1)


def test_steps_that_fail_do_not_push_out_the_last_good_checkpoint(tmp_path):
    failing = trainer(tmp_path, Breaks(), Fixed(), steps=40, checkpoint_every=1, max_failures=10)
    with pytest.raises(NonFiniteError):
        failing.run()
    names = [path.name for path in Checkpoints(tmp_path / "checkpoints").paths()]
    assert names == ["step-00000004.pt", "step-00000005.pt"]
    assert any("no checkpoint" in message for message in messages(tmp_path))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_parameters_that_are_not_finite_are_not_saved(tmp_path, value):
    trained = trainer(tmp_path, steps=3)
    trained.run()
    with torch.no_grad():
        next(trained.problem.learner.parameters()).fill_(value)
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()}
    trained.budget.charge(steps=1)
    trained.save()
    assert before == {path: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()}
    assert "problem.learner.0.weight is not finite" in messages(tmp_path)[-1]


def test_a_buffer_may_hold_infinity(tmp_path):
    problem = Channels()
    problem.learner.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
    trainer(tmp_path, problem, steps=3).run()
    assert Checkpoints(tmp_path / "checkpoints").paths()


# R2


CHANGES = {
    "seed": ({"seed": 1}, "seed=0, now 1"),
    "learning rate": (
        {"optimizer": lambda groups: adamw(groups, 2e-2)},
        r"trainer\.optimizer\.lr=0\.01, now 0\.02",
    ),
    "optimizer": (
        {"optimizer": lambda groups: torch.optim.Adam(groups, lr=1e-2)},
        r"trainer\.optimizer=AdamW, now Adam;",
    ),
    "strategy": ({"strategy": Fixed()}, "strategy=Learned, now Fixed"),
    "designer's learning rate": (
        {"strategy": Learned(OneStep(), lambda p: adam(p, 0.1), every=2)},
        r"strategy\.optimizer\.lr=0\.05, now 0\.1",
    ),
    "clipping": ({"clip_norm": 2.0}, r"trainer\.clip_norm=1\.0, now 2\.0"),
}


@pytest.mark.parametrize(("options", "message"), CHANGES.values(), ids=CHANGES)
def test_a_checkpoint_of_other_options_is_refused_and_the_option_named(run, options, message):
    with pytest.raises(MetaVPTError, match=message):
        trainer(run, **options).resume()


def test_budget_and_periods_may_change_and_a_longer_run_goes_on(run):
    longer = trainer(run, steps=9, log_every=2, checkpoint_every=2, max_failures=3)
    longer.resume()
    longer.run()
    assert longer.budget.steps == 9
    probed = [record["step"] for record in records(run) if record["kind"] == "probe"]
    assert probed == [0, 3, 9]
    assert "learning rate" in messages(run)[0]


def test_a_run_resumed_beyond_its_budget_is_measured_where_it_stands(tmp_path):
    stopped = trainer(tmp_path, steps=6)
    for _ in range(3):
        stopped.step()
    stopped.save()
    shorter = trainer(tmp_path, steps=2)
    shorter.resume()
    shorter.run()
    assert (shorter.budget.steps, shorter.measured_at) == (3, 3)
    assert shorter.metrics == shorter.problem.evaluate()


# R5


def test_an_untouched_log_is_cut_to_the_checkpoint_without_a_word(run):
    before = (run / "metrics.jsonl").read_text()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 4}\n{"kind": "tr')
    resumed = trainer(run, steps=3)
    resumed.resume()
    assert (run / "metrics.jsonl").read_text() == before


def edited(data):
    return data.replace(b'"lr": 0.0', b'"lr": 9.0', 1)


DAMAGE = {
    "shorter": lambda data: data[: len(data) // 2],
    "gone": lambda data: b"",
    "edited": edited,
    "longer line": lambda data: data.replace(b'"step": 1,', b'"step": 1, "note": "mine",', 1),
    "broken line": lambda data: data.replace(b'{"kind"', b"{{{", 1),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_log_that_is_not_the_checkpoints_is_mended_with_a_warning(run, damage):
    path = run / "metrics.jsonl"
    data = damage(path.read_bytes())
    assert data != path.read_bytes()
    path.write_bytes(data + b'{"kind": "train", "step": 5}\n{"kind": "tr')
    resumed = trainer(run, steps=6)
    resumed.resume()
    (message,) = [m for m in messages(run) if "metrics.jsonl" in m]
    assert "checkpoint was saved" in message
    assert all(record["step"] <= 3 for record in records(run))
    kept = [line for line in data.splitlines(keepends=True) if line.startswith(b'{"kind"')]
    whole = [line for line in kept if line.endswith(b"\n")]
    assert path.read_bytes().startswith(b"".join(whole))
    resumed.run()
    assert records(run)[-1]["step"] == 6


# R8


def contents(run):
    (path,) = (run / "checkpoints").iterdir()
    return path, torch.load(path, weights_only=True)


def put(state, keys, value):
    for key in keys[:-1]:
        state = state[key]
    if value is None:
        del state[keys[-1]]
    else:
        state[keys[-1]] = value


WRONG = {
    "no budget": (["budget"], None),
    "no learner": (["problem", "learner"], None),
    "no problem": (["problem"], {}),
    "another entry": (["extra"], 1),
    "steps of text": (["budget", "steps"], "3"),
    "negative steps": (["budget", "steps"], -3),
    "steps of another checkpoint": (["budget", "steps"], 2),
    "samples of text": (["budget", "samples"], "many"),
    "infinite seconds": (["budget", "times"], {"learner": float("inf")}),
    "position that never comes": (["streams", "pretrain", "position"], 10**12),
    "feedback that never comes": (["streams", "feedback", "position"], 10**12),
    "negative position": (["streams", "pretrain", "position"], -1),
    "no epoch": (["streams", "pretrain", "epoch"], None),
    "weights of NaN": (["problem", "learner", "0.weight"], torch.full((4, 16), float("nan"))),
    "weights of another shape": (["problem", "learner", "0.weight"], torch.zeros(2, 2)),
    "weights of whole numbers": (["problem", "learner", "0.weight"], torch.ones(4, 16).int()),
    "weights of text": (["problem", "learner", "0.weight"], "heavy"),
    "moments of another shape": (["optimizer", "state", 0, "exp_avg"], torch.zeros(3)),
    "moments of one parameter lack": (["optimizer", "state", 0, "exp_avg"], None),
    "learning rate of text": (["optimizer", "param_groups", 0, "lr"], "fast"),
    "negative learning rate": (["optimizer", "param_groups", 0, "lr"], -1.0),
    "other betas": (["optimizer", "param_groups", 0, "betas"], (0.5, 0.5)),
    "no groups": (["optimizer", "param_groups"], []),
    "strategy of text": (["strategy"], "one_step"),
    "skipped of text": (["strategy", "num_skipped"], "none"),
    "metrics of text": (["metrics"], {"useful_mse": "low"}),
    "metrics no mapping": (["metrics"], [1.0]),
    "log of negative length": (["log", "bytes"], -5),
    "options no mapping": (["options"], "all"),
    "generator of text": (["random", "torch"], "state"),
    "generator of another length": (["random", "torch"], torch.zeros(3, dtype=torch.uint8)),
    "python's generator": (["random", "python"], (3, [1, 2], None)),
    "no generator": (["random"], None),
}


def resume_within(seconds, run):
    resumed = trainer(run)
    with time_limit(seconds, "HANGS"):
        resumed.resume()
        resumed.run()


@pytest.mark.parametrize(("keys", "value"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("consistent", [False, True], ids=["edited", "saved"])
def test_a_checkpoint_of_wrong_content_is_one_line(run, keys, value, consistent):
    """Edited in the file, or saved like that by other code, so that no sum tells."""
    path, state = contents(run)
    state = copy.deepcopy(state)
    put(state, keys, value)
    if consistent and "random" in state:
        del state["digest"]
        state["digest"] = digest(state)
    torch.save(state, path)
    with pytest.raises(MetaVPTError, match=path.name) as raised:
        resume_within(60, run)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("keys", [["metrics", "useful_mse"], ["budget", "samples"]])
def test_a_number_that_was_changed_in_a_checkpoint_is_noticed(run, keys):
    path, state = contents(run)
    put(state, keys, 7)
    torch.save(state, path)
    with pytest.raises(MetaVPTError, match="was changed since it was saved"):
        trainer(run).resume()


# What `evaluate` may return


class Measures(Channels):
    def __init__(self, metric):
        super().__init__()
        self.metric = metric

    def evaluate(self):
        return {"m": self.metric}


@pytest.mark.parametrize(
    "metric",
    [np.float32(0.5), np.array(0.5), torch.tensor(0.5), torch.tensor([0.5]), np.float64(0.5)],
)
def test_metrics_may_be_numbers_of_numpy_and_torch(tmp_path, metric):
    made = trainer(tmp_path, Measures(metric), steps=3)
    made.run()
    assert made.metrics == {"m": 0.5}
    assert type(made.metrics["m"]) is float
    assert [r["metrics"] for r in records(tmp_path) if r["kind"] == "probe"] == [{"m": 0.5}] * 2
    trainer(tmp_path, Measures(metric)).resume()


@pytest.mark.parametrize("metric", ["0.5", None, [0.5], {"a": 1}, torch.zeros(2)])
def test_a_metric_that_is_no_number_is_named(tmp_path, metric):
    with pytest.raises(MetaVPTError, match=r"Measures\.evaluate: the metric 'm' is a"):
        trainer(tmp_path, Measures(metric)).run()


# What is checked before step 0


BAD_OPTIONS = {
    "log_every": 0,
    "checkpoint_every": -1,
    "probe_every": -1,
    "first_order_every": -1,
    "max_failures": 0,
    "clip_norm": 0,
    "weight_decay": -0.1,
    "head_warmup_steps": -1,
    "accumulate": 0,
    "data_timeout": -1,
}


@pytest.mark.parametrize(("name", "value"), BAD_OPTIONS.items())
def test_an_option_of_the_trainer_out_of_range_is_named(tmp_path, name, value):
    with pytest.raises(MetaVPTError, match=rf"trainer\.{name}={value} must be"):
        trainer(tmp_path, **{name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": lambda groups: adamw(groups, -1)}, r"^trainer\.optimizer\.lr: .*-1"),
        (
            {"strategy": Learned(OneStep(), lambda p: adam(p, -1))},
            r"^strategy\.optimizer\.lr: .*-1",
        ),
        (
            {"optimizer": lambda groups: torch.nn.Linear(1, 1)},
            r"^trainer\.optimizer: .*not a Linear",
        ),
        ({"optimizer": "adamw"}, r"^trainer\.optimizer: .*not callable"),
    ],
)
def test_an_optimizer_that_cannot_be_made_is_named_by_its_key(tmp_path, options, message):
    with pytest.raises(MetaVPTError, match=message):
        trainer(tmp_path, **options)


class Watched(Channels):
    """Notes what is asked of it, in order."""

    def __init__(self, broken):
        super().__init__()
        self.broken, self.asked = broken, []

    def evaluate(self):
        self.asked.append("evaluate")
        return super().evaluate()

    def pretrain_batches(self, seed):
        return self._batches("pretrain", super().pretrain_batches(seed))

    def feedback_batches(self, seed):
        return self._batches("feedback", super().feedback_batches(seed))

    def _batches(self, name, batches):
        if self.broken == name:
            raise MetaVPTError(f"{name} is broken")
        yield from batches


@pytest.mark.parametrize("broken", ["pretrain", "feedback"])
def test_data_that_cannot_be_read_end_a_run_before_step_0_is_measured(tmp_path, broken):
    problem = Watched(broken)
    with pytest.raises(MetaVPTError, match=f"{broken} is broken"):
        trainer(tmp_path, problem, Learned(OneStep(), adam, every=2, burn_in=3)).run()
    assert problem.asked == []


def test_the_batch_that_was_checked_is_the_first_one_trained_on(tmp_path):
    checked, plain = trainer(tmp_path / "a"), trainer(tmp_path / "b")
    checked.check()
    checked.check()
    for made in (checked, plain):
        for name, stream in made.streams._asdict().items():
            first, second = next(stream), next(stream)
            assert stream.position == 2, name
            made.drawn = [*getattr(made, "drawn", []), first, second]
    flat = [torch.utils._pytree.tree_leaves(made.drawn) for made in (checked, plain)]
    for a, b in zip(*flat, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
