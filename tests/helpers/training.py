"""Short runs of a problem, and what their weights come to."""

import torch

from metavpt import Budget, Checkpoints, Cosine, Learned, OneStep, RunLog, Trainer
from metavpt.learners.vit import Trunk


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


def teacher_passes(trainer, steps):
    """How often the problem's teacher runs its trunk in each of the next steps."""
    (trunk,) = (m for m in trainer.problem.teacher.modules() if isinstance(m, Trunk))
    asked, counts = [], []
    handle = trunk.register_forward_hook(lambda *_: asked.append(None))
    for _ in range(steps):
        asked.clear()
        trainer.step()
        counts.append(len(asked))
    handle.remove()
    return counts


class Forgetful(Learned):
    """`Learned` whose problem's teacher is asked again in the learner's step."""

    def next_task(self, state):
        proposal = super().next_task(state)
        state.problem.teacher._known = []
        return proposal


def own_batch_run(folder, problem, kind=Learned, **options):
    """Five steps with updates on the learner's own batch in the first, third and fifth.

    Returns:
        The trainer, and the passes of the teacher in each step but the first, which checks the
        losses and measures the norm of the gradient.
    """
    strategy = kind(OneStep(Cosine()), adam, every=2, own_batch=True)
    trainer = Trainer(problem, strategy, Budget(steps=9), RunLog(folder), **options)
    trainer.step()
    return trainer, teacher_passes(trainer, steps=4)


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
