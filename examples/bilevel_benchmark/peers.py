"""A solver of a checkout of benchopt/benchmark_bilevel on one of our problems, in JAX.

    python -m bilevel_benchmark.peers CHECKOUT PROBLEM FILE.npz SECONDS JOBS OUT

Runs in an environment with jax, jaxopt and benchopt; neither torch nor metavpt is needed. The
solver's code is the checkout's own. The losses are those of `problems.py`, which `losses_agree`
checks against what the file holds.
"""

import importlib.util
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_benchmark.record import Recorder

Loss = Callable[..., jax.Array]


def losses(name: str, data: dict[str, jax.Array]) -> tuple[Loss, Loss, int, int]:
    """Return the inner and the outer loss with their numbers of samples.

    A loss maps (theta, phi, start, batch_size) to the mean loss of these samples.
    """
    part = "a" if name == "quadratic" else "y"
    num = {level: len(data[f"{level}_{part}"]) for level in ("inner", "outer")}
    mean = {key: value.mean(0) for key, value in data.items() if name == "quadratic"}

    def rows(array: jax.Array, start: int, batch_size: int) -> jax.Array:
        if batch_size == len(array):
            return array
        return jax.lax.dynamic_slice_in_dim(array, start, batch_size)

    def quadratic(level: str, theta: jax.Array, phi: jax.Array, start: int, size: int) -> jax.Array:
        a, b, c, linear, phi_linear = (
            mean[f"{level}_{part}"]
            if size == num[level]
            else rows(data[f"{level}_{part}"], start, size).mean(0)
            for part in ("A", "B", "C", "a", "b")
        )
        return (a @ theta / 2 + phi @ c + linear) @ theta + (b @ phi / 2 + phi_linear) @ phi

    def logistic(level: str, theta: jax.Array, phi: jax.Array, start: int, size: int) -> jax.Array:
        x, y = (rows(data[f"{level}_{part}"], start, size) for part in "xy")
        penalty = (jnp.exp(phi) * theta * theta).sum() / 2 if level == "inner" else 0.0
        return jax.nn.softplus(-y * (x @ theta)).mean() + penalty

    def cleaning(level: str, theta: jax.Array, phi: jax.Array, start: int, size: int) -> jax.Array:
        x, y = (rows(data[f"{level}_{part}"], start, size) for part in "xy")
        each = -(y * jax.nn.log_softmax(x @ theta.reshape(x.shape[1], 10))).sum(1)
        if level == "outer":
            return each.mean()
        weights = jax.nn.sigmoid(rows(phi, start, size))
        return (weights * each).mean() + data["penalty"] * (theta * theta).sum()

    form = {"quadratic": quadratic, "cleaning": cleaning}.get(name, logistic)

    def of(level: str) -> Loss:
        @partial(jax.jit, static_argnames="batch_size")
        def loss(
            theta: jax.Array, phi: jax.Array, start: int = 0, batch_size: int = 1
        ) -> jax.Array:
            return form(level, theta, phi, start, batch_size)

        return loss

    return of("inner"), of("outer"), num["inner"], num["outer"]


def losses_agree(
    inner: Loss, outer: Loss, num_inner: int, num_outer: int, held: dict[str, np.ndarray]
) -> None:
    """Stop unless losses and gradients are those of `problems.py`, at one point and batch."""
    theta, phi = jnp.asarray(held["check_theta"]), jnp.asarray(held["check_phi"])
    for level, loss, num in (("inner", inner, num_inner), ("outer", outer, num_outer)):
        for size in (64, num):
            value, gradients = jax.value_and_grad(loss, (0, 1))(theta, phi, 0, batch_size=size)
            found = np.concatenate([value[None], *gradients])
            wanted = held[f"check_{level}_{'all' if size == num else 'batch'}"]
            if not np.allclose(found, wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max()):
                sys.exit(f"peers: the {level} loss of {size} samples is not that of problems.py")


def evaluations_per_step(solver: str, settings: dict[str, Any]) -> float | None:
    """Return the gradients of a batch that one outer step takes; a product counts as two.

    Read off the solvers' code; None where the number depends on the data.
    """
    inner, series = settings.get("n_inner_steps", 10), settings.get("n_shia_steps", 10)
    return {
        "soba": 1 + 2 + 1,
        "saba": 1 + 2 + 1,
        "amigo": inner + 1 + 2 * inner + 2,
        "stocbio": inner + 1 + 2 * series + 2,
        "f2sa": 3 * inner + 3,
    }.get(solver)


def run(
    checkout: Path, problem: str, file: str, name: str, settings: dict[str, Any], record: Recorder
) -> None:
    """Run solver `name` of the checkout until the recorder's time is over."""
    spec = importlib.util.spec_from_file_location(name, checkout / "solvers" / f"{name}.py")
    if spec is None or spec.loader is None:
        sys.exit(f"peers: no solver {name} in {checkout}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    held = dict(np.load(file))
    data = {key: jnp.asarray(held[key]) for key in held if not key.startswith(("check", "test"))}
    inner, outer, num_inner, num_outer = losses(problem, data)
    losses_agree(inner, outer, num_inner, num_outer, held)
    solver = module.Solver.get_instance(**settings)
    solver.set_objective(
        f_inner=inner, f_outer=outer, n_inner_samples=num_inner, n_outer_samples=num_outer,
        inner_var0=data["theta0"], outer_var0=data["phi0"],
    )  # fmt: skip
    per_step = evaluations_per_step(name, settings)
    batch = settings.get("batch_size", "full")
    samples = (num_inner if batch == "full" else batch) * settings.get("eval_freq", 1)
    rounds = -1

    def callback() -> bool:
        nonlocal rounds
        rounds += 1
        phi = solver.outer_var if rounds else data["phi0"]
        return record(phi, rounds * samples * per_step if per_step else float("nan"))

    record.start()
    solver.run(callback)


def main(checkout: str, problem: str, file: str, seconds: str, jobs: str, out: str) -> None:
    """Run each solver with its settings; it compiles before its clock starts."""
    sys.path.insert(0, checkout)
    for k, (solver, settings) in enumerate(json.loads(jobs)):
        record = Recorder(float(seconds))
        run(Path(checkout), problem, file, solver, settings, record)
        record.save(f"{out}.{k}.npz")


if __name__ == "__main__":
    main(*sys.argv[1:])
