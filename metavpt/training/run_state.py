"""What makes a saved state that of this run: its options, its entries, and finite numbers.

`Options` are the options that a run's numbers depend on, as dotted keys with plain values. Options
that may change when a run is resumed are left out: the length of its budget, paths, devices, and
logging.
"""

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_flatten_with_path, tree_leaves

Options = dict[str, Any]

LEFT_OUT = {
    *("budget", "runs", "output", "resume", "minimise", "metrics", "tracker"),
    *("allow_targets", "allow_env"),
    *("device", "devices", "nodes", "parallel", "threads"),
    *("strategies", "controls", "vary", "seeds", "match", "warm_start", "jobs"),  # of comparisons
}
LEFT_OUT_OF_TRAINER = {
    *("log_every", "probe_every", "first_order_every", "checkpoint_every"),
    *("max_failures", "data_timeout", "dry_run", "recompute", "compile"),
}
LEFT_OUT_ANYWHERE = {"num_workers", "cache_bytes", "report"}
# Only their presence counts. Of other paths, the last part counts.
PATHS = {"path", "folder", "weights"}
WRITTEN_BY_STEPS = frozenset({"grad_norms", "max_grad_norm"})  # in parameter groups, by clipping


def significant_options(config: Mapping[str, Any]) -> Options:
    """Select the options that a run's numbers depend on from its resolved configuration."""
    return {
        ".".join(keys): value
        for keys, value in _leaves(config)
        if keys[0] not in LEFT_OUT
        and not (keys[0] == "trainer" and keys[-1] in LEFT_OUT_OF_TRAINER)
        and keys[-1] not in LEFT_OUT_ANYWHERE
    }


def optimizer_options(key: str, groups: Sequence[Mapping[str, Any]]) -> Options:
    """Describe the parameter groups of an optimizer under `key`. Equal values become one."""
    options = {}
    for name in groups[0] if groups else ():
        values = [_plain(group.get(name)) for group in groups]
        if name not in WRITTEN_BY_STEPS | {"params"} and values[0] is not None:
            options[f"{key}.{name}"] = values[0] if values == values[:1] * len(values) else values
    return options


def difference(before: Options, now: Options) -> str | None:
    """Describe up to three options that differ, as in `seed=0, now 1`. None: all are equal.

    A missing option equals one that is null.
    """
    keys = [
        key for key in dict.fromkeys([*before, *now]) if not _equal(before.get(key), now.get(key))
    ]
    named = [f"{key}={before.get(key)}, now {now.get(key)}" for key in keys[:3]]
    more = f"; {len(keys) - 3} more differ" if len(keys) > 3 else ""
    return "; ".join(named) + more if keys else None


def _leaves(node: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _leaves(value, (*keys, str(key)))
    elif isinstance(node, list | tuple):
        for k, value in enumerate(node):
            yield from _leaves(value, (*keys, str(k)))
    elif keys:
        if keys[-1] in PATHS and node is not None:
            node = "(a path)"
        yield keys, node.rsplit("/", 1)[-1] if isinstance(node, str) else _plain(node)


def _plain(value: Any) -> Any:
    """Reduce a value to a form that a checkpoint can hold and compare. None: impossible."""
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    try:
        return float(value)  # a learning rate may be a tensor
    except (TypeError, ValueError, RuntimeError):
        return None


def _equal(a: Any, b: Any) -> bool:
    both_nan = isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)
    return both_nan or a == b


MAX_DRAWS = 1000  # the limit on batches that a step takes from each stream
OF_PARAMETER_SHAPE = {  # entries of torch's optimizers of the parameter's shape
    *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg"),
    *("grad_avg", "acc_delta", "sum", "prev", "step_size", "ax"),
}
OPEN = {"times", "limits", "first", "metrics"}  # mappings of arbitrary names to numbers
ANY_NUMBER = {"first", "metrics"}  # of these, numbers may be negative or NaN
WHOLE = {"steps", "epoch", "position", "bytes", "crc", "measured_at"}


