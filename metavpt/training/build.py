"""From a configuration to a trainer: the types of its options are checked, then it is built."""

import collections.abc
import inspect
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.utils import get_object, instantiate
from lightning_fabric import Fabric
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from typing_extensions import get_protocol_members, is_protocol

from metavpt.cli.console import Console
from metavpt.distributed import collectives
from metavpt.errors import MetaVPTError
from metavpt.problem import Problem, check_directions, move_to_device
from metavpt.training.budget import Budget
from metavpt.training.checkpoint import Checkpoints, seed_generators
from metavpt.training.engine import make_fabric
from metavpt.training.run_log import RunLog, UnwrittenLog
from metavpt.training.run_state import significant_options
from metavpt.training.strategy import Strategy
from metavpt.training.trainer import Trainer

OF_COMMANDS: dict[str, Any] = {
    **dict.fromkeys(("seed", "devices", "nodes", "jobs", "warm_start"), int),
    **dict.fromkeys(("precision", "parallel", "match"), str),
    **dict.fromkeys(("device", "minimise"), str | None),
    "threads": int | None,
    "resume": bool,
    "problem": Problem,
    "strategy": Strategy,
    "budget": Budget,
    "trainer": Trainer,
}
MAX_BATCH_SIZE = 2**24  # samples; more than any memory holds would be drawn without end
LISTS = (list, tuple, collections.abc.Sequence, collections.abc.Iterable)
MAPPINGS = (dict, collections.abc.Mapping)
WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    types.NoneType: "null",
}


def build(cfg: DictConfig, folder: Path, console: Console, fabric: Fabric | None = None) -> Trainer:
    """Build the trainer of a configuration. `cfg.seed` sets all randomness.

    Args:
        cfg: The resolved configuration of a run.
        folder: Where the log and the checkpoints go.
        console: Where the log shows the progress.
        fabric: Device, precision and processes. None: one process.
    """
    fabric = fabric or make_fabric(cfg.device, cfg.precision)
    log: RunLog = UnwrittenLog(folder)
    if collectives.rank() == 0:
        log = RunLog(
            folder,
            console,
            {name: instantiate(tracker) for name, tracker in (cfg.get("tracker") or {}).items()},
        )
    seed_generators(cfg.seed)
    problem = instantiate(cfg.problem, _convert_="all")
    if stated := check_directions(cfg.get("metrics") or {}, "metrics"):
        problem.metric_directions = {**problem.metric_directions, **stated}
    move_to_device(problem, "meta" if cfg.device == "meta" else fabric.device)
    trainer = instantiate(
        cfg.trainer,
        problem=problem,
        strategy=instantiate(cfg.strategy),
        budget=instantiate(cfg.budget),
        log=log,
        checkpoints=Checkpoints(folder / "checkpoints"),
        seed=cfg.seed,
        fabric=fabric,
    )
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    trainer.options |= significant_options(config)
    log.start_trackers(config)
    return trainer


def check_option_types(cfg: DictConfig) -> None:
    """Check each option against the annotation of the parameter that takes it.

    Annotations that no plain value can be checked against pass, and so do targets that cannot be
    found: their own messages are better.

    Args:
        cfg: The configuration of a run, whose `_target_`s are allowed to be imported.

    Raises:
        MetaVPTError: An option is of the wrong type. The message names its key.
    """
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    for name, hint in OF_COMMANDS.items():
        if name in config:
            _check(name, config[name], hint)
    for key, node in _targets(config, ()):
        found = _find(node["_target_"])
        hints = _hints(found) if found is not None else {}
        for name, value in node.items():
            _check(".".join((*key, str(name))), value, hints.get(name, Any))


def _check(key: str, value: Any, hint: Any) -> None:
    if value == "???":  # reported where it is used
        return
    if not _fits(value, hint):
        shown = value.get("_target_", "a mapping") if isinstance(value, Mapping) else value
        raise MetaVPTError(f"{key}={shown}: must be {' or '.join(dict.fromkeys(_words(hint)))}")
    if key.endswith("batch_size") and isinstance(value, int) and not 1 <= value <= MAX_BATCH_SIZE:
        raise MetaVPTError(f"{key}={value}: must be at least 1 and at most {MAX_BATCH_SIZE:,}")


