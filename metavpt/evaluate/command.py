"""`python -m metavpt.evaluate weights=... data=...`: any weights, scored as a run scores its own.

The problem of the command line is built with the weights as its learner, and measured once.
"""

import json
import math
import time
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from hydra import compose
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.table import Table
from rich.text import Text

from metavpt.cli.configuration import command, read_config
from metavpt.cli.console import Console
from metavpt.cli.formatting import number
from metavpt.compare.runner import TrivialPredictors
from metavpt.errors import MetaVPTError
from metavpt.export.loading import exported_weights, read_backbone
from metavpt.problem import move_to_device, supports
from metavpt.training import run_folder
from metavpt.training.build import check_option_types
from metavpt.training.checkpoint import seed_generators
from metavpt.training.disk import write_text
from metavpt.training.engine import make_fabric
from metavpt.training.run_log import ReportsClasses
from metavpt.training.trainer import as_metrics

FILE = "evaluation.json"


def evaluate(cfg: DictConfig) -> Path:
    """Score the weights, print a table beside trivial predictors, and write evaluation.json.

    Returns:
        The file.
    """
    check_option_types(cfg)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    device = make_fabric(cfg.device).device
    if cfg.harness.tasks and not cfg.get("learner"):
        raise MetaVPTError(
            f"harness.tasks={list(cfg.harness.tasks)}: needs a language model, problem=lm_gsm8k"
        )
    harness = _harness() if cfg.harness.tasks else None
    seed_generators(cfg.seed)
    problem = scored_problem(cfg)
    move_to_device(problem, device)
    folder = run_folder.create(
        Path(str(cfg.output)) if cfg.output else None, Path(str(cfg.runs)), "evaluation"
    )
    try:
        found = _measured(problem, cfg)
        if harness:
            found["harness"] = _run_harness(harness, problem, cfg.harness)
        write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
        run_folder.write_environment(folder, cfg.seed, command="evaluate")
        write_text(folder / FILE, json.dumps(_finite(found), indent=1, ensure_ascii=False) + "\n")
    except BaseException:
        run_folder.remove(folder)
        raise
    finally:
        run_folder.unlock(folder)
    console = Console()
    for made in tables(found):
        console.print(made)
    console.print(f"{folder / FILE}", soft_wrap=True, highlight=False)
    return folder / FILE


def scored_problem(cfg: DictConfig) -> Any:
    """Build the problem of the command line with the weights as its learner.

    Raises:
        MetaVPTError: There are no such weights, or they do not fit.
    """
    if cfg.weights is None:
        return instantiate(cfg.problem, _convert_="all")
    source = Path(str(cfg.weights))
    kind = "learner" if cfg.get("learner") else "backbone"
    if (source / "config.yaml").is_file():
        return _of_folder(cfg, source, kind)
    named = files("metavpt.configs") / kind / f"{cfg.weights}.yaml"
    with open_dict(cfg):
        if named.is_file():
            cfg[kind] = compose("evaluate", [f"{kind}={cfg.weights}"])[kind]
        elif kind == "learner":
            cfg.learner = _released(source)
        else:
            cfg.backbone.update({"weights": str(cfg.weights), "pretrained": False})
    return instantiate(cfg.problem, _convert_="all")


def _of_folder(cfg: DictConfig, folder: Path, kind: str) -> Any:
    """Build the problem with the learner of a run or an export."""
    config = read_config(folder)
    if not config.get(kind):
        other = "problem=lm_gsm8k" if config.get("learner") else "a problem on images"
        raise MetaVPTError(f"weights={folder}: needs {other}; set problem and data")
    of_run = (folder / "checkpoints").is_dir()
    with open_dict(cfg):
        cfg[kind] = config[kind]
        if kind == "backbone":
            cfg.backbone.update({"weights": None, "pretrained": False})
        elif not of_run:
            cfg.learner = _released(exported_weights(folder))
    problem = instantiate(cfg.problem, _convert_="all")
    if kind == "backbone":
        problem.backbone.load_state_dict(read_backbone(folder, config, cfg.part).state_dict())
    elif of_run:
        state, file = run_folder.newest_state(folder)
        try:
            problem.learner.load_state_dict(state["learner"])
        except (KeyError, RuntimeError) as error:
            raise MetaVPTError(
                f"{file}: does not fit the learner; repeat problem and data of that run"
            ) from error
    return problem


def _released(source: Path) -> dict[str, Any]:
    """Return the configuration of a language model of transformers."""
    target = "metavpt.learners.tokenized.released"
    return {"_target_": target, "_partial_": True, "source": str(source)}


def _measured(problem: Any, cfg: DictConfig) -> dict[str, Any]:
    start = time.perf_counter()
    metrics = as_metrics(problem.evaluate(), type(problem).__name__)
    return {
        "weights": None if cfg.weights is None else str(cfg.weights),
        "metrics": metrics,
        "directions": dict(problem.metric_directions),
        "classes": problem.class_metrics() if supports(problem, ReportsClasses) else {},
        "trivial": problem.trivial_metrics() if supports(problem, TrivialPredictors) else {},
        "seconds": time.perf_counter() - start,
    }


def _harness() -> Any:
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MetaVPTError(
            f"harness.tasks needs lm-evaluation-harness ({error}): pip install 'metavpt[harness]', "
            "or leave harness.tasks out"
        ) from None
    return lm_eval.simple_evaluate, HFLM, TaskManager


def _run_harness(harness: Any, problem: Any, options: DictConfig) -> dict[str, Any]:
    """Return the results of lm-evaluation-harness: metrics by task, as it names them."""
    simple_evaluate, as_harness_model, make_tasks = harness
    model = as_harness_model(
        pretrained=problem.learner.transformers_model, tokenizer=problem.data.encoder.tokenizer
    )
    found = simple_evaluate(
        model,
        tasks=list(options.tasks),
        limit=options.limit,
        num_fewshot=options.num_fewshot,
        task_manager=make_tasks(
            include_path=options.include_path, include_defaults=options.include_path is None
        ),
        bootstrap_iters=0,
    )
    return {
        task: {name: value for name, value in results.items() if isinstance(value, int | float)}
        for task, results in found["results"].items()
    }


def tables(found: Mapping[str, Any]) -> list[Table]:
    """Return the metrics beside trivial predictors, and those of each class."""
    trivial: Mapping[str, Mapping[str, float]] = found["trivial"]
    title = found["weights"] or "as configured"
    made = [_table("metric", title, *trivial, "better")]
    for name, value in found["metrics"].items():
        others = [number(metrics.get(name)) for metrics in trivial.values()]
        made[0].add_row(Text(name), number(value), *others, found["directions"].get(name, ""))
    for task, results in found.get("harness", {}).items():
        for name, value in results.items():
            empty = [number(None)] * len(trivial)
            made[0].add_row(Text(f"{task} {name.removesuffix(',none')}"), number(value), *empty)
    for name, values in found["classes"].items():
        classes = _table("class", name)
        for of_class, value in values:
            classes.add_row(Text(of_class), number(value))
        made.append(classes)
    return made


def _table(first: str, *others: str) -> Table:
    table = Table(first, box=None, header_style="dim")
    for title in others:
        table.add_column(Text(title), justify="right")
    return table


def _finite(value: Any) -> Any:
    """Replace what JSON has no number for by null."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@command("evaluate")
def main(cfg: DictConfig) -> None:
    """Entry point of `python -m metavpt.evaluate`."""
    evaluate(cfg)
