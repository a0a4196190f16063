"""Run the benchmark: tune each solver, run all on fresh seeds, write rows, a table and a figure.

    PYTHONPATH=examples python -m bilevel_benchmark OUT --checkout PATH --peers-python PATH

Without `--checkout` metavpt's own solvers run alone. One thread; seeds in the outer loop. Set
OMP_NUM_THREADS=1.
"""

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bilevel_benchmark.problems import PROBLEMS, Bilevel, draw, state
from bilevel_benchmark.solvers import SOLVERS
from bilevel_benchmark.table import figure, table

TUNING_SEED = 100
# As in the benchmark's configurations, per problem: step sizes, and ratios of inner to outer ones.
STEPS = {
    "quadratic": ([0.1, 0.5], [0.3, 1.0]),
    "breast_cancer": ([0.1, 0.5], [0.03, 0.3]),
    "generated": ([0.1, 0.5], [0.03, 0.3]),
    "cleaning": ([0.1, 1.0], [1e-4, 1e-3]),
}
PEERS = ("soba", "saba", "amigo", "jaxopt_gd")
Settings = dict[str, Any]
Job = tuple[str, Settings]
Curve = list[dict[str, float | None]]


def grid(problem: str, solver: str) -> list[Settings]:
    """Return the settings that a solver is tuned over: eight, or one for `implicit`."""
    steps, ratios = STEPS[problem]
    if solver == "metavpt implicit":
        return [{}]
    if solver.startswith("jaxopt"):  # has an outer step size alone
        fixed = {"inner_solver": "lbfgs", "n_inner_steps": 100}
        outer = np.geomspace(min(steps) / max(ratios), max(steps) / min(ratios), 8)
        return [{"step_size_outer": float(size), **fixed} for size in outer]
    tried = itertools.product(steps, ratios, (64, "full"))
    if solver.startswith("metavpt"):
        return [
            {"step_size": step, "ratio": ratio, "seed": TUNING_SEED,
             "batch": None if size == "full" else size}
            for step, ratio, size in tried
        ]  # fmt: skip
    # The clock is read after so many steps: they are one compiled call.
    reads = {64: 128, "full": 16} if solver in ("soba", "saba") else {64: 16, "full": 2}
    return [
        {"step_size": step, "outer_ratio": ratio, "random_state": TUNING_SEED,
         "batch_size": size, "eval_freq": reads[size]}
        for step, ratio, size in tried
    ]  # fmt: skip


def write_problem(name: str, seed: int, path: Path) -> None:
    """Write data and start, with losses and gradients at a point to check another statement by."""
    arrays = draw(name, seed)
    problem = state(name, arrays, torch.float64)
    generator = torch.Generator().manual_seed(0)
    theta, phi = (
        (start + 0.1 * torch.randn(start.shape, generator=generator)).requires_grad_()
        for start in (problem.theta0, problem.phi0)
    )
    checks = {"check_theta": theta, "check_phi": phi}
    for level, rows in itertools.product(("inner", "outer"), (slice(0, 64), None)):
        value = getattr(problem, level)(theta, phi, rows)
        gradients = torch.autograd.grad(value, (theta, phi), materialize_grads=True)
        key = f"check_{level}_{'all' if rows is None else 'batch'}"
        checks[key] = torch.cat([value[None], *gradients])
    found = {key: value.detach().float().numpy() for key, value in checks.items()}
    np.savez(path, **arrays, **found)  # pyright: ignore[reportArgumentType]


class Runner:
    """Starts solvers, in one process at a time.

    Args:
        checkout: Of benchmark_bilevel; None runs no peers.
        python: The interpreter of the peers.
        folder: For what the processes write.
    """

    def __init__(self, checkout: Path | None, python: Path | None, folder: Path) -> None:
        self.checkout, self.python, self.folder = checkout, python, folder
        self.solvers = [f"metavpt {name}" for name in SOLVERS] + list(PEERS if checkout else ())
        self.env = {
            **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1]),
            "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
            "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(folder / "jax"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }  # fmt: skip

    def write(self, name: str, seed: int) -> None:
        """Write the problem that the processes read next."""
        write_problem(name, seed, self.folder / "problem.npz")

    def __call__(self, problem: str, seconds: float, jobs: list[Job]) -> list[Curve]:
        """Run solvers one after the other on the last problem written; return their curves.

        metavpt's share a process, and the peers another.
        """
        stated = state(problem, dict(np.load(self.folder / "problem.npz")), torch.float64)
        curves: dict[int, Curve] = {}
        for is_peer in (False, True):
            which = [k for k, (solver, _) in enumerate(jobs) if (solver in PEERS) == is_peer]
            if not which:
                continue
            if is_peer:
                head = [str(self.python), "-m", "bilevel_benchmark.peers", str(self.checkout)]
            else:
                head = [sys.executable, "-m", "bilevel_benchmark.solvers"]
            given = [(jobs[k][0].removeprefix("metavpt "), jobs[k][1]) for k in which]
            out = self.folder / "run"
            file = str(self.folder / "problem.npz")
            command = [*head, problem, file, str(seconds), json.dumps(given), str(out)]
            done = subprocess.run(
                command, env=self.env, capture_output=True, text=True, check=False
            )
            if done.returncode:
                sys.exit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
            for place, k in enumerate(which):
                path = Path(f"{out}.{place}.npz")
                curves[k] = curve(stated, dict(np.load(path)))
                path.unlink()
        return [curves[k] for k in range(len(jobs))]