class Parameters(NamedTuple):
    """The parameters of a run's optimizers, in order."""

    learner: Sequence[Tensor]
    designer: Sequence[Tensor]


def faults(
    saved: Mapping[str, Any], own: Mapping[str, Any], parameters: Parameters
) -> Iterator[str]:
    """Yield reasons why `saved` is not the state of a run like that of `own`.

    Use the first one: each check relies on the checks before it.

    Args:
        saved: The state in a checkpoint.
        own: The state of the run that is to load it, before its first step.
        parameters: The parameters of this run.
    """
    for name in own.keys() ^ (saved.keys() - {"step"}):
        what = "lacks" if name in own else "holds"
        yield f"{what} the entry {name!r}; it is not a checkpoint of this version"
    if found := difference(saved["options"], own["options"]):
        yield f"was saved by a run with {found}; repeat the options of that run"
    for name in own.keys() - {"options", *([] if own["log"] else ["log"])}:
        for bad in _bad_entries(saved[name], own[name], name, shapes=name != "problem"):
            yield f"is the checkpoint of another model or configuration ({bad} does not fit)"
    for bad in _bad_optimizers(saved, own, parameters):
        yield f"is the checkpoint of another model or configuration ({bad} does not fit)"
    yield from _wrong_counts(saved)


def _wrong_counts(saved: Mapping[str, Any]) -> Iterator[str]:
    steps = saved["budget"]["steps"]
    if saved.get("step", steps) != steps:
        yield f"is of step {saved['step']} by its name and of step {steps} by its budget"
    if saved["measured_at"] > steps:
        yield f"was measured at step {saved['measured_at']} and is of step {steps}"
    probes = {f"probe, {name}": saved["first_order"][name] for name in ("feedback", "held_out")}
    for name, stream in {**saved["streams"], **probes}.items():
        if sum(stream.values()) > MAX_DRAWS * (steps + 1):
            yield f"has a stream ({name}) beyond what {steps} steps can draw"


def not_finite(state: Any, parameters: Container[str] = ()) -> str | None:
    """Return the name of the first tensor in `state` that holds NaN, or None.

    For the names in `parameters` infinity counts as well. Buffers may hold it, as attention masks
    do.
    """
    for keys, leaf in tree_flatten_with_path(state)[0]:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            local = leaf.to_local() if isinstance(leaf, DTensor) else leaf
            name = ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in keys)
            if not (local.isfinite() if name in parameters else ~local.isnan()).all():
                return name
    return None


