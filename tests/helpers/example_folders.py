"""Folders of a run and of a comparison with made-up numbers and pictures, for report tests."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from metavpt.compare import results
from metavpt.compare.results import Result
from metavpt.report.rows import run_folder

METRICS = {
    "ridge/depth_rmse": 1.30,
    "ridge/depth_delta1": 0.40,
    "ridge/seg_miou": 0.056,
    "imagenet/linear_acc": 0.31,
}
DIRECTIONS = {
    "ridge/depth_rmse": "lower",
    "ridge/depth_delta1": "higher",
    "ridge/seg_miou": "higher",
    "imagenet/linear_acc": "higher",
}
STEERED = ["ridge/depth_rmse", "ridge/depth_delta1", "ridge/seg_miou"]
GAINS = {  # of each metric in the end
    "fixed": (-0.004, 0.004, 0.001, 0.001),
    "greedy": (-0.006, 0.005, 0.001, 0.001),
    "random_feedback": (-0.004, 0.004, 0.001, 0.001),
    "uniform": (-0.001, 0.002, 0.0005, 0.001),
    "one_step": (-0.016, 0.013, 0.004, 0.002),
    "unrolled": (-0.020, 0.017, 0.003, -0.009),
    "implicit": (-0.010, 0.008, 0.005, 0.002),
}
STEPS, EVERY, BATCH = 400, 80, 64
ENVIRONMENT = {
    "command": "python -m metavpt.compare problem=dino_rooms",
    "python": "3.11.7",
    "torch": "2.14.0",
    "gpu": None,
    "threads": 2,
}
CONFIG = (
    "problem:\n  _target_: metavpt.problems.dino_dense.DinoDense\nstrategy: one_step\n"
    "match: steps\nbudget:\n  steps: 400\n"
)


def write_run(folder: Path, records: list[dict[str, Any]], figures: bool = True) -> Path:
    (folder / "figures").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    if figures:
        for step in range(0, STEPS + 1, EVERY):
            save_figures(folder, step)
    return folder


def save_figures(run: Path, step: int) -> None:
    """Masks over a view, and a wide picture of predictions beside the truth."""
    rng = np.random.default_rng(step)
    y, x = np.mgrid[0:96, 0:128] / 96
    photo = np.stack(
        [0.4 + 0.3 * np.sin(7 * x), 0.3 + 0.5 * y, 0.6 - 0.3 * x * y], -1
    ) + rng.normal(0, 0.03, (96, 128, 3))
    mask = np.repeat((np.hypot(x - 0.6, y - 0.5) < 0.2 + step / 2000)[..., None], 3, -1)
    tiles = {
        "masks": [photo, mask, photo * (1 - 0.7 * mask)],
        "predictions": [photo, photo[::-1], 1 - photo, photo[:, ::-1], photo**2],
    }
    for name, row in tiles.items():
        pixels = np.concatenate([np.clip(tile, 0, 1) for tile in row], 1)
        Image.fromarray((255 * pixels).astype(np.uint8)).save(
            run / "figures" / f"{name}-step{step:06d}.png"
        )


def records(row: str, seed: int) -> list[dict[str, Any]]:
    """A log whose metrics gain what GAINS says of the row."""
    rng = np.random.default_rng([seed, *row.encode()])
    designs = row not in ("fixed", "uniform", "greedy")
    made: list[dict[str, Any]] = []
    for step in range(0, STEPS + 1, 8):
        if step % EVERY == 0:
            probed = metrics(row, seed, step)
            made.append(
                {"kind": "probe", "step": step, "metrics": probed, "directions": DIRECTIONS}
            )
        if designs and step:
            made.append(
                {
                    "kind": "designer",
                    "step": step,
                    "value": rng.normal(0.05, 0.1),
                    "g_down_norm": 3 - step / 200,
                }
            )
        if step:
            made.append(first_order(rng, step))
        if step % 40 == 0:
            samples, seconds = BATCH * step, 0.2 * step * (2 if designs else 1)
            made.append(
                {
                    "kind": "train",
                    "step": step,
                    "loss": 5 - step / 500,
                    "lr": 4e-4 * (1 - step / STEPS),
                    "samples": samples,
                }
            )
            made[-1] |= {
                "grad_evals": (2 if designs else 1) * step,
                "seconds": seconds,
                "samples_per_s": samples / max(seconds, 1),
            }
            made.append({"kind": "time", "step": step, "seconds": times(row, seconds)})
    if seed == 0 and designs:
        made.append(
            {
                "kind": "warning",
                "step": 40,
                "message": "the solve stopped at a residual of 0.2; raise solve.max_steps",
            }
        )
    return made


def metrics(row: str, seed: int, step: int) -> dict[str, float]:
    """Gains of steps that shrink, with noise by row and seed. Rows of a seed share step 0."""
    starts = np.random.default_rng(seed).normal(0, 0.004, 4)
    noise = (
        np.random.default_rng([seed, step, *row.encode()]).normal(0, 0.2, 4)
        if step
        else np.zeros(4)
    )
    share = (step / STEPS) ** 0.7
    return {
        name: value + start + share * gain + 0.01 * odd * value * share
        for (name, value), start, gain, odd in zip(
            METRICS.items(), starts, GAINS[row.split()[0]], noise, strict=True
        )
    }


def first_order(rng: np.random.Generator, step: int) -> dict[str, Any]:
    predicted = rng.normal(-1e-4, 2e-4)
    realised = 0.8 * predicted + rng.normal(0, 1.5e-4)
    plain = 0.4 * predicted + rng.normal(0, 1e-4)
    return {
        "kind": "first_order",
        "step": step,
        "realised": realised,
        "predicted": predicted,
        "predicted_plain": plain,
    }


def times(row: str, seconds: float) -> dict[str, float]:
    designer = 0.0 if row in ("fixed", "uniform") else 0.45 * seconds
    return {
        "probe": 20.0,
        "data": 0.1 * seconds,
        "task": 0.12 * seconds,
        "learner": 0.78 * seconds - designer,
        "designer": designer,
    }


def write_comparison(
    folder: Path,
    rows: Sequence[str] = tuple(GAINS),
    seeds: Sequence[int] = range(6),
    figures: bool = True,
) -> Path:
    """Warm starts, rows and results. With several seeds, the last row fails on the last one."""
    for seed in seeds:
        write_run(folder / "warm" / f"seed{seed}", records("fixed", seed)[:1], figures=False)
        for row in rows:
            log = records(row, seed)
            write_run(run_folder(folder, row, seed), log, figures and seed == seeds[0])
            failed = row == rows[-1] and seed == seeds[-1] and len(seeds) > 1
            results.append(
                folder,
                Result(row, seed, error="NonFiniteError: not finite")
                if failed
                else _result(row, seed, log),
            )
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    return folder


def _result(row: str, seed: int, log: list[dict[str, Any]]) -> Result:
    train = next(record for record in reversed(log) if record["kind"] == "train")
    return Result(
        row,
        seed,
        step0=metrics(row, seed, 0),
        metrics=metrics(row, seed, STEPS),
        steps=STEPS,
        samples=train["samples"],
        grad_evals=train["grad_evals"],
        seconds=train["seconds"],
        times=times(row, train["seconds"]),
        peak_memory=812_345_678,
        steered=STEERED,
        directions=DIRECTIONS,
    )