def curve(problem: Bilevel, found: dict[str, np.ndarray]) -> Curve:
    """Solve the inner problem at every snapshot of a run: value, test error, and their cost."""
    rows, theta = Curve(), None
    for seconds, wall, evaluations, phi in zip(
        found["seconds"], found["wall"], found["evaluations"], found["phi"], strict=True
    ):
        try:
            value, theta = problem.value(torch.from_numpy(phi), theta)
        except (ArithmeticError, ValueError):  # phi has run away
            value, theta = float("inf"), None
        error = None if theta is None or problem.test_error is None else problem.test_error(theta)
        rows.append({
            "seconds": round(float(seconds), 4),
            "wall_seconds": round(float(wall), 4),
            "evaluations": None if np.isnan(evaluations) else float(evaluations),
            "value": value if np.isfinite(value) else None,
            "test_error": error,
        })  # fmt: skip
    return rows


def score(rows: Curve, best: float) -> float:
    """Return the mean log suboptimality over the snapshots, which are evenly spread in log time."""
    start = rows[0]["value"]
    assert start is not None
    reached, gaps = 1.0, list[float]()
    for row in rows:
        if row["value"] is not None:
            reached = min(reached, (row["value"] - best) / (start - best))
        gaps.append(np.log(max(reached, 1e-6)))
    last = rows[-1]["value"]  # a run that ends above its start has diverged
    return float("inf") if last is None or last > start else float(np.mean(gaps))


def tune(run: Runner, names: list[str], seconds: float) -> dict[str, dict[str, Settings]]:
    """Choose the settings of each solver on the tuning seed, by `score`."""
    chosen: dict[str, dict[str, Settings]] = {}
    for name in names:
        run.write(name, TUNING_SEED)
        jobs = [(solver, each) for solver in run.solvers for each in grid(name, solver)]
        curves = run(name, seconds, jobs)
        best, least = lowest(curves), dict[str, float]()
        chosen[name] = {}
        for (solver, settings), rows in zip(jobs, curves, strict=True):
            if solver not in least or score(rows, best) < least[solver]:
                least[solver], chosen[name][solver] = score(rows, best), settings
        print(f"{name}: tuned, {least}", flush=True)
    return chosen


def lowest(curves: list[Curve]) -> float:
    """Return the least value that any run reached."""
    return min(row["value"] for rows in curves for row in rows if row["value"] is not None)


def measure(
    run: Runner, names: list[str], seeds: list[int], seconds: float,
    chosen: dict[str, dict[str, Settings]], path: Path,
) -> None:  # fmt: skip
    """Append a row to `path` for each run that it does not hold yet."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    have = {(row["problem"], row["seed"], row["solver"]) for row in rows}
    for seed, name in itertools.product(seeds, names):
        jobs = [
            (solver, settings | {key: seed for key in settings if key in ("seed", "random_state")})
            for solver, settings in chosen[name].items()
            if solver in run.solvers and (name, seed, solver) not in have
        ]
        if not jobs:
            continue
        run.write(name, seed)
        with path.open("a") as file:
            for (solver, settings), rows in zip(jobs, run(name, seconds, jobs), strict=True):
                row = {"problem": name, "seed": seed, "solver": solver, "settings": settings}
                file.write(json.dumps({**row, "curve": rows}) + "\n")
        print(f"{name}, seed {seed}: done", flush=True)


def environment(run: Runner) -> dict[str, Any]:
    """Return versions of what ran, and the processor."""
    names = ("torch", "numpy", "scipy", "scikit-learn")
    found: dict[str, Any] = {"python": platform.python_version(), "machine": platform.machine()}
    found.update({name: version(name) for name in names})
    if run.checkout is not None:
        code = "from importlib.metadata import version as v; print(*(f'{n}={v(n)}' for n in "
        code += "('jax', 'jaxlib', 'jaxopt', 'benchopt')))"
        shown = subprocess.run(
            [str(run.python), "-c", code], capture_output=True, text=True, check=True
        )
        found.update(pair.split("=") for pair in shown.stdout.split())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="bilevel_benchmark", description=__doc__)
    parser.add_argument("out", type=Path, help="folder of settings.json, rows.jsonl and table.md")
    parser.add_argument("--checkout", type=Path, help="a checkout of benchopt/benchmark_bilevel")
    parser.add_argument("--peers-python", type=Path, help="interpreter with jax, jaxopt, benchopt")
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=2.0, help="CPU seconds of each run")
    parser.add_argument("--tuning-seconds", type=float, default=0.3, help="of each setting tried")
    given = parser.parse_args()
    if (given.checkout is None) != (given.peers_python is None):
        parser.error("--checkout and --peers-python go together")
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        run = Runner(given.checkout, given.peers_python, Path(folder))
        path = given.out / "settings.json"
        chosen = json.loads(path.read_text()) if path.exists() else {}
        missing = [name for name in given.problems if name not in chosen]
        chosen.update(tune(run, missing, given.tuning_seconds))
        path.write_text(json.dumps(chosen, indent=1) + "\n")
        measure(run, given.problems, given.seeds, given.seconds, chosen, given.out / "rows.jsonl")
        (given.out / "environment.json").write_text(json.dumps(environment(run), indent=1) + "\n")
    rows = [json.loads(line) for line in (given.out / "rows.jsonl").read_text().splitlines()]
    (given.out / "table.md").write_text(table(rows))
    figure(rows, given.out / "curves.svg")
    print((given.out / "table.md").read_text())


if __name__ == "__main__":
    main()