def _targets(node: Any, key: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The nodes with a `_target_`, each with its key."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield key, node
        for name, value in node.items():
            yield from _targets(value, (*key, str(name)))
    elif isinstance(node, list):
        for k, value in enumerate(node):
            yield from _targets(value, (*key, str(k)))


def _find(target: Any) -> Any:
    try:
        return get_object(str(target))
    except Exception:  # hydra's own message names what is wrong
        return None


def _hints(found: Any) -> dict[str, Any]:
    """The annotations of a class or function; with **options, those of the next base too."""
    if not inspect.isclass(found):
        return _own_hints(found)
    hints: dict[str, Any] = {}
    for base in found.__mro__:
        if "__init__" in vars(base):
            hints = {**_own_hints(base.__init__), **hints}
            if not _takes_more(base.__init__):
                break
    return hints


def _takes_more(function: Any) -> bool:
    kinds = (parameter.kind for parameter in inspect.signature(function).parameters.values())
    return inspect.Parameter.VAR_KEYWORD in kinds


def _own_hints(function: Any) -> dict[str, Any]:
    """The annotations of a function, without those that cannot be resolved."""
    try:
        return typing.get_type_hints(function)
    except Exception:  # a name that is imported for type checkers alone
        hints = getattr(function, "__annotations__", {})
        return {name: hint for name, hint in hints.items() if not isinstance(hint, str)}


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or hint is object:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return value in arguments
    if isinstance(value, Mapping):
        is_object = "_target_" in value
        return _makes(value, hint) if is_object else hint not in WORDS and origin not in LISTS
    if isinstance(value, list):
        return _fits_list(value, hint, origin, arguments)
    return _fits_scalar(value, hint, origin)


def _fits_scalar(value: Any, hint: Any, origin: Any) -> bool:
    """Whether text, a number, a truth value or null can stand where `hint` is wanted."""
    if hint in (int, float):
        number = isinstance(value, int if hint is int else int | float)
        return number and not isinstance(value, bool)
    if hint is Path:
        return isinstance(value, str)
    if origin in (*LISTS, *MAPPINGS, collections.abc.Callable):
        return False
    if hint in WORDS:
        return isinstance(value, hint)
    # an object of the package and a tensor are never plain; of others it is not known
    is_ours = inspect.isclass(hint) and hint.__module__.partition(".")[0] == "metavpt"
    return not (is_ours or hint is Tensor)


def _fits_list(value: list[Any], hint: Any, origin: Any, arguments: Sequence[Any]) -> bool:
    if hint in WORDS or origin in MAPPINGS:
        return False
    if origin not in LISTS or not arguments:
        return True
    if origin is tuple and ... not in arguments:
        return len(value) == len(arguments) and all(map(_fits, value, arguments))
    return all(_fits(item, arguments[0]) for item in value)


def _makes(node: Mapping[str, Any], hint: Any) -> bool:
    """Whether what a node with a `_target_` makes can stand where `hint` is wanted."""
    found = _find(node["_target_"])
    if hint in WORDS:
        return False
    origin = typing.get_origin(hint)
    if origin is collections.abc.Callable and node.get("_partial_"):
        return _makes_one_of(found, typing.get_args(hint)[-1])
    if origin is collections.abc.Callable and inspect.isclass(found):
        return any("__call__" in vars(base) for base in found.__mro__)
    if origin in MAPPINGS and node.get("_partial_"):
        return False
    if not (inspect.isclass(hint) and inspect.isclass(found)) or node.get("_partial_"):
        return True
    if is_protocol(hint):  # what is no method may be set in __init__
        methods = (name for name in get_protocol_members(hint) if hasattr(hint, name))
        return all(hasattr(found, name) for name in methods)
    return issubclass(found, hint)


def _makes_one_of(factory: Any, hint: Any) -> bool:
    """Whether a factory of the package makes what `hint` names. Of others it is not known."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_makes_one_of(factory, argument) for argument in typing.get_args(hint))
    made = factory if inspect.isclass(factory) else _own_hints(factory).get("return")
    if not (inspect.isclass(made) and inspect.isclass(hint)) or is_protocol(hint):
        return True
    return made.__module__.partition(".")[0] != "metavpt" or issubclass(made, hint)


def _words(hint: Any) -> list[str]:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return [word for argument in typing.get_args(hint) for word in _words(argument)]
    if origin is typing.Literal:
        return [str(argument) for argument in typing.get_args(hint)]
    if origin is collections.abc.Callable:
        made = typing.get_args(hint)[-1:]
        known = [word for one in made if inspect.isclass(one) for word in _words(one)]
        of = f" that makes {known[0]}" if known else ""
        return [f"something to call{of}, as in {{_target_: ..., _partial_: true}}"]
    if origin is not None:
        return ["a mapping" if origin in MAPPINGS else "a list"]
    return [WORDS.get(hint, f"an object of {getattr(hint, '__name__', hint)}")]
