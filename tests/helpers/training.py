"""Short runs of a problem, and what their weights come to."""

import torch

from metavpt import Budget, Checkpoints, RunLog, Trainer


def adam(parameters, lr=1e-2):
    return torch.optim.Adam(parameters, lr=lr)


def train(folder, problem, strategy, steps, resume=False, seed=0):
    """A run of `steps` steps with a checkpoint after each; `resume` continues from the newest.

    It draws no pictures, which take longer than the steps and have tests of their own.
    """
    checkpoints = Checkpoints(folder / "checkpoints")
    trainer = Trainer(
        problem,
        strategy,
        Budget(steps=steps),
        RunLog(folder),
        checkpoints,
        seed=seed,
        log_every=1,
        checkpoint_every=1,
    )
    if resume:
        trainer.resume()
    problem.figures = dict
    trainer.run()
    del problem.figures  # that of the class again
    return trainer


def weights(problem):
    """Of learner, teacher and designer, copied."""
    parts = {
        name: getattr(problem, name).state_dict()
        for name in ("learner", "teacher", "designer")
        if hasattr(problem, name)
    }
    return {
        f"{part}.{name}": value.clone()
        for part, state in parts.items()
        for name, value in state.items()
    }


def assert_identical(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