def optimizer_states(state: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the states of optimizers in `state`, each with its dotted name."""
    if _is_of_optimizer(state):
        yield name, state
    elif isinstance(state, Mapping):
        for key, value in state.items():
            yield from optimizer_states(value, f"{name}.{key}")


def _is_of_optimizer(state: Any) -> bool:
    return isinstance(state, Mapping) and {"state", "param_groups"} <= state.keys()


def _bad_entries(saved: Any, own: Any, name: str, shapes: bool) -> Iterator[str]:
    """Yield the entries of `saved` that differ in kind from those of `own`.

    Entries that are None or empty in `own`, because nothing was computed yet, may be any tensors
    and numbers. States of optimizers are skipped, see `_bad_optimizers`.
    """
    if _is_of_optimizer(own):
        return
    if isinstance(own, Mapping) and (own or name.rpartition(".")[2] in OPEN):
        yield from _bad_members(saved, own, name, shapes)
    elif own is None or isinstance(own, Mapping):
        kinds = (int, float, Tensor, type(None))
        is_data = all(isinstance(leaf, kinds) for leaf in tree_leaves(saved))
        if not is_data or (own is not None and not isinstance(saved, Mapping)):
            yield name
    elif isinstance(own, Tensor):
        same = isinstance(saved, Tensor) and saved.dtype == own.dtype
        if not same or (shapes and saved.shape != own.shape):
            yield name
    elif isinstance(own, int | float):
        if not _is_count(saved, name.rpartition(".")[2] in WHOLE):
            yield name
    elif not isinstance(saved, type(own)):
        yield name


def _bad_members(saved: Any, own: Mapping[str, Any], name: str, shapes: bool) -> Iterator[str]:
    last = name.rpartition(".")[2]
    if not isinstance(saved, Mapping):
        yield name
    elif last in OPEN:
        for key, value in saved.items():
            if not (isinstance(value, int | float) if last in ANY_NUMBER else _is_count(value)):
                yield f"{name}.{key}"
    elif saved.keys() != own.keys():
        yield name
    else:
        for key, value in own.items():
            yield from _bad_entries(saved[key], value, f"{name}.{key}", shapes)


def _is_count(value: Any, whole: bool = False) -> bool:
    return isinstance(value, int if whole else int | float) and math.isfinite(value) and value >= 0


def _bad_optimizers(
    saved: Mapping[str, Any], own: Mapping[str, Any], parameters: Parameters
) -> Iterator[str]:
    yield from _bad_optimizer(
        saved["optimizer"], own["optimizer"], parameters.learner, "trainer.optimizer", free={"lr"}
    )
    found = dict(optimizer_states(saved["strategy"], "strategy"))
    for name, like in optimizer_states(own["strategy"], "strategy"):
        free = like["param_groups"][0].keys()  # a strategy may change any of its options
        yield from _bad_optimizer(found.get(name), like, parameters.designer, name, free)


def _bad_optimizer(
    saved: Any, own: Any, parameters: Sequence[Tensor], name: str, free: Container[str]
) -> Iterator[str]:
    """Yield the entries of an optimizer's state that do not fit the optimizer with the state `own`.

    Args:
        saved: The state to check.
        own: The state of the optimizer that is to load it.
        parameters: Its parameters, in order.
        name: Its name in the message.
        free: Options of the groups that may be another number than in `own`.
    """
    groups = saved.get("param_groups") if isinstance(saved, Mapping) else None
    if not isinstance(groups, list) or len(groups) != len(own["param_groups"]):
        yield f"{name}.param_groups"
        return
    for group, like in zip(groups, own["param_groups"], strict=True):
        options = like.keys() - WRITTEN_BY_STEPS
        if not isinstance(group, Mapping) or group.keys() - WRITTEN_BY_STEPS != options:
            yield f"{name}.param_groups"
            return
        yield from (
            f"{name}.{key}"
            for key in like
            if key in options and not _same(group[key], like[key], key in free)
        )
    entries = saved["state"]
    for group in groups:
        alike = {frozenset(entries[index]) for index in group["params"] if index in entries}
        if len(alike) > 1:
            yield f"{name}.state"
            return
    for index, entry in entries.items():
        if index not in range(len(parameters)):
            yield f"{name}.state.{index}"
            return
        yield from (
            f"{name}.state.{index}.{key}"
            for key, value in entry.items()
            if not _fits(key, value, parameters[index])
        )


def _same(value: Any, like: Any, free: bool) -> bool:
    """Return whether an option is as in `own`, or, if it is `free`, another number."""
    if free and isinstance(like, int | float | Tensor) and not isinstance(like, bool):
        return _is_count(value) or (isinstance(value, Tensor) and value.numel() == 1)
    return type(value) is type(like) and bool(value == like)


def _fits(key: str, value: Any, parameter: Tensor) -> bool:
    """Return whether `value` can be the entry `key` of an optimizer's state for a parameter."""
    if key == "step":
        one = isinstance(value, Tensor) and value.numel() == 1
        return _is_count(float(value) if one else value)
    if key not in OF_PARAMETER_SHAPE or (key == "momentum_buffer" and value is None):
        return True
    same = isinstance(value, Tensor) and value.shape == parameter.shape
    return same and value.is_floating_point() == parameter.is_floating_point()
