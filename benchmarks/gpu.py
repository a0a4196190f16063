"""What only a GPU can fill: the missing rows of docs/benchmarks.md, and comparisons on five seeds.

    python benchmarks/gpu.py --data /path/to/data
    python benchmarks/gpu.py --toy --results /tmp/gpu.jsonl --runs /tmp/runs    tiny, on a CPU

Results are appended to benchmarks/results/gpu.jsonl as they come. Nothing is started that may not
end within --minutes; a second call goes on with what is missing. The rows then stand in the tables
of docs/benchmarks.md, and a finished comparison has its table and report in its folder.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import language
import steady
import torch
from rounds import GPU_RESULTS, ROOT, Part, publish_again

PARTS: Mapping[str, Part] = {"language": language.PART, "steady": steady.PART}
# Plain and steered of every setting that docs/benchmarks.md calls not measured.
ROWS = [
    *(("language", f"135m/{kind}") for kind in ("plain", "v")),
    *(
        ("steady", f"{setting}/{kind}")
        for setting in ("lm_135m", "vit_b_128", "vit_s_128", "vit_b_64", "vit_s_64")
        for kind in ("plain", "one_step_8")
    ),
    *(
        ("steady", f"{setting}/{kind}")
        for setting in ("vit_b_256", "vit_s_256")
        for kind in ("plain", "one_step_8")
    ),
]
TOY_ROWS = [("steady", "tiny_lm/plain")]
ROW_SECONDS = 45  # what a row may take at most; 25 are expected, and neither was measured


class Comparison(NamedTuple):
    """A comparison of docs/results on five seeds.

    Attributes:
        name: Of its folder.
        seconds: What it is expected to take.
        options: Of `python -m metavpt.compare`; {data} is the folder of the data.
    """

    name: str
    seconds: float
    options: Sequence[str]


COMPARISONS = [
    Comparison(  # docs/results/smollm2_gpu, its best rows
        "smollm2_gpu_five_seeds",
        150,
        [
            *("problem=lm_gsm8k", "data=gsm8k", "data.path={data}", "learner=smollm2_135m"),
            *("precision=bf16-mixed", "problem.length=256", "problem.batch_size=8"),
            *("problem.meta_batch_size=8", "problem.feedback_batch_size=32"),
            *("problem.generator.max_new_tokens=1", "problem.probe_batch_size=32"),
            *("designer.num_candidates=512", "trainer.probe_every=0"),
            *("trainer.first_order_every=0", "trainer.checkpoint_every=0"),
            *("trainer.optimizer.lr=1e-4", "threads=1", "+data.test.gsm8k.start=400"),
            *("data.num_test=250", "seeds=[10,11,12,13,14]", "jobs=15", "match=seconds"),
            *("budget.seconds=60", "budget.steps=null", "controls=[fixed]", "device=cuda"),
            "strategies=[{tilt: 'tilt strategy.every=2 strategy.gate=0.2'},"
            "{amortized: 'amortized designer=states strategy.every=4 designer.gate=0.2'}]",
        ],
    ),
    Comparison(  # docs/results/nyuv2_gpu_policies; faster with CUDA's MPS daemon running
        "nyuv2_gpu_policies",
        200,
        [
            *("problem=data2vec_nyuv2", "experiment=nyuv2", "data.path={data}/nyuv2"),
            *("threads=1", "jobs=16", "match=seconds", "budget.seconds=20", "budget.steps=null"),
            *("seeds=[10,11,12,13,14]", "device=cuda", "feedback.segmentation_weight=0"),
            "controls=[{fixed: 'fixed trainer.optimizer.lr=6e-4'},"
            "{uniform: 'uniform designer=patch_policy trainer.optimizer.lr=6e-4'}]",
            "strategies=[{features: 'functional designer.strength=3 strategy.batch_size=32'},"
            "{targets: 'functional designer=residuals designer.gate=0.6 strategy.batch_size=32"
            " trainer.optimizer.lr=6e-4'},"
            "{patches: 'functional designer=patch_policy designer.strength=8"
            " strategy.batch_size=32 trainer.optimizer.lr=6e-4'},"
            "{implicit_features: 'tilt_implicit strategy.every=1000'}]",
        ],
    ),
]
TOY_COMPARISONS = [
    Comparison(
        "toy",
        60,
        [
            *("problem=toy_sources", "seeds=[0]", "budget.steps=3", "controls=[fixed]"),
            *("strategies=[one_step]", "strategy.burn_in=0"),
        ],
    )
]


class Job(NamedTuple):
    """A row or a comparison.

    Attributes:
        part: The benchmark, or "compare".
        name: Of the row or comparison.
        seconds: What has to be left for it to start.
        run: Given the seconds left, returns what was measured.
    """

    part: str
    name: str
    seconds: float
    run: Callable[[float], dict[str, Any]]


def jobs(arguments: argparse.Namespace) -> Iterator[Job]:
    for part, row in TOY_ROWS if arguments.toy else ROWS:
        yield Job(
            part,
            row,
            ROW_SECONDS,
            lambda left, part=part, row=row: PARTS[part].run(row, arguments.threads),
        )
    for one in TOY_COMPARISONS if arguments.toy else COMPARISONS:
        yield Job(
            "compare", one.name, one.seconds, lambda left, one=one: compare(one, arguments, left)
        )


def compare(one: Comparison, arguments: argparse.Namespace, left: float) -> dict[str, Any]:
    """Run or resume a comparison. At the end of the time it is stopped, and keeps its rows."""
    folder = arguments.runs / one.name
    options = [option.format(data=arguments.data) for option in one.options if "{data}" in option]
    options += [option for option in one.options if "{data}" not in option]
    command = [sys.executable, "-m", "metavpt.compare", *options, f"output={folder}"]
    if (folder / "config.yaml").is_file():
        command.append("resume=true")
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        said, _ = process.communicate(timeout=left)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.communicate()
        return {"error": "ran out of time; the next call resumes it", "folder": str(folder)}
    if process.returncode:
        return {"error": (said.strip().splitlines() or ["no message"])[-1], "folder": str(folder)}
    return {"folder": str(folder)}


def done(results: Path) -> set[tuple[str, str]]:
    """Read which jobs have a result without an error."""
    if not results.is_file():
        return set()
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    return {(line["part"], line["row"]) for line in lines if "error" not in line["run"]}


def append(results: Path, line: dict[str, Any]) -> None:
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="holds nyuv2, gsm8k, mathtext and generaltext")
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "gpu")
    parser.add_argument("--results", type=Path, default=GPU_RESULTS)
    parser.add_argument("--toy", action="store_true", help="tiny sizes on a CPU")
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    known = done(arguments.results)
    missing = [job for job in jobs(arguments) if (job.part, job.name) not in known]
    if not arguments.toy and not torch.cuda.is_available():
        sys.exit(f"there is no GPU here; missing: {named(missing)}")
    if not arguments.toy and arguments.data is None:
        sys.exit("--data names the folder that holds nyuv2, gsm8k, mathtext and generaltext")
    failed: list[Job] = []
    for job in missing:
        left = end - time.monotonic()
        if left < job.seconds:
            failed.append(job)
            continue
        began = time.monotonic()
        found = job.run(left)
        line = {"part": job.part, "row": job.name, "environment": environment(arguments.threads)}
        append(
            arguments.results, {**line, "run": found, "seconds": round(time.monotonic() - began, 1)}
        )
        print(f"{job.part} {job.name}  {found}", flush=True)
        failed += [job] if "error" in found else []
    if arguments.results == GPU_RESULTS:
        for part in PARTS.values():
            publish_again(part)
    print(f"missing: {named(failed)}" if failed else "nothing is missing")


def named(missing: Sequence[Job]) -> str:
    return ", ".join(f"{job.part} {job.name}" for job in missing) or "nothing"


def environment(threads: int) -> dict[str, Any]:
    return {
        "command": " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "threads": threads,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": str(torch.__version__),
    }


if __name__ == "__main__":
    main()
